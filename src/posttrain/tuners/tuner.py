"""Tuners: which parameters move. A tuner is installed into a transformers model; it knows nothing of losses, data or sampling."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

from posttrain.component import Component
from posttrain.errors import ModelError, RecipeError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from posttrain.batch import Sequences
    from posttrain.models.backbone import Backbone
    from posttrain.models.source import ModelSource


class Tuner(Component):
    """Which parameters move, and how the result is stored."""

    default_kind = "full"
    merges: ClassVar[bool] = True
    """Whether the result can be folded into the model's own weights. If not, a stage's model is an adapter folder."""
    stores: ClassVar[bool] = True
    """Whether what it learns is a file of its own, smaller than the model."""
    kept_apart: ClassVar[bool] = False
    """Whether a stage's model is an adapter folder although the result could be folded in: its point is to be small."""
    begins_apart: ClassVar[bool] = False
    """Whether the model is another as soon as the tuner is there, before anything is learned."""
    peft_type: ClassVar[str | None] = None
    """What peft calls it, for tuners whose files are peft's."""
    learning_rates: ClassVar[tuple[float, float, float]] = (1e-6, 2e-5, 3e-4)
    """The lowest that is usual, the one that is taken where none is given, and the highest that is usual."""

    @property
    def reversible(self) -> bool:
        """Whether switching the tuner off gives back the model that it was installed into."""
        return False

    @property
    def changes_weights(self) -> bool:
        """Whether it changes matrices of the model's own, which must be numbers then, and not codes of a few bits."""
        return False

    @property
    def reads_rows(self) -> bool:
        """Whether it begins from what the model makes of rows: `observe` and `begin` then follow `install`."""
        return False

    @property
    def folds_in(self) -> bool:
        """Whether a stage folds the result into its model."""
        return self.merges and not self.kept_apart

    def check(self, model: "ModelSource") -> None:
        """Raises InputError for what cannot stand on this model, before weights are read."""

    def install(self, model: "PreTrainedModel") -> None:
        """Adds what the tuner needs and leaves `requires_grad` on exactly what it trains. Draws come from torch's generator.

        Raises RecipeError where the tuner does not fit the architecture.
        """
        raise NotImplementedError

    def observe(self, lm: "Backbone", rows: "Sequences") -> "dict[str, Tensor]":
        """What it wants to know of the model's inner states on some rows. Only for tuners that read rows."""
        raise NotImplementedError

    def begin(self, model: "PreTrainedModel", found: "Mapping[str, Tensor]") -> None:
        """Begins from what `observe` found. The parameters that it trains may be others afterwards."""
        raise NotImplementedError

    def merge(self, model: "PreTrainedModel") -> None:
        """Folds the tuner into the model's own weights, for good. Only for tuners that merge."""
        raise NotImplementedError

    @contextmanager
    def switched_off(self, model: "PreTrainedModel") -> Iterator[None]:
        """Within it the model is what it was before the tuner was installed. Only for reversible tuners."""
        raise NotImplementedError
        yield

    def stepped(self, parameters: "Mapping[str, nn.Parameter]") -> None:
        """Called after every optimizer step with what moves."""

    def state(self, model: "PreTrainedModel") -> "dict[str, Tensor]":
        """What an adapter's file holds, under the names that it has there: the model's own tensors, not copies. Empty for tuners
        that have no such file."""
        return {}

    def restore(self, model: "PreTrainedModel", state: "Mapping[str, Tensor]") -> None:
        """Puts back what `state` gave, into a model with the tuner in it. Raises ModelError where it does not fit."""
        import torch

        places = self.state(model)
        refuse_misfit(state, {name: each.shape for name, each in places.items()})
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(state[name])

    def install_stored(self, model: "PreTrainedModel", state: "Mapping[str, Tensor]") -> None:
        """`install` with what an adapter's file holds. Raises ModelError where it does not fit."""
        self.install(model)
        self.restore(model, state)

    def header(self, model: "PreTrainedModel", base: "Mapping[str, Any]") -> dict[str, str] | None:
        """What the file says of itself, for those that are used without their folder. base: what the folder says of the model
        below: its `base` and the hash of its `weights`."""
        return None

    def peft_config(self, model: "PreTrainedModel") -> "PeftConfig | None":
        """What peft needs to load the file; None where peft does not know such a tuner."""
        return None

    def paces(self, names: list[str]) -> dict[str, tuple[float, float]]:
        """{parameter: (its share of the learning rate, the share of the run after which it moves)}, where not (1, 0)."""
        return {}

    @classmethod
    def from_peft(cls, config: "Mapping[str, Any]") -> Self:
        """The tuner of a configuration file of peft's. Raises ModelError for what only peft can do."""
        raise NotImplementedError


def tuned(model: "nn.Module") -> "dict[str, nn.Parameter]":
    """The parameters that move, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def refuse_quantized(tuner: Tuner, whose: str) -> None:
    """Raises RecipeError for a tuner that changes weights which are codes; to be called where they are."""
    if tuner.changes_weights:
        raise RecipeError(
            f"tuner {tuner.kind}: would change the weights of {whose}, which are quantised and stay as they are; take one that "
            "learns beside them, such as lora with init: kaiming, or a model that is not quantised"
        )


def in_dtype_of(model: "PreTrainedModel") -> "torch.dtype":
    """What a tuner's own parameters are kept in: float32, or wider where the model is."""
    import torch

    return torch.promote_types(model.dtype, torch.float32)


def refuse_misfit(state: "Mapping[str, Tensor]", wanted: "Mapping[str, tuple[int, ...]]") -> None:
    """Raises ModelError where an adapter's tensors are not, by names and shapes, those that a model has places for."""
    for name, shape in wanted.items():
        if name not in state:
            raise ModelError(f"the adapter lacks {name}: it was made for another model, or its file is not whole")
        if state[name].shape != shape:
            raise ModelError(
                f"{name} is {tuple(state[name].shape)} in the adapter and {tuple(shape)} in the model: made for another model"
            )
    if odd := sorted(set(state) - set(wanted)):
        raise ModelError(f"the adapter holds {odd[0]}, which this model has no place for: it was made for another model")
