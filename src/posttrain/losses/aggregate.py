"""From per-token values to per-sequence values. A mean over a batch is never taken: the loop divides by its units."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sequence_sums(values: Float[Tensor, " N"], owner: Int[Tensor, " N"], sequences: int) -> Float[Tensor, " B"]:
    """The sum of each sequence's values: log p(y|x) from its tokens' log-probabilities. Zero for a sequence without tokens."""
    return torch.zeros(sequences, dtype=values.dtype, device=values.device).index_add(0, owner, values)


def sequence_means(values: Float[Tensor, " N"], owner: Int[Tensor, " N"], sequences: int) -> Float[Tensor, " B"]:
    """The mean of each sequence's values, so that every sequence weighs the same whatever its length (arXiv 2402.03300).

    Zero, and not NaN, for a sequence without tokens.
    """
    counts = torch.bincount(owner, minlength=sequences).clamp(min=1)
    return sequence_sums(values, owner, sequences) / counts
