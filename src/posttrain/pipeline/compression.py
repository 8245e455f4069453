"""Stages that make models smaller."""

from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from posttrain.data.dataset import Data
from posttrain.errors import RecipeError
from posttrain.models.source import ModelSource, refuse_other_tokens
from posttrain.objectives import MatchLogits
from posttrain.pipeline.libraries import heavy_imports
from posttrain.pipeline.signals import Interrupted
from posttrain.pipeline.smaller import refuse_no_text
from posttrain.pipeline.stage import Context, Metrics, Stage
from posttrain.training.optim import AdamW, Optimizer
from posttrain.training.settings import Batch, Checkpoints, TrainSettings
from posttrain.tuners import DeltaScale


class MakeDelta(Stage, kind="delta"):
    """A fine-tuned model as one bit a weight and one scale a matrix on top of its base; arXiv 2402.10193 (BitDelta).

    The scales begin as the mean of |difference|, the nearest, and are then distilled: on `data`, the logits are brought to the
    fine-tuned model's, and nothing but the scales moves. The stage's model is an adapter folder on the base; the file in it,
    adapter_model.safetensors, can be used alone (`posttrain chat BASE --delta`).
    """

    makes_model = True

    model: ModelSource
    """The fine-tuned model."""
    base: ModelSource
    """The model that it was fine-tuned from: of the same shapes, with the same tokenizer."""
    form: Literal["signs", "low_rank"] = "signs"
    """low_rank: the largest directions of each difference, in 16 bits, in the place of its signs; for comparison."""
    rank: PositiveInt | None = None
    """Of low_rank; by default the largest that takes no more bits than signs, at least 1."""
    data: Data | None = None
    """What scales are distilled on: text, conversations or completions. Without it they stay as they begin."""
    steps: PositiveInt = 200
    """Updates of the distillation."""
    batch: Batch = Batch(rows=4)
    """How much is learned from at a time."""
    optim: Optimizer = AdamW(learning_rate=1e-4)
    """The optimizer of the distillation and its learning rate."""
    checkpoint: Checkpoints = Checkpoints()
    """When the state of the distillation is saved."""
    measure: Data | None = None
    """Rows on which distances are measured; by default those of `data`, and where there are none, only sizes."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> "MakeDelta":
        self._tuner(self.model)  # refuses a rank of signs
        if self.data is None and (given := sorted(self.model_fields_set & {"steps", "batch", "optim", "checkpoint"})):
            raise ValueError(f"{given[0]} is of the distillation, which needs `data`; add that, or remove {given[0]}")
        return self

    def _tuner(self, fine: ModelSource) -> DeltaScale:
        return DeltaScale(of=fine, form=self.form, rank=self.rank)

    def _distillation(self) -> TrainSettings | None:
        """The training stage that it is."""
        if self.data is None:
            return None
        return TrainSettings(
            model=self.base, tuner=self._tuner(self.model), objective=MatchLogits(), teacher=self.model, data=self.data,
            steps=self.steps, batch=self.batch, optim=self.optim, checkpoint=self.checkpoint,
        )  # fmt: skip

    def check(self) -> None:
        self.model.check()
        self.base.check()
        for name, source in (("model", self.model), ("base", self.base)):
            if source.is_quantized():
                raise RecipeError(f"{name}: {source.path} is quantised, and a delta is of weights; name the model as it was")
        refuse_other_tokens("model", self.model, self.base)
        self._tuner(self.model).check(self.base)
        if (training := self._distillation()) is not None:
            training.check()
        if self.measure is not None:
            self.measure.check()
            refuse_no_text(self.measure, self.kind)

    def run(self, context: Context) -> Metrics:
        with heavy_imports():
            from posttrain.pipeline.deltas import keep_tokenizer, measured, speaks_as, stored
            from posttrain.training.session import Session, train

        asked = context.resolved(self)
        asked = asked.model_copy(update={"base": speaks_as(asked.model, asked.base, context.folder / "chat_template.jinja")})
        training, record = asked._distillation(), dict[str, Any]()
        if training is None:
            stored(asked._tuner(asked.model), asked.base, context.folder / "model")
        else:
            session = Session(
                context.folder, context.key, context.seed, None, context.show, context.say, context.interrupted
            )
            record = train(training, session)
            if "interrupted" in record:
                raise Interrupted(record["interrupted"])
        keep_tokenizer(asked.model, asked.base, context.folder / "model")
        return record | measured(
            asked._tuner(asked.model), asked.base, context.folder / "model", asked.measure or asked.data, training is not None,
            context.say,
        )  # fmt: skip
