"""Matrices rounded to integers: to the nearest, by GPTQ, and what AWQ decides before rounding to the nearest.

Legend: M outputs, K inputs, G groups of a row, R rows of scales: M, or 1 where the whole matrix has one. A grid reaches from the
least to the greatest weight of a group, 0 included, and has a step (scale) and an integer zero; a symmetric one reaches as far to
one side as to the other. Scales are kept in the weight's dtype, and rounded to it before anything is rounded to them.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.compress.compensation import BLOCK, compensated, edges_of, inverse_factor, output_error
from posttrain.models.integers import WHOLE_ROW, Integers
from posttrain.models.products import wide

Group = int | Literal["channel", "tensor"]
"""Consecutive inputs that share a scale: so many; all of a row; all of the matrix."""
RATIOS = 20
SHRINKS = 20


def width_of(group: Group, columns: int) -> int:
    return group if isinstance(group, int) else columns


def grid(
    weight: Float[Tensor, "M K"], bits: int, group: Group, symmetric: bool, shrink: Tensor | float = 1.0
) -> tuple[Float[Tensor, "R G"], Float[Tensor, "R G"]]:
    """(scale, zero) of each group. shrink [R, G]: the share of the range that the grid reaches; what lies beyond is cut off.

    asymmetric: scale = (max - min) / (2^bits - 1), zero = round(-min / scale); symmetric: scale = max |w| / (2^(bits - 1) - 1).
    """
    if group == "tensor":
        weight = weight.reshape(1, -1)
    width = width_of(group, weight.shape[1])
    groups = F.pad(wide(weight), (0, -weight.shape[1] % width)).unflatten(1, (-1, width))  # a zero changes no group's range
    low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
    reach = torch.maximum(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    scale = reach.to(weight.dtype)
    scale = torch.where(scale > 0, scale, 1.0)
    if symmetric:
        return scale, torch.full_like(reach, 2 ** (bits - 1))
    return scale, (-low / wide(scale)).round().clamp(0, 2**bits - 1)


def coded(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, half to even, as numbers; scale and zero of each weight."""
    return ((weight / wide(scale)).round() + zero).clamp(0, 2**bits - 1)


def integers(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: Group, symmetric: bool) -> Integers:
    size = group if isinstance(group, int) else WHOLE_ROW
    return Integers(codes.to(torch.uint8), scale, None if symmetric else zero.to(torch.uint8), bits, size)


def nearest(
    weight: Float[Tensor, "M K"], bits: int = 4, group: Group = 128, symmetric: bool = True, shrink: Tensor | float = 1.0
) -> Integers:
    """Each weight to the nearest point of its group's grid: off by at most half a step in float32, where nothing is cut off.

    Of 16-bit weights a little more: their scales are rounded too."""
    scale, zero = grid(weight, bits, group, symmetric, shrink)
    width, columns = width_of(group, weight.shape[1]), weight.shape[1]
    step, middle = (part.repeat_interleave(width, 1)[:, :columns] for part in (scale, zero))
    return integers(coded(wide(weight), step, middle, bits), scale, zero, bits, group, symmetric)


def gptq(
    weight: Float[Tensor, "M K"],
    hessian: Float[Tensor, "K K"],
    bits: int = 4,
    group: Group = 128,
    symmetric: bool = True,
    damp: float = 0.01,
    order: bool = False,
    block: int = BLOCK,
) -> Integers:
    """Column after column to the nearest point, and what that loses made good by the columns after it; arXiv 2210.17323.

    A group's grid is that of its weights as they are when its first column comes. order: the columns of the largest inputs first;
    grids are then those of the weights as they were. Weights on inputs that are always 0 become 0.
    """
    columns = weight.shape[1]
    width = width_of(group, columns)
    values = wide(weight).masked_fill(hessian.diagonal() == 0, 0.0)
    at = hessian.diagonal().argsort(descending=True, stable=True) if order else torch.arange(columns, device=weight.device)
    places = at.tolist()
    scale, zero = grid(values.to(weight.dtype), bits, group, symmetric)
    codes = torch.empty_like(values)

    def choose(column: int, rest: Tensor) -> Tensor:
        place = places[column]
        mine = slice(place // width, place // width + 1)
        if not order and group != "tensor" and column % width == 0:
            scale[:, mine], zero[:, mine] = grid(rest[:, :width].to(weight.dtype), bits, "channel", symmetric)
        code = coded(rest[:, :1], scale[:, mine], zero[:, mine], bits)
        codes[:, place] = code[:, 0]
        return ((code - zero[:, mine]) * wide(scale[:, mine]))[:, 0]

    factor = inverse_factor(hessian[at][:, at], damp)
    compensated(values[:, at], factor, choose, edges_of(columns, block, None if order else width))
    return integers(codes, scale, zero, bits, group, symmetric)


def awq_scale(
    weights: Sequence[Float[Tensor, "_M K"]],
    absolute: Float[Tensor, " K"],
    hessian: Float[Tensor, "K K"],
    bits: int = 4,
    group: Group = 128,
    symmetric: bool = False,
) -> Float[Tensor, " K"]:
    """What each input is divided by, and its column in the layers that read it multiplied by, before they are rounded.

    s = (mean |x|)^ratio / sqrt(max s * min s), of 20 ratios from 0 (no scale) that with which the outputs change least; arXiv
    2306.00978. absolute: mean |x|.
    """
    best, least = torch.ones_like(absolute), float("inf")
    for step in range(RATIOS):
        scale = wide(absolute).clamp(min=1e-4) ** (step / RATIOS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight in weights:
            rounded = nearest((wide(weight) * scale).to(weight.dtype), bits, group, symmetric).dense()
            error += output_error(wide(rounded) / scale - wide(weight), hessian)
        if error < least:
            best, least = scale, error
    return best


def awq_shrink(
    weight: Float[Tensor, "M K"], hessian: Float[Tensor, "K K"], bits: int = 4, group: Group = 128, symmetric: bool = False
) -> Float[Tensor, "M G"]:
    """The share of its range, 1 to a half in 20 steps, that each group's grid should reach, so that its part of the output
    changes least; arXiv 2306.00978."""
    if group == "tensor":
        return torch.ones(1, 1, dtype=wide(weight).dtype, device=weight.device)
    width, columns = width_of(group, weight.shape[1]), weight.shape[1]
    found = []
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        own, moments = weight[:, part], hessian[part, part].to(wide(weight).dtype)
        errors = []
        for step in range(SHRINKS + 1):
            change = wide(nearest(own, bits, "channel", symmetric, 1 - 0.5 * step / SHRINKS).dense()) - wide(own)
            errors.append(((change @ moments) * change).sum(1))
        found.append(1 - 0.5 * torch.stack(errors).argmin(0) / SHRINKS)
    return torch.stack(found, 1)
