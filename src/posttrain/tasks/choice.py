"""Multiple choice: the rows, the task, and a grader that accepts one label and no hedging."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from posttrain.answer import answer_of
from posttrain.data.format import Format, Problems, Unusable
from posttrain.data.source import Raw, shown
from posttrain.errors import DataError
from posttrain.tasks.grader import Grade, Grader, score
from posttrain.tasks.task import Task
from posttrain.text import Problem

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_SAID = re.compile(r"(?i)\banswer\**\s*(?:is\b|:|=)|\\boxed\b|答案(?:是|[:：])")
_ALONE = r"[\s*_()\[\]{}.:\"'`$]*"  # what may stand around a label that has a line to itself
_GOES_ON = re.compile(r" (?!(?:is|was|because|since|as|and|or|but|for|seems|would|must|by|with|in)\b)[a-z]")
_DENIED = re.compile(r"(?i)(?:\bnot|n['’]t|\bbut|\bexcept|\bthan|\bover|\bnever)[\s(*]*\Z")


class ChoiceGrader(Grader, kind="choice"):
    """1 where the completion names the right label and no other.

    Where it says `answer is` or `answer:` (or boxes something), the labels on the rest of those lines count, or on the line
    below where that is empty; else labels that have a line to themselves; else all labels. A label stands alone and in its own
    case: `B`, `(B)`, `B.`; one behind `not` or `but`, and the article `A`, are none. Two different ones earn 0. A thought is not
    searched. The problem has the column `labels`, or the grader names them.
    """

    labels: list[str] | None = Field(default=None, min_length=2)
    """The labels, where the problems do not bring their own."""

    def grade(self, problem: Problem, text: str) -> Grade:
        one_of = "|".join(re.escape(label) for label in sorted(self._labels(problem), key=len, reverse=True))
        label = re.compile(
            rf"(?<![A-Za-z\d°])(?<![A-Za-z]['’])(?<!\d[.,])(?!(?<=[-−])\d)({one_of})(?![A-Za-z\d])(?!['’][A-Za-z])(?![.,]\d)"
        )
        lines = [line for line in answer_of(text).splitlines() if line.strip()]
        said: list[str] = []
        for line, after in zip(lines, [*lines, ""][1:], strict=True):
            if found := _SAID.search(line):
                said.append(line[found.end() :] if re.search(r"\w", line[found.end() :]) else after)
        alone = [line for line in lines if re.fullmatch(rf"{_ALONE}(?:{one_of}){_ALONE}", line)]
        for part in (said, alone, lines):
            if named := _named(label, part):
                return score(named == {problem.answer})
        return score(False)

    def gold_problem(self, problem: Problem) -> str | None:
        labels = self._labels(problem)
        if not labels:
            return "it has no `labels`"
        if problem.answer is None:
            return "it has no answer"
        return None if problem.answer in labels else f"its answer {problem.answer!r} is none of {', '.join(labels)}"

    def _labels(self, problem: Problem) -> Sequence[str]:
        return self.labels or problem.facts.get("labels") or ()


def _named(label: "re.Pattern[str]", lines: Sequence[str]) -> set[str]:
    """The labels that stand in some lines, where they are meant as such."""
    return {
        found[1] for line in lines for found in label.finditer(line)
        if not _DENIED.search(line[max(0, found.start() - 12) : found.start()]) and not _is_article(line, found)
    }  # fmt: skip


def _is_article(line: str, found: "re.Match[str]") -> bool:
    """`A` at the beginning of a sentence that goes on: `A bank is near.`, but not `A is right.`"""
    before = line[max(0, found.start() - 3) : found.start()]
    begins = re.search(r"[.!?]\s+\Z", before) or (found.start() < 3 and not before.strip())
    return found[1] == "A" and bool(begins) and _GOES_ON.match(line, found.end()) is not None


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
