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
