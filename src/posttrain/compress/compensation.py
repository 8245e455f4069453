"""What GPTQ and SparseGPT share: columns are given up one after another, and those after them make good what was lost.

A layer's error is tr(D H D^T), D the change of its weights [M, K], H = 2 X^T X / n of its inputs X. arXiv 2208.11580 (OBC).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.errors import RunError

BLOCK = 128
"""Columns after which what was lost reaches all that follow; a matter of speed alone."""
TRIES = 6
Choice = Callable[[int, Tensor], Tensor]


def inverse_factor(hessian: Float[Tensor, "K K"], damp: float = 0.01) -> Float[Tensor, "K K"]:
    """Upper triangular U with U^T U = (H + damp mean(diag H) I)^-1, float64.

    The damping grows tenfold as long as the matrix has no Cholesky factor. Inputs that are always 0 count as the mean of the
    others, and so do not weigh on it.
    """
    hessian = hessian.double()
    dead = hessian.diagonal() == 0
    mean = 1.0 if bool(dead.all()) else float(hessian.diagonal()[~dead].mean())
    hessian = hessian + mean * torch.diag(dead.double())
    for time in range(TRIES):
        found = _factor(hessian, damp * 10**time * mean)
        if found is not None:
            return found
    raise RunError(
        f"the second moments of a layer's inputs have no inverse, even with {damp * 10 ** (TRIES - 1):g} of their mean on the "
        "diagonal: they are not finite, or far from what inputs give; look at the calibration data"
    )


def _factor(hessian: Tensor, added: float) -> Tensor | None:
    lower, wrong = torch.linalg.cholesky_ex(hessian + added * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device))
    if int(wrong):
        return None
    upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(wrong) or not bool(upper.isfinite().all()) else upper


def compensated(
    weight: Float[Tensor, "M K"], factor: Float[Tensor, "K K"], choose: Choice, edges: Sequence[int]
) -> Float[Tensor, "M K"]:
    """Each column, first to last, becomes choose(j, weights from column j on), and the columns after it are moved such that the
    outputs change least.

    edges: 0, where blocks begin, K. What `choose` sees is up to date as far as the end of the block, at a block's first column to
    the end of the matrix.
    """
    weight, factor = weight.clone(), factor.to(weight.dtype)
    for start, stop in pairwise(edges):
        lost = torch.empty_like(weight[:, start:stop])
        for column in range(start, stop):
            chosen = choose(column, weight[:, column:])
            error = (weight[:, column] - chosen) / factor[column, column]
            weight[:, column] = chosen
            weight[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
            lost[:, column - start] = error
        weight[:, stop:] -= lost @ factor[start:stop, stop:]
    return weight


def edges_of(columns: int, block: int, also: int | None = None) -> list[int]:
    """Where blocks begin, and the end: every `block` columns, and every `also`."""
    return sorted({*range(0, columns, block), *range(0, columns, also or columns), columns})


def output_error(change: Float[Tensor, "M K"], hessian: Float[Tensor, "K K"]) -> float:
    """tr(D H D^T) / 2: the mean over inputs of the squared change of the output."""
    change = change.double()
    return 0.5 * float(((change @ hessian.double()) * change).sum())
