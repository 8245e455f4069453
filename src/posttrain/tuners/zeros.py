"""Zeros that stay: what pruning has left out is not trained back in."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.errors import RecipeError
from posttrain.tuners.places import BLOCK, linears

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

MASK = "zeros"  # the attribute of a parameter that says which of its weights stay 0


def hold_zeros(model: "PreTrainedModel") -> None:
    """Whatever moves in the linear layers of the blocks and is 0 now gets no gradient, and `put_back` keeps it 0.

    Raises RecipeError where nothing is.
    """
    held = 0
    for path, layer in linears(model).items():
        host: Any = getattr(layer, "base_layer", layer)
        weight = host.weight
        if not BLOCK.search(path) or not weight.requires_grad:
            continue
        zeros = weight.detach() == 0
        if not bool(zeros.any()):
            continue
        held += 1
        setattr(weight, MASK, zeros)
        weight.register_hook(_without(zeros))
    if not held:
        raise RecipeError(
            "tuner.keep_zeros: no weight of a block's linear layers that moves is 0; train a pruned model, or remove keep_zeros"
        )


def _without(zeros: "Tensor") -> "Callable[[Tensor], Tensor]":
    return lambda gradient: gradient.masked_fill(zeros, 0)


def put_back(parameters: "Mapping[str, nn.Parameter]") -> None:
    """Sets to 0 again what an optimizer has moved without a gradient."""
    for parameter in parameters.values():
        zeros = getattr(parameter, MASK, None)
        if zeros is not None:
            parameter.data.masked_fill_(zeros, 0)
