"""Losses of policy-gradient methods: of the policy and of its critic, per token."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST_LOG_RATIO = 20.0  # a ratio beyond 5e8 says nothing more


def clipped_surrogate(
    logp: Float[Tensor, " N"],
    sampled_logp: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Tensor, " N"]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) with ratio = exp(logp - sampled_logp). arXiv 1707.06347 eq. 7.

    sampled_logp is the log-probability under the policy that the update started from. A loss: lower is better. With `dual_clip`
    the loss of a token of negative advantage is at most -dual_clip A (arXiv 1912.09729). The log-ratio is clamped to +-20.
    """
    ratio = (logp - sampled_logp).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    worst = torch.where(advantage < 0, advantage * (math.inf if dual_clip is None else dual_clip), -math.inf)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage).clamp(min=worst)


def cispo(
    logp: Float[Tensor, " N"], log_ratio: Float[Tensor, " N"], advantage: Float[Tensor, " N"], cap: float = 5.0
) -> Float[Tensor, " N"]:
    """-min(exp(log_ratio), cap) A logp, the weight without gradient: every token keeps one, however far its ratio.

    arXiv 2506.13585 eq. 4. cap is absolute, as in arXiv 2510.13786 and TRL; the paper's own is 1 + epsilon_high.
    """
    return -log_ratio.detach().clamp(max=LARGEST_LOG_RATIO).exp().clamp(max=cap) * advantage * logp


def soft_surrogate(
    log_ratio: Float[Tensor, " N"], advantage: Float[Tensor, " N"], up: float = 1.0, down: float = 1.05
) -> Float[Tensor, " N"]:
    """-(4 / t) sigmoid(t (ratio - 1)) A with t = up where A > 0, else down: a gate in place of a clip (SAPO). arXiv 2511.20347.

    At ratio 1 the gradient is that of the ratio itself; it fades on both sides, faster the higher t.
    """
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    steepness = torch.where(advantage > 0, up, down).to(log_ratio.dtype)
    return -4 / steepness * torch.sigmoid(steepness * (ratio - 1)) * advantage


def gamma_weight(
    log_ratio: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    power: tuple[float, float] = (2.0, 3.0),
    decay: tuple[float, float] = (3.0, 2.0),
) -> Float[Tensor, " N"]:
    """w^k exp(l (1 - w)) with w = exp(log_ratio), of a whole sequence: VESPO's weight, 1 at w = 1. arXiv 2602.10693.

    power is k, decay l; the first of each where A >= 0, the second where A < 0. No gradient flows. w stays within 1e-8 and e^20.
    """
    log_ratio = log_ratio.detach().clamp(math.log(1e-8), LARGEST_LOG_RATIO)
    good = advantage >= 0
    k, fall = (torch.where(good, *each).to(log_ratio.dtype) for each in (power, decay))
    return (fall + k * log_ratio - fall * log_ratio.exp()).exp()


def importance_weight(
    log_ratio: Float[Tensor, " N"], cap: float = 2.0, floor: float = 0.0, mask: bool = False
) -> Float[Tensor, " N"]:
    """What a token counts that another policy drew: exp(log_ratio), log_ratio = log p of the trainer - log p of the sampler.

    At most cap (truncated importance sampling); with `mask` zero above cap and below floor, else unchanged. No gradient flows.
    """
    weight = log_ratio.detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    return weight.masked_fill((weight > cap) | (weight < floor), 0.0) if mask else weight.clamp(max=cap)


def entropy(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """-sum p log p of each row's distribution, in nats."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def clipped_value(
    value: Float[Tensor, " N"], old_value: Float[Tensor, " N"], returns: Float[Tensor, " N"], clip: float | None
) -> Float[Tensor, " N"]:
    """max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2, the worse of the two; (v - R)^2 / 2 if clip is None.

    A critic moves by at most `clip` from what it said when the update started (arXiv 2403.17031).
    """
    loss = (value - returns) ** 2
    if clip is not None:
        loss = torch.maximum(loss, (value.clamp(old_value - clip, old_value + clip) - returns) ** 2)
    return 0.5 * loss
