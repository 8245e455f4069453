"""Rows that say how good answers are: which of two is better, whether one is good, a score for each, or one for every step.

A text as prompt is one user message, a text as answer one assistant message. An answer may repeat its prompt, which is then taken
off; an answer that begins with another prompt is left out and counted.
"""

import sys
from itertools import combinations
from typing import Any

from pydantic import Field

from posttrain.data.format import Format, Unusable, as_text, as_turns, wrong
from posttrain.data.source import Raw, shown
from posttrain.errors import DataError
from posttrain.text import Labelled, Message, Preference, Ranking, Steps

Turns = tuple[Message, ...]
LARGEST = sys.float_info.max


class Preferences(Format, kind="preference"):
    """Two answers to one `prompt`: `chosen` is better than `rejected` by `margin` (else 0), with probability `prefer` (1)."""

    needs = ("chosen", "rejected")
    makes = frozenset({"Preference"})
    may = ("prompt", "prefer", "margin")

    def row(self, raw: Raw) -> Preference:
        chosen, rejected = self.turns(raw, "chosen", "assistant"), self.turns(raw, "rejected", "assistant")
        if self.column("prompt") in raw.value:
            prompt = self.turns(raw, "prompt", "user")
            chosen, rejected = _without(prompt, chosen), _without(prompt, rejected)
        else:
            prompt = _shared(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            if chosen and rejected and (not prompt or _asks(chosen) or _asks(rejected)):
                raise Unusable("chosen and rejected share no prompt")
        if chosen == rejected:
            raise Unusable("chosen and rejected are the same")
        _check_answers(chosen=chosen, rejected=rejected)
        prefer = self._number(raw, "prefer", "a probability from 0 to 1", 1.0, most=1)
        return Preference(prompt, chosen, rejected, prefer, self._number(raw, "margin", "a number from 0 up", 0.0), raw.where)

    def _number(self, raw: Raw, name: str, expected: str, default: float, most: float = LARGEST) -> float:
        value = self.cell(raw, name)
        return default if value is None else _number(value, raw.where, f'column "{self.column(name)}"', expected, 0, most)


class LabelledAnswers(Format, kind="labelled"):
    """A `prompt`, its `completion`, and a `label` that says whether it is good: true or false, 1 or 0, or words (see `good`)."""

    needs = ("prompt", "completion", "label")
    makes = frozenset({"Labelled"})

    good: str | None = Field(None, min_length=1)
    """The label that means a good answer where labels are words, such as `positive`; every other word then means a bad one."""

    def row(self, raw: Raw) -> Labelled:
        prompt = self.turns(raw, "prompt", "user")
        completion = _without(prompt, self.turns(raw, "completion", "assistant"))
        _check_answers(completion=completion)
        return Labelled(prompt, completion, self._is_good(raw), raw.where)

    def _is_good(self, raw: Raw) -> bool:
        label, place = self.cell(raw, "label"), f'column "{self.column("label")}"'
        if self.good is not None:
            label = as_text(label, "label", raw.where, place)
            if label != self.good and label.strip().casefold() == self.good.strip().casefold():
                written = f"{shown(label)} is not written as format.good is, {shown(self.good)}"
                raise DataError(f"{raw.where}: {place}: {written}; write both alike")
            return label == self.good
        if label is None or label == "":
            raise Unusable("empty label")
        if isinstance(label, str):
            remedy = f"say which label is the good one, as in format: {{kind: labelled, good: {label[:40]}}}"
            other = "or learn from every completion: format: prompt_completion"
            raise DataError(f"{raw.where}: {place}: expected true, false, 1 or 0, found {shown(label)}; {remedy}, {other}")
        if not isinstance(label, bool | int | float) or label not in (0, 1):
            raise wrong(raw.where, place, "true, false, 1 or 0", label)
        return bool(label)


class Rankings(Format, kind="ranking"):
    """A `prompt` and two or more `completions`, with `scores` (higher is better), `ranks` (1 is best) or the `best` one."""

    needs = ("prompt", "completions")
    either = ("scores", "ranks", "best")
    makes = frozenset({"Ranking"})

    def row(self, raw: Raw) -> Ranking:
        prompt = self.turns(raw, "prompt", "user")
        completions = self._completions(raw, prompt)
        name = self.which(raw)
        scores = self._best(raw, prompt, completions) if name == "best" else self._each(raw, name, len(completions))
        if len(set(scores)) == 1:
            raise Unusable("all completions are ranked the same")
        scored = zip(completions, scores, strict=True)
        if any(one == other and high != low for (one, high), (other, low) in combinations(scored, 2)):
            raise Unusable("equal completions are ranked differently")
        return Ranking(prompt, completions, scores, raw.where)

    def _completions(self, raw: Raw, prompt: Turns) -> tuple[Turns, ...]:
        column, found = self.column("completions"), []
        for index, value in enumerate(_listed(self, raw, "completions")):
            place = f"{column}[{index}]"
            if value is not None and not isinstance(value, str | dict | list):
                raise wrong(raw.where, place, "text, a message or a list of messages", value)
            found.append(_without(prompt, as_turns(value, "completion", "assistant", raw.where, place)))
            _check_answers(completion=found[-1])
        if len(found) < 2:
            raise Unusable("fewer than two completions")
        return tuple(found)

    def _each(self, raw: Raw, name: str, count: int) -> tuple[float, ...]:
        """A score for each completion, higher for a better one."""
        values = _listed(self, raw, name)
        _check_count(raw, len(values), self.column(name), count, self.column("completions"))
        placed = [(value, f"{self.column(name)}[{index}]") for index, value in enumerate(values)]
        if name == "scores":
            return tuple(_number(value, raw.where, place, "a finite number") for value, place in placed)
        for value, place in placed:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise wrong(raw.where, place, "a rank: 1 for the best, 2 for the next", value)
        return tuple(-float(value) for value in values)

    def _best(self, raw: Raw, prompt: Turns, completions: tuple[Turns, ...]) -> tuple[float, ...]:
        """1 for the best completion, 0 for the others."""
        value, column = self.cell(raw, "best"), self.column("best")
        scores: tuple[float, ...] = ()
        if isinstance(value, int) and not isinstance(value, bool):
            scores = tuple(float(index == value) for index in range(len(completions)))
        elif value is None or isinstance(value, str | dict | list):
            best = _without(prompt, as_turns(value, "best", "assistant", raw.where, column))
            scores = tuple(float(completion == best) for completion in completions)
        if not any(scores):
            expected = f"an index from 0 to {len(completions) - 1}, or one of the completions"
            raise wrong(raw.where, f'column "{column}"', expected, value)
        return scores


class GradedAnswers(Format, kind="graded"):
    """A `prompt`, one `completion` and its `score`, a number to predict: higher is better."""

    needs = ("prompt", "completion", "score")
    makes = frozenset({"Ranking"})

    def row(self, raw: Raw) -> Ranking:
        prompt = self.turns(raw, "prompt", "user")
        completion = _without(prompt, self.turns(raw, "completion", "assistant"))
        _check_answers(completion=completion)
        score = self.cell(raw, "score")
        if score is None:
            raise Unusable("empty score")
        score = _number(score, raw.where, f'column "{self.column("score")}"', "a finite number")
        return Ranking(prompt, (completion,), (score,), raw.where)


class LabelledSteps(Format, kind="steps"):
    """A `prompt`, the `steps` (or `completions`) of one answer, and `labels`: for each step true, false or a probability."""

    needs = ("prompt", "labels")
    either = ("steps", "completions")
    makes = frozenset({"Steps"})

    def row(self, raw: Raw) -> Steps:
        prompt, name = self.turns(raw, "prompt", "user"), self.which(raw)
        column, column_of_labels = self.column(name), self.column("labels")
        values, labels = _listed(self, raw, name), _listed(self, raw, "labels")
        _check_count(raw, len(labels), column_of_labels, len(values), column)
        steps = tuple(as_text(value, "step", raw.where, f"{column}[{index}]") for index, value in enumerate(values))
        right = tuple(
            _number(float(value) if isinstance(value, bool) else value, raw.where, f"{column_of_labels}[{index}]", PROBABLE, 0, 1)
            for index, value in enumerate(labels)
        )
        return Steps(prompt, steps, right, raw.where)


PROBABLE = "true, false or a number from 0 to 1"


def _listed(format: Format, raw: Raw, name: str) -> list[Any]:
    value = format.cell(raw, name)
    if value is None or value == []:
        raise Unusable(f"empty {name}")
    if not isinstance(value, list):
        raise wrong(raw.where, f'column "{format.column(name)}"', "a list", value)
    return value


def _number(value: Any, where: str, place: str, expected: str, least: float = -LARGEST, most: float = LARGEST) -> float:
    """A finite number in a range, whatever sizes integers have; NaN is in no range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise wrong(where, place, expected, value)
    return float(value)


def _check_count(raw: Raw, has: int, column: str, needs: int, of: str) -> None:
    if has != needs:
        raise DataError(f'{raw.where}: column "{column}" has {has}, but column "{of}" has {needs}; correct the row: one for each')


def _check_answers(**answers: Turns) -> None:
    """Raises Unusable where an answer says nothing, or asks something else first."""
    if not all(any(message.role == "assistant" for message in answer) for answer in answers.values()):
        raise Unusable("no assistant message to learn from")
    for name, answer in answers.items():
        if _asks(answer):
            raise Unusable(f"{name} begins with another prompt")


def _asks(messages: Turns) -> bool:
    """Whether these begin as a prompt does, and not as an answer to one."""
    return messages[0].role in ("system", "user")


def _without(prompt: Turns, answer: Turns) -> Turns:
    """An answer that may repeat its prompt, without it."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _shared(first: Turns, second: Turns) -> Turns:
    """The messages that two conversations begin with alike."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return first[:same]
