"""Where the scale of a layer's inputs can be folded into what comes before it, so that the block computes what it did.

A norm before the layers that read it; the gated half of a feed-forward layer (up) before what leads out of it (down); values
before the output of attention, where each value reaches one place of it. Nothing is believed of an architecture: each is
tried with a scale, and kept where the block's output stays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posttrain.batch import Sequences
from posttrain.compress.blocks import Block
from posttrain.compress.calibration import forward_to
from posttrain.models.linears import matrix_of, put
from posttrain.models.lm import LM

SAME = 1e-4
AFTER = {"up_proj": "down_proj", "v_proj": "o_proj"}
Rule = Callable[[nn.Module, Tensor], None]


@dataclass(frozen=True)
class Fold:
    """A module whose outputs can be divided by a scale, the layers that read them, and how it is divided."""

    source: nn.Module
    readers: dict[str, nn.Module]
    divide: Rule

    def fold(self, scale: Float[Tensor, " K"]) -> None:
        """Divides what the readers are given by the scale, and multiplies their columns by it."""
        with torch.no_grad():
            self.divide(self.source, scale)
            for layer in self.readers.values():
                matrix = matrix_of(layer)
                put(layer, matrix * scale.to(matrix.dtype))


def folds_of(lm: LM, block: Block, rows: Sequences) -> list[Fold]:
    """Those of a block that leave its output as it is, found on a few rows."""
    return [fold for fold in _candidates(lm, block, rows) if _holds(lm, block, rows, fold)]


def _plain(norm: nn.Module, scale: Tensor) -> None:
    for parameter in norm.parameters(recurse=False):
        parameter.div_(scale.to(parameter.dtype))


def _around_one(norm: nn.Module, scale: Tensor) -> None:
    """Gemma's norms multiply by 1 + weight."""
    weight = norm.get_parameter("weight")
    weight.copy_((1 + weight) / scale.to(weight.dtype) - 1)


def _rows(layer: nn.Module, scale: Tensor) -> None:
    matrix = matrix_of(layer)
    put(layer, matrix / scale.to(matrix.dtype)[:, None])
    bias = dict(layer.named_parameters(recurse=False)).get("bias")
    if bias is not None:
        bias.div_(scale.to(bias.dtype))


def _candidates(lm: LM, block: Block, rows: Sequences) -> list[Fold]:
    """Norms whose output a layer is given as it is, and layers whose outputs the names of others say that they read."""
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    norms = {
        path: module
        for path, module in block.module.named_modules()
        if not list(module.children()) and [each.ndim for each in module.parameters()] in ([1], [1, 1])
    }

    def read(path: str) -> Callable[..., None]:
        return lambda _module, inputs: given.__setitem__(path, inputs[0])

    def wrote(path: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: made.__setitem__(path, output)

    hooks = [layer.register_forward_pre_hook(read(path)) for path, layer in block.layers.items()]
    hooks += [norm.register_forward_hook(wrote(path)) for path, norm in norms.items()]
    try:
        forward_to(lm, rows, block)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for path, norm in norms.items():
        readers = {name: layer for name, layer in block.layers.items() if given.get(name) is made.get(path, 0)}
        if readers:
            found += [Fold(norm, readers, rule) for rule in (_plain, _around_one)]
    for path, layer in block.layers.items():
        parent, _, name = path.rpartition(".")
        reader = f"{parent}.{AFTER.get(name)}"
        if reader in block.layers and matrix_of(layer).shape[0] == matrix_of(block.layers[reader]).shape[1]:
            found.append(Fold(layer, {reader: block.layers[reader]}, _rows))
    return found


def _holds(lm: LM, block: Block, rows: Sequences, fold: Fold) -> bool:
    touched = [*fold.source.parameters(recurse=False), *(layer.get_parameter("weight") for layer in fold.readers.values())]
    before = [each.detach().clone() for each in touched]
    expected = _output(lm, block, rows)
    columns = matrix_of(next(iter(fold.readers.values()))).shape[1]
    scale = 2.0 ** (torch.arange(columns, device=expected.device) % 3 - 1)  # powers of two round nothing
    fold.fold(scale)
    gap = (_output(lm, block, rows) - expected).norm() / expected.norm().clamp(min=1e-12)
    with torch.no_grad():
        for parameter, value in zip(touched, before, strict=True):
            parameter.copy_(value)
    return bool(gap < SAME)


def _output(lm: LM, block: Block, rows: Sequences) -> Tensor:
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).flatten(0, -2).double())

    hook = block.module.register_forward_hook(keep)
    try:
        forward_to(lm, rows, block)
    finally:
        hook.remove()
    return torch.cat(found)
