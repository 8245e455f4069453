"""The kinds of stages."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveInt

from posttrain.component import Settings
from posttrain.data.dataset import Data
from posttrain.evaluation import Evaluation
from posttrain.models.source import ModelSource
from posttrain.pipeline.libraries import heavy_imports
from posttrain.pipeline.signals import Interrupted
from posttrain.pipeline.stage import Context, Metrics, Stage
from posttrain.sampling import InProcess, Sampler
from posttrain.tasks import Task
from posttrain.training.settings import TrainSettings


class Train(TrainSettings, Stage, kind="train"):
    """Trains a model with an objective; writes it as an ordinary transformers folder."""

    makes_model = True

    def run(self, context: Context) -> Metrics:
        with heavy_imports():
            from posttrain.training.session import Session, train

        settings = self.model_copy(update={"model": context.model(self.model)})
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
        if self.kl_to is not None:
            self.kl_to.check()

    def run(self, context: Context) -> Metrics:
        import json

        from posttrain.data.render import Template
        from posttrain.evaluation import evaluate

        with heavy_imports():
            from posttrain.models.load import load
            from posttrain.models.roles import Frozen

        loaded = load(context.model(self.model))
        reference = None if self.kl_to is None else Frozen(load(context.model(self.kl_to)).lm)
        template = Template(loaded.tokenizer)
        report = evaluate(loaded.lm, template, self.task, self.evaluation, context.seed, self.sampler, reference)
        with (context.folder / "answers.jsonl").open("w", encoding="utf-8") as stream:
            for answer in report.answers:
                stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
        return {"metrics": report.as_dict(), "problems": len(report.answers), "failures": report.failures}


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
