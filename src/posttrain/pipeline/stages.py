"""The kinds of stages."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from posttrain.component import Settings
from posttrain.data.dataset import Data
from posttrain.errors import RunError
from posttrain.evaluation import Evaluation
from posttrain.models.source import ModelSource, refuse_other_tokens
from posttrain.pipeline.libraries import heavy_imports
from posttrain.pipeline.signals import Interrupted
from posttrain.pipeline.stage import ROWS, Context, Metrics, Stage, refuse_other_rows
from posttrain.sampling import InProcess, Sampler, Sampling
from posttrain.tasks import Task
from posttrain.training.settings import HELD_OUT, TrainSettings


class Train(TrainSettings, Stage, kind="train"):
    """Trains a model with an objective; writes it as an ordinary transformers folder."""

    makes_model = True

    def run(self, context: Context) -> Metrics:
        with heavy_imports():
            from posttrain.training.session import Session, train

        settings = context.resolved(self)
        session = Session(
            context.folder, context.key, context.seed, self._seconds(context), context.show, context.say, context.interrupted
        )
        record = train(settings, session)
        if "interrupted" in record:
            raise Interrupted(record["interrupted"])
        return record

    def _seconds(self, context: Context) -> float | None:
        if self.seconds is None:
            return None
        return self.seconds.of if self.seconds.stage is None else float(context.records[self.seconds.stage]["seconds"])


class Evaluate(Stage, kind="evaluate"):
    """Answers the problems of a task; gives accuracies with 95% intervals, lengths, and the divergence from another model."""

    model: ModelSource
    """What is evaluated."""
    task: Task
    """Problems and their grader."""
    evaluation: Evaluation = Evaluation()
    """How many samples, and how they are drawn."""
    kl_to: ModelSource | None = None
    """A model to estimate KL(model || it) to, in nats an answer."""
    sampler: Sampler = InProcess()
    """Where samples come from."""

    def check(self) -> None:
        self.model.check()
        self.task.check()
        self.task.grader.check_policy(self.model)
        self.evaluation.check(self.model)
        if self.kl_to is not None:
            self.kl_to.check()
            refuse_other_tokens("kl_to", self.kl_to, self.model)

    def run(self, context: Context) -> Metrics:
        import json

        from posttrain.data.render import Template
        from posttrain.evaluation import evaluate

        with heavy_imports():
            from posttrain.models.load import refuse_other_tokenizer
            from posttrain.models.roles import Frozen
            from posttrain.tuners.load import load

        asked = context.resolved(self)
        loaded = load(asked.model)
        if asked.kl_to is not None:
            refuse_other_tokenizer("kl_to", asked.kl_to, loaded.tokenizer)
        reference = None if asked.kl_to is None else Frozen(load(asked.kl_to).lm)
        template = Template(loaded.tokenizer)
        report = evaluate(loaded.lm, template, asked.task, asked.evaluation, context.seed, asked.sampler, reference)
        with (context.folder / "answers.jsonl").open("w", encoding="utf-8") as stream:
            for answer in report.answers:
                stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
        return {"metrics": report.as_dict(), "problems": len(report.answers), "failures": report.failures}


class EvaluatePairs(Stage, kind="evaluate_pairs"):
    """How often the better answer of a pair gets the higher score, beside how often it is merely the longer one.

    Of a reward model; or, with `reference`, of a policy: its implicit reward is beta (log p - log p_reference).
    """

    model: ModelSource
    """The reward model, or the policy."""
    data: Data
    """Pairs of answers."""
    reference: ModelSource | None = None
    """What a policy is compared with, mostly the model that its training started from."""
    beta: PositiveFloat = 0.1
    """Scale of a policy's implicit reward, as it was trained: calibration depends on it, accuracy does not."""

    @model_validator(mode="after")
    def _beta_is_used(self) -> "EvaluatePairs":
        if self.beta != type(self).model_fields["beta"].default and self.reference is None:
            raise ValueError("beta scales a policy's implicit reward, which a reward model lacks; remove it, or name `reference`")
        return self

    def check(self) -> None:
        self.model.check()
        self.data.check()
        if self.reference is not None:
            self.reference.check()
            refuse_other_tokens("reference", self.reference, self.model)
        refuse_other_rows(self.data, {"Preference"}, "this stage compares pairs of answers; give data of format preference")

    def run(self, context: Context) -> Metrics:
        with heavy_imports():
            from posttrain.pipeline.scoring import judged_pairs

        from posttrain.evaluation.preferences import preference_figures

        asked = context.resolved(self)
        pairs, summary = judged_pairs(asked.model, asked.reference, asked.beta, asked.data)
        for line in summary:
            context.say(line)
        figures = preference_figures(pairs)
        return {"metrics": {name: each.as_dict() for name, each in figures.items()}, "pairs": len(pairs)}


class EvaluateText(Stage, kind="evaluate_text"):
    """How well a model foresees text that it did not learn from: `nll`, in nats a trained token, and its `perplexity`.

    For what a model forgets in training, or loses in being made smaller.
    """

    model: ModelSource
    """What is evaluated."""
    data: Data
    """The texts, or conversations, of which the answers count."""

    def check(self) -> None:
        self.model.check()
        self.data.check()
        refuse_other_rows(self.data, HELD_OUT, "this stage measures text: give text, messages or prompt_completion")

    def run(self, context: Context) -> Metrics:
        import math

        with heavy_imports():
            from posttrain.pipeline.scoring import text_nll

        asked = context.resolved(self)
        nll, summary = text_nll(asked.model, asked.data)
        for line in summary:
            context.say(line)
        perplexity = {name: math.exp(value) for name, value in nll.as_dict().items() if name != "count" and value is not None}
        return {"metrics": {"nll": nll.as_dict(), "perplexity": {**perplexity, "count": nll.count}}, "texts": nll.count}


class MakePairs(Stage, kind="pairs"):
    """Preference pairs: samples answers to a task's problems, compares them by its grader; other stages learn from the rows."""

    makes_rows = True

    model: ModelSource
    """What writes the answers."""
    task: Task
    """Problems, and the grader that decides what is better."""
    per_problem: PositiveInt = Field(default=2, ge=2)
    """Answers to each problem."""
    sampling: Sampling = Sampling()
    """How they are drawn."""
    choice: Literal["best_worst", "bradley_terry"] = "best_worst"
    """best_worst: the best answer against the worst. bradley_terry: answers two by two, the winner drawn with probability
    sigmoid(scale * difference in score): labels as noisy as people's."""
    scale: PositiveFloat = 1.0
    """Of bradley_terry: how much a difference in score decides."""
    sampler: Sampler = InProcess()
    """Where samples come from."""

    @model_validator(mode="after")
    def _makes_a_difference(self) -> "MakePairs":
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: 0 always gives the same answer; there is nothing to compare")
        if self.scale != type(self).model_fields["scale"].default and self.choice != "bradley_terry":
            raise ValueError(f"scale is of choice: bradley_terry, and this is {self.choice}; remove it")
        return self

    def check(self) -> None:
        self.model.check()
        self.task.check()
        self.task.grader.check_policy(self.model)

    def run(self, context: Context) -> Metrics:
        import json

        from posttrain.data.render import Template
        from posttrain.sampling import sample
        from posttrain.synth.pairs import pair_row, pairs_of

        with heavy_imports():
            from posttrain.tuners.load import load

        asked = context.resolved(self)
        loaded = load(asked.model)
        template = Template(loaded.tokenizer)
        asked.task.grader.prepare(template)
        drawn = sample(
            self.sampler,
            loaded.lm,
            template,
            asked.task.problems(),
            self.per_problem,
            self.sampling,
            context.seed,
            (context.name,),
            environment=asked.task.environment,
        )
        graded = list(zip(drawn, asked.task.grader.grades(drawn), strict=True))
        made = list(pairs_of(graded, self.choice, self.scale, context.seed))
        if not made:
            cut = sum(one.stop != "end" for one in drawn)
            raise RunError(
                f"no pair was made of {len(drawn):,} answers: {cut:,} were cut off at sampling.max_tokens "
                f"{self.sampling.max_tokens}, and the rest to each problem are the same or have equal scores"
            )
        with (context.folder / ROWS).open("w", encoding="utf-8") as stream:
            for pair in made:
                stream.write(json.dumps(pair_row(*pair, str(asked.model.path)), ensure_ascii=False) + "\n")
        right = sum(better > worse for _, _, better, worse in made) / len(made)
        context.say(f"{len(made):,} pairs from {len(drawn):,} answers; the winner has the higher score in {right:.0%}")
        return {"metrics": {}, "pairs": len(made), "answers": len(drawn), "agreement": right}


class Architecture(Settings):
    """A Llama-style decoder with tied embeddings."""

    hidden_size: PositiveInt = 192
    """Width."""
    layers: PositiveInt = 6
    """Depth."""
    heads: PositiveInt = 6
    """Query heads."""
    key_value_heads: PositiveInt = 2
    """Key and value heads; queries share them in groups."""
    feed_forward: PositiveInt = 512
    """Width of the gated feed-forward layer."""
    context: PositiveInt = 1024
    """The longest sequence in tokens."""


class Create(Stage, kind="create"):
    """Makes a new model: a byte-level BPE tokenizer trained on the data, and a Llama-style decoder with random weights."""

    makes_model = True

    data: Data
    """Raw text for the tokenizer."""
    vocabulary: PositiveInt = Field(default=2048, ge=300)
    """Tokens of the vocabulary, special tokens included."""
    digits: Literal["single"] = "single"
    """Each digit is a token of its own."""
    architecture: Architecture = Architecture()
    """The model's shape."""

    def check(self) -> None:
        self.data.check()

    def run(self, context: Context) -> Metrics:
        with heavy_imports():
            from posttrain.models.create import create

        facts = create(self._texts(), self.vocabulary, self.architecture.model_dump(), context.seed, context.folder / "model")
        return {"metrics": {}, **facts}

    def _texts(self) -> Iterator[str]:
        from posttrain.text import Text

        rows: list[Any] = [row for source in self.data.read().rows for row in source]
        return (row.text for row in rows if isinstance(row, Text))
