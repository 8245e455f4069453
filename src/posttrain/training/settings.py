"""The sections of a training stage that say how long, how much at a time, and what is kept."""

import math
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from posttrain.component import Settings
from posttrain.data.dataset import Data
from posttrain.data.format import detect
from posttrain.errors import RecipeError
from posttrain.evaluation import Evaluation
from posttrain.models.source import ModelSource, refuse_other_tokens
from posttrain.objectives import Objective, OnPolicy, RewardObjective
from posttrain.rl import Rollout
from posttrain.sampling import InProcess, ProcessSampler, Sampler
from posttrain.tasks import Task
from posttrain.text import Row
from posttrain.training.optim import AdamW, Optimizer
from posttrain.tuners import Full, Tuner
from posttrain.tuners.below import folds
from posttrain.tuners.tuner import refuse_quantized

ANSWERED = frozenset({"Conversation", "Completion", "Preference", "Labelled", "Ranking"})
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
    """Rows that are measured: their `nll`, or the objective's `loss` and its own figures, such as `accuracy`."""
    every: PositiveInt = 50
    """Updates between validations; the last update is always validated."""
    evaluation: Evaluation = Evaluation(samples=4, greedy=False)
    """How the task is evaluated."""
    best: str | None = None
    """The metric by which the best weights are chosen: the highest pass@1, greedy, score, accuracy, ...; the lowest nll, loss."""
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


class Refresh(Settings):
    """A reference that follows the policy (TR-DPO, arXiv 2404.09656)."""

    every: PositiveInt = 512
    """Updates after which it moves."""
    mix: float = Field(default=0.6, gt=0, le=1)
    """How far: reference <- mix * policy + (1 - mix) * reference."""


class Reference(Settings):
    """What an objective compares the policy with. A string, or a mapping with `path` or `stage`, is its `model`."""

    model: ModelSource | None = None
    """By default the model that the stage starts from."""
    cache: bool = False
    """Ask the reference once about each row of the data, before training, and keep its answers beside the run: no reference is
    in memory while training, and stages with the same rows and reference share them."""
    refresh: Refresh | None = None
    """Let the reference follow the policy."""

    @model_validator(mode="before")
    @classmethod
    def _from_model(cls, value: Any) -> Any:
        names_model = isinstance(value, str) or (isinstance(value, dict) and {"path", "stage"} & set(value))
        return {"model": value} if names_model else value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.refresh is not None and self.cache:
            raise ValueError("a reference that follows the policy cannot be asked once; take cache or refresh")
        if self.refresh is not None and self.model is not None:
            raise ValueError("refresh moves the stage's own starting model, not another `model`; take one of them")
        return self


class Critic(Settings):
    """The model that foresees a policy's rewards."""

    model: ModelSource | None = None
    """What it begins from: a reward model, mostly (`{stage: reward}`); by default the stage's starting model with a new head."""
    shared: bool = False
    """A linear head on the policy's own states, in place of a model of its own."""
    tuner: Tuner = Full()
    """Which of its parameters move."""
    optim: Optimizer = AdamW()
    """Its optimizer and learning rate."""

    @model_validator(mode="after")
    def _shares_or_not(self) -> Self:
        if self.shared and (self.model is not None or self.tuner != Full()):
            raise ValueError("a shared critic is a head on the policy's states: it takes no `model` and no `tuner`")
        return self


class Normalise(Settings):
    """What a reward model's scores are brought to after training, stored with it. Comparisons never change."""

    data: Data | None = None
    """Reference answers, whose mean score becomes 0; by default the training data (of pairs the chosen side)."""
    unit_variance: bool = False
    """Whether their standard deviation becomes 1, too."""


class Mix(Settings):
    """What every update learns from beside the stage's own objective: PPO-ptx's pretraining text, say."""

    objective: Objective
    """What is done with it: `pretrain`, `sft`, ..."""
    data: Data
    """What it learns from."""
    rows: PositiveInt = 8
    """Rows in every update."""
    weight: PositiveFloat = 1.0
    """Weight of its loss (arXiv 2203.02155 takes 27.8 for pretraining text beside PPO)."""

    @model_validator(mode="after")
    def _learns_from_data(self) -> Self:
        if isinstance(self.objective, OnPolicy) or self.objective.scores or self.objective.needs:
            raise ValueError(f"objective {self.objective.kind} cannot be mixed in: take one that needs only data, such as sft")
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
    reference: Reference = Reference()
    """What the policy is compared with; for objectives that ask for one."""
    teacher: ModelSource | None = None
    """The model that is learned from; for objectives that need one, such as match_logits."""
    critic: Critic | None = None
    """For ppo, which needs it."""
    mix: Mix | None = None
    """What every update learns from beside."""
    normalise: Normalise | None = None
    """What scores are brought to after training; for reward models."""
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
            if isinstance(self.sampler, ProcessSampler) and "reference" in self.objective.also_samples:
                raise ValueError(f"sampler: process: objective {kind} also samples from the reference, which is the trainer's")
            if self.rollout.curriculum is not None and self.task.grader.open_scale:
                raise ValueError(
                    f"rollout.curriculum: grader {self.task.grader.kind} has scores of any size, and a rate is from 0 to 1; "
                    "leave it out"
                )
            self.objective.check_rollout(self.rollout.problems, self.rollout.per_problem)
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
    def _roles_fit(self) -> Self:
        """Refuses a role that the objective does not know, and the lack of one that it needs."""
        kind = self.objective.kind
        if "critic" in self.objective.trains and self.critic is None:
            raise ValueError(
                f"objective {kind} trains a critic: add the section `critic`, such as critic: {{model: {{stage: reward}}}} "
                "(its reward model), or critic: {shared: true}"
            )
        if self.critic is not None and "critic" not in self.objective.trains:
            raise ValueError(f"objective {kind} trains no critic; remove the section `critic`")
        if self.critic is not None and self.critic.tuner.reads_rows:
            raise ValueError("critic.tuner: init: eva is for the policy, which begins from the stage's rows; take another init")
        if "teacher" in self.objective.needs and self.teacher is None:
            raise ValueError(f"objective {kind} learns from another model: add `teacher`, a model of the same tokenizer")
        if self.teacher is not None and "teacher" not in self.objective.needs:
            raise ValueError(f"objective {kind} learns from no other model; remove the section `teacher`")
        if self.reference != Reference() and "reference" not in self.objective.needs:
            raise ValueError(f"objective {kind}, as it is set, compares with no reference; remove the section `reference`")
        if self.reference.cache and not self.objective.reference_per_row:
            raise ValueError(f"reference.cache: objective {kind} asks the reference about something else at every update")
        if self.reference.refresh is not None and self.tuner.begins_apart:
            raise ValueError(
                f"reference.refresh: the reference would follow from where the policy begins, and under tuner {self.tuner.kind} "
                "that is not the model that the stage starts from; remove `refresh`"
            )
        if self.normalise is not None and not isinstance(self.objective, RewardObjective):
            raise ValueError(f"objective {kind} trains no reward model; remove the section `normalise`")
        if self.normalise is not None and self.objective.reads == "Stepped":
            raise ValueError(f"objective {kind} scores steps by the log-odds that they are right; remove the section `normalise`")
        if self.objective.scores and (self.validation.task is not None or self.mix is not None):
            section = "mix" if self.mix is not None else "validation.task"
            raise ValueError(f"objective {kind} trains a model that scores and does not write; remove `{section}`")
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
        if self.seconds is not None and getattr(self.tuner, "unfreeze", False):
            raise ValueError("tuner.unfreeze: a run of a given time has no known end; set unfreeze: 0, or give steps or epochs")
        learning = {"optim": self.optim} | ({"critic.optim": self.critic.optim} if self.critic is not None else {})
        for path, optim in learning.items():
            if self.seconds is not None and (optim.schedule != "constant" or optim.warmup):
                raise ValueError(f"a run of a given time has no known end: set {path}.schedule: constant and {path}.warmup: 0")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        self.refuse_unmeasured()
        return self

    def refuse_unmeasured(self) -> None:
        """Raises ValueError where the best weights are to be chosen by what is not measured."""
        plan = self.validation
        known = []
        if plan.task is not None:
            counts = not plan.task.grader.open_scale
            known += ["score", "length", "ended"] if plan.evaluation.samples else []
            known += ["pass@1"] if plan.evaluation.samples and counts else []
            several = plan.evaluation.samples > 1 and plan.evaluation.best_of is None
            known += [f"pass@{plan.evaluation.samples}"] if several and counts else []
            known += ["greedy"] if plan.evaluation.greedy else []
        if plan.data is not None:
            known += ["nll"] if self.measures_nll else ["loss", *self.objective.measures]
        if plan.best is not None and plan.best not in known:
            found = f"measured are {', '.join(known)}" if known else "nothing is measured: add validation.task or validation.data"
            raise ValueError(f"validation.best: {plan.best!r} is not measured; {found}")
        if plan.patience is not None and plan.best is None:
            raise ValueError("validation.patience: needs validation.best, the metric that must improve")

    def settled(self, rows: Sequence[Row]) -> Self:
        """With what its objective finds in the rows that it learns from. Raises RecipeError where something no longer fits."""
        found = self.model_copy(update={"objective": self.objective.settled(rows)})
        try:
            found.refuse_unmeasured()
        except ValueError as error:
            raise RecipeError(str(error)) from None
        return found

    @property
    def measures_nll(self) -> bool:
        """Whether validation data are measured by their negative log-likelihood, not by the objective's own figures."""
        return isinstance(self.objective, OnPolicy) or self.objective.reads == "Sequences"

    def check(self) -> None:
        """What can be refused before any weight is read: files, columns, rows that the objective cannot learn from."""
        self.model.check()
        self._check_below(self.model, self.tuner, "tuner")
        self.tuner.check(self.model)
        if self.critic is not None and not self.critic.shared:
            self._check_below(self.critic.model or self.model, self.critic.tuner, "critic.tuner")
            self.critic.tuner.check(self.critic.model or self.model)
        self.optim.check(self.model)
        if self.critic is not None:
            self.critic.optim.check(self.critic.model or self.model)
        critic = self.critic.model if self.critic is not None else None
        for role, source in {"reference": self.reference.model, "teacher": self.teacher, "critic": critic}.items():
            if source is not None:
                source.check()
                refuse_other_tokens(role, source, self.model)
        for data in (self.data, self.validation.data):
            if data is not None:
                data.check()
                self._check_rows(data, self.objective, self.objective.rows or HELD_OUT)
        if self.mix is not None:
            self.mix.data.check()
            self._check_rows(self.mix.data, self.mix.objective, self.mix.objective.rows)
        if self.normalise is not None and self.normalise.data is not None:
            self.normalise.data.check()
            self._check_rows(self.normalise.data, self.objective, ANSWERED)
        for task in (self.task, self.validation.task):
            if task is not None:
                task.check()
                task.grader.check_policy(self.model)
        self.validation.evaluation.check(self.model)
        if isinstance(self.sampler, ProcessSampler) and self.steps is not None:
            rollouts = math.ceil(self.steps / (self.rollout.minibatches * self.rollout.epochs))
            if self.sampler.behind > rollouts:
                raise RecipeError(f"sampler.behind: {self.sampler.behind} rollouts ahead, and the whole run has {rollouts}")

    def _check_below(self, source: ModelSource, tuner: Tuner, path: str) -> None:
        if source.is_quantized():
            refuse_quantized(tuner, str(source.path or f"stage {source.stage}"))
        if not tuner.stores and source.path is not None and not folds(source):
            raise RecipeError(
                f"{path}: {tuner.kind} would move the weights below the adapter {source.path}, which cannot be folded into them; "
                "take a tuner that is stored alone, such as lora"
            )

    def _check_rows(self, data: Data, objective: Objective, wanted: frozenset[str]) -> None:
        for source in data.sources:
            first = source.first()
            if first is None:
                continue
            form = data.format or detect(first)
            if form.makes.isdisjoint(wanted):
                fitting = "pretrain" if form.kind == "text" else "sft"
                hint = f"; use objective {fitting}" if form.kind in {"text", "messages", "prompt_completion"} else ""
                hint = "; name it: data.format: classified" if "Classified" in wanted else hint
                raise RecipeError(
                    f"{first.where}: format {form.kind} gives nothing that objective {objective.kind} learns from{hint}"
                )
