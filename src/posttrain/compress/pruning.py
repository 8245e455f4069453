"""Weights left out: which, and what the others become. Functions of matrices [M outputs, K inputs].

A share is exact: of N weights int(N * share) are left out, those of the lowest score; of equal scores those that stand first.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.compress.compensation import BLOCK, compensated, edges_of, inverse_factor
from posttrain.models.products import wide

Pattern = tuple[int, int]
"""(n, m): of each m consecutive inputs of an output, n stay."""


def count_of(weights: int, share: float) -> int:
    """int(N * share), where the product is a whole number but for its last digits that number."""
    return int(weights * share + 1e-9)


def lowest(scores: Float[Tensor, "*B N"], count: int) -> Bool[Tensor, "*B N"]:
    """The `count` lowest of each row."""
    places = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)


def lowest_of_all(scores: Sequence[Float[Tensor, "_M _K"]], share: float) -> list[Bool[Tensor, "_M _K"]]:
    """Of several matrices compared with each other, or of one."""
    flat = torch.cat([each.flatten() for each in scores])
    dropped = lowest(flat, count_of(len(flat), share)).split([each.numel() for each in scores])
    return [each.view(scored.shape) for each, scored in zip(dropped, scores, strict=True)]


def lowest_of_rows(scores: Float[Tensor, "M K"], share: float) -> Bool[Tensor, "M K"]:
    """Of each output, compared within it."""
    return lowest(scores, count_of(scores.shape[1], share))


def lowest_of_groups(scores: Float[Tensor, "M K"], pattern: Pattern) -> Bool[Tensor, "M K"]:
    """All but n of each m consecutive inputs. ValueError where the inputs are no multiple of m."""
    n, m = pattern
    if scores.shape[1] % m:
        raise ValueError(f"{scores.shape[1]} inputs cannot be divided into groups of {m}")
    return lowest(scores.unflatten(1, (-1, m)), m - n).flatten(1)


def magnitude(weight: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """|w|."""
    return wide(weight).abs()


def wanda(weight: Float[Tensor, "M K"], squares: Float[Tensor, " K"]) -> Float[Tensor, "M K"]:
    """|w| times the norm of its input; arXiv 2306.11695. squares: sum, or mean, of squares of each input."""
    return wide(weight).abs() * squares.to(wide(weight).dtype).sqrt()


def sparsegpt(
    weight: Float[Tensor, "M K"],
    hessian: Float[Tensor, "K K"],
    share: float = 0.5,
    pattern: Pattern | None = None,
    damp: float = 0.01,
    block: int = BLOCK,
) -> Float[Tensor, "M K"]:
    """Leaves out weights of the lowest w^2 / U_jj^2, and lets those after them in their row make good for it; arXiv 2301.00774.

    Which, is decided when a block of columns (`pattern`: a group) comes, from the weights as they are then: all of the block are
    compared with each other.
    """
    rows, columns = weight.shape
    step = block if pattern is None else pattern[1]
    if pattern is not None:
        block = max(block - block % step, step)  # a block ends with a group
        lowest_of_groups(weight[:1], pattern)
    factor = inverse_factor(hessian, damp).to(wide(weight).dtype)
    dropped = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    unused = hessian.diagonal() == 0  # inputs that are always 0: theirs go first

    def choose(column: int, rest: Tensor) -> Tensor:
        if column % step == 0:
            part = slice(column, min(column + step, columns))
            scores = ((rest[:, :step] / factor.diagonal()[part]) ** 2).masked_fill(unused[part], -1.0)
            if pattern is not None:
                dropped[:, part] = lowest_of_groups(scores, pattern)
            else:
                count = count_of(rows * part.stop, share) - int(dropped.sum())  # exact over the matrix, whatever the blocks
                dropped[:, part] = lowest(scores.flatten(), count).view(scores.shape)
        return rest[:, 0].masked_fill(dropped[:, column], 0.0)

    return compensated(wide(weight), factor, choose, edges_of(columns, block)).to(weight.dtype)


def stored_bytes(weights: int, kept: int, pattern: Pattern | None = None) -> int:
    """Of a matrix of 16-bit weights: those kept, and where they stand: a bit a weight, or log2 m (2) bits a weight kept."""
    where = weights if pattern is None else kept * (pattern[1] - 1).bit_length()
    return 2 * kept + -(-where // 8)
