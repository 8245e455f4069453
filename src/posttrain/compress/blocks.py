"""The blocks of a model and the linear layers in them, which are what is made smaller; never embeddings, norms or heads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from posttrain.component import did_you_mean
from posttrain.errors import RecipeError
from posttrain.models.linears import matrix_of
from posttrain.tuners.places import BLOCK, linears


@dataclass(frozen=True)
class Block:
    """A block of a transformer, and its linear layers by path."""

    path: str
    module: nn.Module
    layers: dict[str, nn.Module]


def blocks_of(model: PreTrainedModel, targets: Sequence[str] = ("*",)) -> list[Block]:
    """From the first block to the last, those that have a linear layer whose path or last name matches one of the patterns.

    Raises RecipeError where a pattern matches none.
    """
    inside = {path: layer for path, layer in linears(model).items() if BLOCK.search(path)}
    for pattern in targets:
        if not any(_matches(path, pattern) for path in inside):
            names = sorted({path.rpartition(".")[2] for path in inside})
            hint = did_you_mean(pattern, names)
            raise RecipeError(f"targets: no linear layer of a block of {type(model).__name__} matches {pattern!r}{hint}")
    found: dict[str, dict[str, nn.Module]] = {}
    for path, layer in inside.items():
        match = BLOCK.search(path)
        if match is not None and any(_matches(path, pattern) for pattern in targets):
            found.setdefault(path[: match.end(1)], {})[path] = layer
    return [Block(path, model.get_submodule(path), layers) for path, layers in found.items()]


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path.rpartition(".")[2], pattern)


def refuse_odd_inputs(blocks: Sequence[Block], size: int, setting: str, instead: str = "") -> None:
    """Raises RecipeError where a layer's inputs cannot be divided into groups of `size`."""
    odd = {path: matrix_of(layer).shape[1] for block in blocks for path, layer in block.layers.items()}
    odd = {path: inputs for path, inputs in odd.items() if inputs % size}
    if odd:
        path = next(iter(odd))
        fits = math.gcd(*(matrix_of(layer).shape[1] for block in blocks for layer in block.layers.values()))
        raise RecipeError(
            f"{setting}: the {odd[path]} inputs of {path} cannot be divided into groups of {size}; take a divisor of {fits}, "
            f"{instead}or leave such layers out with `targets`"
        )
