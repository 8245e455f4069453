"""The sections of a training stage that say how long, how much at a time, and what is kept."""

from typing import Any, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from posttrain.component import Settings
from posttrain.data.dataset import Data
from posttrain.data.format import detect
from posttrain.errors import RecipeError
from posttrain.evaluation import Evaluation
from posttrain.models.source import ModelSource
from posttrain.objectives import Objective, OnPolicy
from posttrain.rl import Rollout
from posttrain.sampling import InProcess, Sampler
from posttrain.tasks import Task
from posttrain.training.optim import AdamW, Optimizer
from posttrain.tuners import Full, Tuner

HELD_OUT = frozenset({"Conversation", "Completion", "Text"})  # rows whose loss can be measured beside an objective that samples


class Batch(Settings):
    """How much goes into an update, and into memory at a time."""

    rows: PositiveInt = 32
    """Rows of an update (data; what is sampled is sized by `rollout`)."""
    micro_tokens: PositiveInt | None = None
    """Tokens computed at a time: null takes 1024 on a CPU, 16384 on a GPU. Changes memory and speed, never the result."""

    def at_a_time(self, device: str) -> int:
        """The tokens computed at a time on a type of device."""
        return self.micro_tokens or (1024 if device == "cpu" else 16384)


class Checkpoints(Settings):
    """When the state of the run is saved, and how many saves are kept."""

    every: PositiveInt = 50
    """Updates between checkpoints; the last update is always saved."""
    keep: PositiveInt = 2
    """How many are kept."""


class Validation(Settings):
    """Evaluation while training, and the choice of the best weights."""

    task: Task | None = None
    """Problems to answer."""
    data: Data | None = None
    """Rows whose loss is measured (metric `nll`)."""
    every: PositiveInt = 50
    """Updates between validations; the last update is always validated."""
    evaluation: Evaluation = Evaluation(samples=4, greedy=False)
    """How the task is evaluated."""
    best: str | None = None
    """The metric by which the best weights are chosen: pass@1, greedy, score, ... (higher is better) or nll (lower)."""
    patience: PositiveInt | None = None
    """Stop after so many validations without a new best."""


class Seconds(Settings):
    """A training time: a number of seconds, or as many as another stage took (`{stage: grpo}`)."""

    of: PositiveFloat | None = None
    """The seconds."""
    stage: str | None = None
    """The stage whose seconds are meant."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"of": value} if isinstance(value, int | float | str) else value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.of is None) == (self.stage is None):
            raise ValueError("give a number of seconds, or `stage`")
        return self


class TrainSettings(Settings):
    """Everything that a training run is made of."""

    model: ModelSource
    """What is trained."""
    objective: Objective
    """What signal moves the parameters."""
    tuner: Tuner = Full()
    """Which parameters move."""
    data: Data | None = None
    """What is learned from; for objectives that do not sample."""
    task: Task | None = None
    """Problems and their grader; for objectives that sample."""
    rollout: Rollout = Rollout()
    """How much is sampled; for objectives that sample."""
    sampler: Sampler = InProcess()
    """Where samples come from, in training and validation."""
    optim: Optimizer = AdamW()
    """The optimizer and its learning rate."""
    batch: Batch = Batch()
    """How much is learned from at a time."""
    steps: PositiveInt | None = None
    """How many updates. Or give `epochs` or `seconds`."""
    epochs: PositiveFloat | None = None
    """How often each row is seen."""
    seconds: Seconds | None = None
    """How long to train; the learning rate must then be constant."""
    validation: Validation = Validation()
    """Evaluation while training, and the choice of the best weights."""
    checkpoint: Checkpoints = Checkpoints()
    """When the state is saved."""

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        """Refuses sections that do not go together."""
        kind = self.objective.kind
        if isinstance(self.objective, OnPolicy):
            if self.task is None:
                raise ValueError(f"objective {kind} samples its own answers: it needs `task` (problems and a grader)")
            if self.data is not None:
                raise ValueError(f"objective {kind} samples its own answers and reads no `data`; remove that section")
            if self.batch.rows != Batch().rows:
                raise ValueError(f"batch.rows: objective {kind} is sized by `rollout` (problems, per_problem, minibatches)")
            if self.rollout.sampling.truncates:
                raise ValueError(
                    "rollout.sampling: top_k, top_p and min_p are for evaluation; an objective that samples needs the policy's "
                    "own distribution; remove them"
                )
            if self.rollout.sampling.temperature == 0:
                raise ValueError(
                    "rollout.sampling.temperature: 0 always gives the same answer; there is nothing to learn from it"
                )
        else:
            if self.data is None:
                raise ValueError(f"objective {kind} learns from data: add the section `data`")
            for section, given in {"task": self.task is not None, "rollout": self.rollout != Rollout()}.items():
                if given:
                    raise ValueError(f"objective {kind} learns from `data` and does not sample; remove the section `{section}`")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        lengths = [name for name in ("steps", "epochs", "seconds") if getattr(self, name) is not None]
        if len(lengths) != 1:
            raise ValueError(
                f"say how long to train with exactly one of steps, epochs, seconds (here: {', '.join(lengths) or 'none'})"
            )
        if self.epochs is not None and isinstance(self.objective, OnPolicy):
            raise ValueError(f"objective {self.objective.kind} samples without end: give `steps`, not epochs")
        if self.seconds is not None and (self.optim.schedule != "constant" or self.optim.warmup):
            raise ValueError("a run of a given time has no known end: set optim.schedule: constant and optim.warmup: 0")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        plan = self.validation
        known = []
        if plan.task is not None:
            known += ["pass@1", "score", "length", "ended"] if plan.evaluation.samples else []
            known += [f"pass@{plan.evaluation.samples}"] if plan.evaluation.samples > 1 else []
            known += ["greedy"] if plan.evaluation.greedy else []
        known += ["nll"] if plan.data is not None else []
        if plan.best is not None and plan.best not in known:
            found = f"measured are {', '.join(known)}" if known else "nothing is measured: add validation.task or validation.data"
            raise ValueError(f"validation.best: {plan.best!r} is not measured; {found}")
        if plan.patience is not None and plan.best is None:
            raise ValueError("validation.patience: needs validation.best, the metric that must improve")
        return self

    def check(self) -> None:
        """What can be refused before any weight is read: files, columns, rows that the objective cannot learn from."""
        self.model.check()
        self.optim.check(self.model)
        for data in (self.data, self.validation.data):
            if data is not None:
                data.check()
                self._check_rows(data)
        for task in (self.task, self.validation.task):
            if task is not None:
                task.check()

    def _check_rows(self, data: Data) -> None:
        for source in data.sources:
            first = source.first()
            if first is None:
                continue
            form = data.format or detect(first)
            if form.makes.isdisjoint(self.objective.rows or HELD_OUT):
                fitting = "pretrain" if form.kind == "text" else "sft"
                hint = f"; use objective {fitting}" if form.kind in {"text", "messages", "prompt_completion"} else ""
                raise RecipeError(
                    f"{first.where}: format {form.kind} gives nothing that objective {self.objective.kind} learns from{hint}"
                )
