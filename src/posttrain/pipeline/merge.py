"""The stage that folds adapters into the model that they stand on."""

from typing import Self

from pydantic import Field, model_validator

from posttrain.component import Settings
from posttrain.errors import InputError, ModelError
from posttrain.models.source import ModelSource
from posttrain.pipeline.libraries import heavy_imports
from posttrain.pipeline.stage import Context, Metrics, Stage
from posttrain.tuners.merge import codes_of
from posttrain.tuners.mix import Method, Mix


class Part(Settings):
    """An adapter, and how much of it."""

    model: ModelSource
    """An adapter folder, or a stage's (`{stage: sft}`): what its tuner learned alone."""
    weight: float | None = None
    """What the adapter's update is multiplied by; of several adapters each has one."""


class Merge(Stage, kind="merge"):
    """Folds adapters into the model that they stand on: one as it is, several LoRAs of one model by weight, TIES or DARE."""

    makes_model = True

    adapters: list[Part] = Field(min_length=1)
    """One, or several."""
    method: Method = "linear"
    """linear: the weighted sum of their updates. ties (arXiv 2306.01708): of each the largest, of these those whose sign their
    sum has, averaged. dare_linear, dare_ties (2311.03099): of each any, drawn and scaled up; summed, or as ties.
    magnitude_prune: of each the largest, summed."""
    density: float | None = Field(default=None, gt=0, le=1)
    """The share of each update that all methods but linear keep."""
    dequantize: bool = False
    """Of adapters that were learned on quantised weights: fold them into those that the codes stand for."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if len(self.adapters) == 1 and self.adapters[0].weight is None:
            if (self.method, self.density) != ("linear", None):
                raise ValueError("method and density are of several adapters; one is folded in as it is: remove them")
            return self
        if any(each.weight is None for each in self.adapters):
            raise ValueError("several adapters are merged by weight: give each one, such as weight: 0.5")
        try:
            self._mix([each.model for each in self.adapters], 0).check_settings()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def _mix(self, sources: list[ModelSource], seed: int) -> Mix:
        return Mix(sources, [each.weight or 0.0 for each in self.adapters], self.method, self.density, seed)

    def check(self) -> None:
        for each in self.adapters:
            each.model.check()

    def run(self, context: Context) -> Metrics:
        import shutil

        with heavy_imports():
            from posttrain.compress.export import merge, merge_several

        sources = [_adapter_of(each.model, context) for each in self.adapters]
        out = context.folder / "model"
        shutil.rmtree(out, ignore_errors=True)  # of a run that ended just after it was written
        alone = len(sources) == 1 and self.adapters[0].weight is None
        if alone and sources[0].below() is None:
            raise ModelError(f"{sources[0].path}: is a whole model and no adapter (of tuner full?), so there is nothing to merge")
        codes = codes_of(sources[0], self.dequantize)
        mix = self._mix(sources, context.seed)
        written = merge(sources[0], out, codes=codes) if alone else merge_several(mix, out, codes=codes)
        for line in written.lines():
            context.say(line)
        return {"metrics": {}, "written": written.as_dict()}


def _adapter_of(source: ModelSource, context: Context) -> ModelSource:
    """A stage's adapter lies beside its merged model, or is its model."""
    if source.stage is None:
        return source
    beside = context.stages[source.stage] / "adapter"
    return source.model_copy(update={"stage": None, "path": str(beside if beside.is_dir() else beside.parent / "model")})
