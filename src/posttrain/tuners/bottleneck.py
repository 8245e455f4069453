"""The network of an adapter, hung onto a layer that stays what and where it is."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from posttrain.models.heads import head_parameters
from posttrain.models.senses import of_text

NAME = "adapter"  # of the submodule that an adapted layer has


class Bottleneck(nn.Module):
    """x -> W_up f(W_down x + b_down) + b_up; added to what a layer gives, computed from that or (parallel) from its input."""

    def __init__(self, width: int, size: int, activation: str, deviation: float, scale: float, parallel: bool) -> None:
        super().__init__()
        self.down, self.down_bias = nn.Parameter(torch.empty(size, width)), nn.Parameter(torch.zeros(size))
        self.up, self.up_bias = nn.Parameter(torch.empty(width, size)), nn.Parameter(torch.zeros(width))
        for matrix in (self.down, self.up):
            nn.init.trunc_normal_(matrix, std=deviation, a=-2 * deviation, b=2 * deviation)
        self.act, self.scale, self.parallel, self.active = ACT2FN[activation], scale, parallel, True

    def forward(self, states: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        small = nn.functional.linear(states, self.down.to(states.dtype), self.down_bias.to(states.dtype))
        return self.scale * nn.functional.linear(self.act(small), self.up.to(states.dtype), self.up_bias.to(states.dtype))

    def attach(self, host: nn.Module) -> None:
        """Hangs it onto a layer. The hook asks the layer for its adapter, so that a copied model has adapters of its own."""
        host.add_module(NAME, self)
        host.register_forward_hook(_adapted)


def _adapted(host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    adapter = host.get_submodule(NAME)
    assert isinstance(adapter, Bottleneck)
    if not adapter.active:
        return output
    return output + adapter(inputs[0] if adapter.parallel else output).to(output.dtype)


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """A model's adapters by the paths of their layers."""
    return {name.rpartition(".")[0]: each for name, each in model.named_modules() if isinstance(each, Bottleneck)}


def norm_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Scales and shifts of all normalisations, by name; those of a head are trained with it."""
    head, reads = head_parameters(model), of_text(model)
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if f"{path}.{name}" not in head and reads(path)
    }
