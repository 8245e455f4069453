"""Policy-gradient losses, per token."""

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_surrogate(
    logp: Float[Tensor, " N"],
    sampled_logp: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, " N"]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) with ratio = exp(logp - sampled_logp). arXiv 1707.06347 eq. 7.

    sampled_logp is the log-probability under the policy that the update started from. A loss: lower is better.
    """
    ratio = (logp - sampled_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
