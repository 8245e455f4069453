"""Tuners: which parameters move. A tuner is installed into a transformers model; it knows nothing of losses, data or sampling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from posttrain.component import Component

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel


class Tuner(Component):
    """Which parameters move, and how the result is stored."""

    default_kind = "full"
    reversible: ClassVar[bool] = False
    """Whether switching the tuner off gives back the model that it was installed into."""

    def install(self, model: "PreTrainedModel") -> None:
        """Adds what the tuner needs and leaves `requires_grad` on exactly what it trains. Draws come from torch's generator."""
        raise NotImplementedError

    def merge(self, model: "PreTrainedModel") -> None:
        """Folds the tuner into the model's own weights, for good."""
        raise NotImplementedError

    def save_adapter(self, model: "PreTrainedModel", folder: "Path", base: str) -> None:
        """Writes what was trained alone, where the tuner has a format for it."""

    @contextmanager
    def switched_off(self, model: "PreTrainedModel") -> Iterator[None]:
        """Within it the model is what it was before the tuner was installed. Only for reversible tuners."""
        raise NotImplementedError
        yield


def tuned(model: "nn.Module") -> "dict[str, nn.Parameter]":
    """The parameters that move, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Full(Tuner, kind="full"):
    """Every parameter moves."""

    def install(self, model: "PreTrainedModel") -> None:
        model.requires_grad_(True)

    def merge(self, model: "PreTrainedModel") -> None:
        """Nothing to fold: the weights are the model's own."""
