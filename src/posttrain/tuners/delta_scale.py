"""The scales of a difference from the base: one number a matrix moves, its signs stay."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import PositiveInt, model_validator

from posttrain.errors import ModelError, RecipeError
from posttrain.models.source import ModelSource, is_adapter, refuse_other_tokens
from posttrain.tuners.injected import layers_of
from posttrain.tuners.tuner import Tuner, refuse_misfit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from posttrain.models.delta import Delta

NAME = "tuned"  # of the difference in the model


class DeltaScale(Tuner, kind="delta_scale"):
    """The stage's model with a fine-tuned one's difference from it in one bit a weight; its scales move. arXiv 2402.10193.

    W + scale * S for each matrix of the blocks, S the signs of the difference; embeddings, head, norms and biases are the
    fine-tuned model's, in 16 bits. One parameter a matrix. With objective match_logits it is BitDelta's scale distillation.
    """

    kept_apart = True
    begins_apart = True
    learning_rates = (1e-5, 1e-4, 1e-2)
    of: ModelSource | None = None
    """The fine-tuned model. Without it, the scales of a model that has such a difference already are trained on."""
    form: Literal["signs", "low_rank"] = "signs"
    """low_rank: scale * U V in the place of scale * S, the nearest such matrix, in 16 bits: for comparison."""
    rank: PositiveInt | None = None
    """Of low_rank; by default the largest that takes no more bits than signs, at least 1."""

    @model_validator(mode="after")
    def _rank_is_used(self) -> Self:
        if self.rank is not None and self.form != "low_rank":
            raise ValueError("rank is of form: low_rank, and signs have none; remove it")
        return self

    @property
    def reversible(self) -> bool:
        return self.of is not None

    def check(self, model: ModelSource) -> None:
        from posttrain.tuners.below import folds

        if self.of is None:
            if model.path is not None and not ((folder := model.folder()) is not None and is_adapter(folder)):
                raise RecipeError(f"tuner.of: {model.path} has no delta whose scales could move; name a fine-tuned model")
            return
        if model.is_quantized():
            raise RecipeError(f"tuner.of: {model.path} is quantised, and a delta is a difference of weights; remove `quantize`")
        self.of.check()
        refuse_other_tokens("tuner.of", self.of, model)
        if self.of.path is not None and not folds(self.of):
            raise RecipeError(f"tuner.of: {self.of.path} cannot be folded into weights, and a delta is a difference of weights")

    def install(self, model: "PreTrainedModel") -> None:
        from posttrain.models import delta
        from posttrain.models.quantized import quantized
        from posttrain.tuners.load import load_weights

        found = delta.active(model)
        if self.of is None and found is None:
            raise RecipeError("tuner.of: this model has no delta whose scales could move; name a fine-tuned model")
        if self.of is not None:
            if quantized(model):
                raise RecipeError("tuner.of: this model is quantised, and a delta is a difference of weights; take it as it was")
            if found is not None or layers_of(model):
                kept = "a delta" if found is not None else "adapters"
                raise RecipeError(
                    f"tuner.of: this model has {kept} in it, and a delta is a difference of weights; leave out `of` to go on "
                    "with a delta, or take a model whose adapters are merged"
                )
            fine = load_weights(self.of, model)
            try:
                found = delta.Delta.between(model, fine, self._form)
            except ModelError as error:
                raise ModelError(f"tuner.of: {self.of.path}: {error}") from None
            delta.add(model, found, NAME)
            delta.switch(model, NAME)
        assert found is not None
        model.requires_grad_(False)
        for scale in found.scales.values():
            scale.requires_grad_(True)

    def _form(self, difference: "Tensor") -> Any:
        from posttrain.models.delta import LowRank, Signs

        return Signs.of(difference) if self.form == "signs" else LowRank.of(difference, self.rank)

    def install_stored(self, model: "PreTrainedModel", state: "Mapping[str, Tensor]") -> None:
        """The fine-tuned model is not asked again."""
        from posttrain.models import delta

        if self.of is None:
            super().install_stored(model, state)
            return
        delta.add(model, delta.Delta.of_tensors(state, model), NAME)
        delta.switch(model, NAME)

    def merge(self, model: "PreTrainedModel") -> None:
        from posttrain.models import delta

        delta.merge(model)

    @contextmanager
    def switched_off(self, model: "PreTrainedModel") -> Iterator[None]:
        from posttrain.models import delta

        with delta.switched(model, None):
            yield

    def state(self, model: "PreTrainedModel") -> "dict[str, Tensor]":
        """The whole difference; the scales alone where it is that of the model below."""
        found = self._delta(model)
        return {name: each.detach() for name, each in (found.tensors() if self.of is not None else found.scales).items()}

    def restore(self, model: "PreTrainedModel", state: "Mapping[str, Tensor]") -> None:
        import torch

        from posttrain.models import delta

        places = self.state(model)
        refuse_misfit(state, {name: each.shape for name, each in places.items()})
        with torch.no_grad(), delta.switched(model, None):  # what is kept whole is read when it is switched on
            for name, place in places.items():
                place.copy_(state[name])

    def header(self, model: "PreTrainedModel", base: Mapping[str, Any]) -> dict[str, str] | None:
        from posttrain.models.delta_file import header

        return None if self.of is None else header(self._delta(model), model, base)

    def _delta(self, model: "PreTrainedModel") -> "Delta":
        from posttrain.models import delta

        found = delta.active(model)
        assert found is not None, "installed first"
        return found
