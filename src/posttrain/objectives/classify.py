"""Classification: which class a text is of, which labels apply to it, or a number for it.

The model is that of the stage with a new head in place of what it had (or a classifier to go on with); under every tuner the head
is trained in full.
"""

import re
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from posttrain import losses
from posttrain.errors import DataError
from posttrain.objectives.objective import Loss, Objective
from posttrain.text import Classes, RenderedRow, as_number
from posttrain.text import Classified as ClassifiedRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from posttrain.batch import Classified
    from posttrain.models.encoder import Encoder
    from posttrain.models.scalar import ScalarLM
    from posttrain.text import Row

INTEGER = re.compile(r"-?\d+")
MEASURES = {"single": ("accuracy",), "multi": ("accuracy",), "regression": ("absolute_error",)}


class Classify(Objective, kind="classify"):
    """-log softmax(logits)[class], a mean over texts; for several labels a text the binary cross-entropy, a mean over texts and
    labels; for numbers (logit - number)^2, a mean over texts.

    The logits are read at the last token (decoders), or where the encoder's own head reads (the first token, or the mean).
    `accuracy`: of several labels a text, how often all are right.
    """

    problem: Literal["single", "multi", "regression"] | None = None
    """single: one label a text. multi: any number of labels, in a list. regression: a number. By default what the data's labels
    are: lists are multi, fractions regression, names and integers single."""
    labels: list[str] | None = Field(None, min_length=2)
    """All labels, in the order of the outputs; by default those of the training data, integers by size, then names sorted."""
    new_head: bool = False
    """Begin with a new head where the model has one already, such as that of other labels."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """The share of a label's probability that is spread over all labels; of single alone."""
    weights: dict[str, PositiveFloat] = Field(default={})
    """How much the loss of a label counts, where not 1; units stay texts."""

    reads = "Classified"
    rows = frozenset({"Classified"})
    scores = True

    @field_validator("labels", "weights", mode="before")
    @classmethod
    def _integers_are_names(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [named(each) for each in value]
        return {named(key): each for key, each in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels: {', '.join(self.labels)}: each label once")
        if self.problem not in (None, "single") and self.label_smoothing:
            raise ValueError(f"label_smoothing is of problem: single, and this is {self.problem}; remove it")
        if self.problem == "regression" and (self.labels is not None or self.weights):
            raise ValueError("problem: regression gives a number and knows no labels; remove labels and weights")
        for name in self.weights:
            if self.labels is not None and name not in self.labels:
                raise ValueError(f"weights: {name!r} is no label; labels are {', '.join(self.labels)}")
        return self

    @property
    def measures(self) -> tuple[str, ...]:  # type: ignore[override]
        return MEASURES[self.problem] if self.problem else ("accuracy", "absolute_error")

    @property
    def classes(self) -> Classes | None:
        """What its texts are told apart by; None where its rows have not been read yet."""
        return None if self.problem is None else Classes(self.problem, tuple(self.labels or ()))

    def settled(self, rows: "Sequence[Row]") -> Self:
        """With the problem and the labels that its rows have."""
        texts = [row for row in rows if isinstance(row, ClassifiedRow)]
        problem = self.problem or problem_of(texts)
        labels = self.labels
        if problem != "regression" and labels is None:
            labels = labels_of(texts)
            if len(labels) < 2:
                named_all = f"all {len(texts):,} texts are labelled {labels[0]}" if labels else "no text has a label"
                raise DataError(f"{texts[0].where}: {named_all}; there is nothing to tell apart")
        try:
            return self.model_validate({**dict(self), "problem": problem, "labels": labels})
        except ValueError as error:
            said = next((line for line in str(error).splitlines() if "Value error" in line), str(error))
            raise DataError(f"objective: {said.partition('Value error, ')[2].partition(' [type=')[0]}") from None

    def check_rows(self, rows: "Sequence[Row]", learning: bool = True) -> None:
        assert self.classes is not None
        for row in rows:
            if isinstance(row, ClassifiedRow):
                self.classes.numbers(row.label, row.where)

    def split(self, row: "RenderedRow") -> "tuple[RenderedRow, ...]":
        assert self.classes is not None
        assert row.label is not None
        return (RenderedRow(row.sequences, self.classes.numbers(row.label, "")),)

    def units(self, batch: "Classified") -> dict[str, int]:
        return {"label": batch.target.numel()}

    def loss(self, policy: "ScalarLM | Encoder", batch: "Classified") -> Loss:
        logits = policy.logits(batch.seqs)
        target = batch.target.to(logits.dtype)
        told = logits.detach()
        if self.problem == "regression":
            value = losses.squared_error(logits[:, 0], target[:, 0])
            return Loss({"label": value.sum()}, {"absolute_error": ((told - target).abs().sum(), batch.count)})
        weight = self._weight(logits)
        if self.problem == "multi":
            value = losses.binary_cross_entropy(logits, target, weight)
            right = ((told > 0) == (target > 0.5)).all(1)
        else:
            label = target[:, 0].long()
            value = losses.cross_entropy(logits, label, weight, self.label_smoothing)
            right = told.argmax(1) == label
        return Loss({"label": value.sum()}, {"accuracy": (right.sum(), batch.count)})

    def _weight(self, logits: "Tensor") -> "Tensor | None":
        if not self.weights:
            return None
        return logits.new_tensor([self.weights.get(label, 1.0) for label in self.labels or ()])


def named(value: Any) -> Any:
    """A label as a name: 1 is "1", true is "true"."""
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int) else value


def problem_of(rows: "Sequence[ClassifiedRow]") -> Literal["single", "multi", "regression"]:
    """What labels are for: lists, fractions among numbers (which a table may have as text), or names."""
    labels = [row.label for row in rows]
    if any(isinstance(each, tuple) for each in labels):
        return "multi"
    numbers = [None if isinstance(each, tuple) else as_number(each) for each in labels]
    fractions = any(isinstance(each, float) or (isinstance(each, str) and not INTEGER.fullmatch(each)) for each in labels)
    return "regression" if fractions and None not in numbers else "single"


def labels_of(rows: "Sequence[ClassifiedRow]") -> list[str]:
    """All labels, the same list whatever the order of the rows: integers by size, then names by spelling."""
    found = {name for row in rows for name in (row.label if isinstance(row.label, tuple) else (str(row.label),))}
    return sorted(found, key=lambda name: (0, int(name), "") if INTEGER.fullmatch(name) else (1, 0, name))
