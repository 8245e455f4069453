"""Multiple choice: the rows, the task, and a grader that accepts one label and no hedging."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from posttrain.data.format import Format, Problems, Unusable
from posttrain.data.source import Raw, shown
from posttrain.errors import DataError
from posttrain.tasks.grader import Grade, Grader, score
from posttrain.tasks.task import Task
from posttrain.text import Problem

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_SAID = re.compile(r"(?i)\banswer\s*(?:is\b|:|=)|\\boxed\b")


class ChoiceGrader(Grader, kind="choice"):
    """1 where the completion names the right label and no other.

    Where it says `answer is` or `answer:` (or boxes something), the labels on the rest of those lines count; else all labels
    of the completion. A label stands alone and in its own case: `B`, `(B)`, `B.`. Two different ones earn 0. The problem has
    the column `labels`, or the grader names them.
    """

    labels: list[str] | None = Field(default=None, min_length=2)
    """The labels, where the problems do not bring their own."""

    def grade(self, problem: Problem, text: str) -> Grade:
        labels = self._labels(problem)
        said = [line[found.end() :] for line in text.splitlines() if (found := _SAID.search(line))]
        one_of = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
        named = set(re.findall(rf"(?<![\w'’])(?:{one_of})(?![\w'’])", "\n".join(said) if said else text))
        return score(named == {problem.answer})

    def gold_problem(self, problem: Problem) -> str | None:
        labels = self._labels(problem)
        if not labels:
            return "it has no `labels`"
        if problem.answer is None:
            return "it has no answer"
        return None if problem.answer in labels else f"its answer {problem.answer!r} is none of {', '.join(labels)}"

    def _labels(self, problem: Problem) -> Sequence[str]:
        return self.labels or problem.facts.get("labels") or ()


class Choices(Format, kind="choice"):
    """A `question`, its `choices`, their `labels` (A, B, C, ... where there are none) and the label that is the `answer`."""

    needs = ("question", "choices", "answer")
    may = ("labels", "id")

    def row(self, raw: Raw) -> Problem:
        question, choices = self.plain(raw, "question"), self._texts(raw, "choices")
        labels = list(LETTERS[: len(choices)])
        if self.cell(raw, "labels") is not None:
            labels = self._texts(raw, "labels")
        if not 2 <= len(choices) == len(labels) == len(set(labels)):
            counts = f"{len(choices)} choices and {len(set(labels))} different labels"
            raise DataError(f"{raw.where}: {counts}; give every choice, at least two, a label of its own")
        listed = "\n".join([question, *(f"{label}. {text}" for label, text in zip(labels, choices, strict=True))])
        used = {self.column(name) for name in self.needs + self.may}
        facts = {column: value for column, value in raw.value.items() if column not in used}
        columns = {"prompt": listed, "answer": self.cell(raw, "answer"), "id": self.cell(raw, "id")}
        return Problems().row(Raw({**facts, "choices": choices, "labels": labels, **columns}, raw.where))

    def _texts(self, raw: Raw, name: str) -> list[str]:
        value: Any = self.cell(raw, name)
        if not value:
            raise Unusable(f"empty {name}")
        if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
            what = f'column "{self.column(name)}": expected a list of texts, found {shown(value)}'
            raise DataError(f"{raw.where}: {what}; correct the row, or name another column in format.fields")
        return value


class ChoiceTask(Task, kind="choice"):
    """Multiple choice: the prompt lists the choices under their labels, the answer is one label."""

    format: Format = Field(default_factory=Choices)
    grader: Grader = Field(default_factory=ChoiceGrader)
    instruction: str | None = "Answer with the label of the right choice."
