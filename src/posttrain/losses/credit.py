"""Who gets the credit: from scores of whole samples to advantages."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

EQUAL = 1e-8  # a deviation below this is rounding, not signal


def group_advantages(
    scores: Float[Tensor, " B"], groups: Int[Tensor, " B"], scale: Literal["group", "batch", "none"] = "group", eps: float = 1e-4
) -> Float[Tensor, " B"]:
    """(score - mean of its group) / (standard deviation + eps). arXiv 2402.03300 section 4.1.

    groups: the group of each sample, numbered from 0. scale: divide by the group's own deviation, by the deviation of the
    whole batch (arXiv 2508.08221), or not at all (arXiv 2503.20783). Deviations are Bessel-corrected. A group whose scores are
    all equal gets exactly zero, and so does a group of one.
    """
    scores, dtype = scores.double(), scores.dtype  # so that equal scores such as 1/3 leave nothing behind
    sizes = torch.bincount(groups)
    sums = torch.zeros(len(sizes), dtype=scores.dtype, device=scores.device).index_add(0, groups, scores)
    centred = scores - (sums / sizes.clamp(min=1))[groups]
    squares = torch.zeros_like(sums).index_add(0, groups, centred**2)
    deviation = (squares / (sizes - 1).clamp(min=1)).sqrt()[groups]
    centred = torch.where(deviation < EQUAL, torch.zeros_like(centred), centred)
    if scale == "none":
        return centred.to(dtype)
    if scale == "group":
        return (centred / (deviation + eps)).to(dtype)
    spread = scores.std() if len(scores) > 1 else torch.zeros((), dtype=scores.dtype, device=scores.device)
    return (centred / (spread + eps)).to(dtype)
