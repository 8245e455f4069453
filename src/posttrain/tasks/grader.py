"""Graders: from a problem and an answer to a score, or to the reason why there is none. A failure is not a score."""

import copy
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat, field_validator

from posttrain.answer import answer_of
from posttrain.component import Component, imported
from posttrain.errors import told
from posttrain.text import Grade, Problem, Sample

if TYPE_CHECKING:
    from posttrain.data.render import Template
    from posttrain.models.source import ModelSource


class Grader(Component):
    """Says how good an answer is.

    A kind implements `grade`, and `gold_problem` where it needs something from the problem. Callers with samples use
    `grade_all`, which never raises for what one grade did; graders that batch (judges, reward models) override it and pass
    what they made through `checked`.
    """

    def grade(self, problem: Problem, text: str) -> Grade:
        raise NotImplementedError

    def gold_problem(self, problem: Problem) -> str | None:
        """Why no answer to this problem can be graded (no gold, gold that cannot be read); None where it can."""
        return None

    @property
    def of_episodes(self) -> bool:
        """Whether it can only grade episodes: the answers of a task with an environment."""
        return False

    @property
    def open_scale(self) -> bool:
        """Whether scores have a scale of their own, on which no answer is simply right; else 1 means that it is."""
        return False

    def check(self) -> None:
        """What can be known to be wrong before any weight is loaded; raises an InputError."""

    def check_policy(self, policy: "ModelSource") -> None:
        """What can be known before any weight is loaded to be wrong with grading this policy; raises an InputError."""

    def prepare(self, template: "Template") -> None:
        """Called once before answers are graded, with the tokenizer that writes them: graders that hold models load them here."""

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        """One grade per sample, in order; whatever goes wrong in one of them is a failure of that one only."""
        return [self._guarded(sample.problem, sample.text) for sample in samples]

    def grades(self, samples: Sequence[Sample]) -> list[Grade]:
        """`grade_all` of those whose environment did not fail; a failure for each of the others."""
        failures = [None if one.transcript is None else one.transcript.failure for one in samples]
        found = iter(self.grade_all([one for one, failure in zip(samples, failures, strict=True) if failure is None]))
        return [next(found) if failure is None else failed(failure) for failure in failures]

    def _guarded(self, problem: Problem, text: str) -> Grade:
        try:
            return checked(self.grade(problem, text))
        except (Exception, SystemExit) as error:
            return failed(f"the grader raised {told(error)}")


def failed(why: str) -> Grade:
    """No score, and why; one short line whatever the cause was."""
    return Grade(None, failure=" ".join(why.split())[:300])


def checked(grade: Any) -> Grade:
    """The grade itself where it holds a finite score or names its failure; a named failure for anything else."""
    if not isinstance(grade, Grade):
        return failed(f"the grader returned {_described(grade)}, not a Grade")
    if grade.failure is not None:
        return Grade(None, grade.parts, grade.failure)
    steps = {f"step {number}": reward for number, (_, reward) in enumerate(grade.steps, 1)}
    for name, value in {"score": grade.score, **grade.parts, **steps}.items():
        wrong = _not_a_number(value)
        if wrong:
            return failed(f"the grader's {name} is {wrong}")
    return grade


def _not_a_number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{_described(value)}, not a number"
    return None if math.isfinite(value) else str(value)


def _described(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def score(right: bool) -> Grade:
    """1 for a right answer, 0 for a wrong one."""
    return Grade(1.0 if right else 0.0)


class ExactGrader(Grader, kind="exact"):
    """1 where the whole completion is the answer, white space aside; of one that thinks first, what stands behind the thought.

    Runs of white space count as one space, and none counts at the ends.
    """

    ignore_case: bool = False
    """Whether `Paris` and `paris` are the same answer."""

    def grade(self, problem: Problem, text: str) -> Grade:
        return score(self._plain(answer_of(text)) == self._plain(problem.answer or "") != "")

    def gold_problem(self, problem: Problem) -> str | None:
        return None if (problem.answer or "").strip() else "it has no answer"

    def _plain(self, text: str) -> str:
        plain = " ".join(text.split())
        return plain.casefold() if self.ignore_case else plain


class FunctionGrader(Grader, kind="function"):
    """A Python function of one's own, `(problem, text) -> float`.

    The problem is a `posttrain.text.Problem` (`prompt`, `answer`, `facts`), the text is the decoded completion. What the
    function raises, and anything it returns that is not a finite number, is a failure of that sample and not a score; so is a
    call that takes longer than `seconds`, which is given up.
    """

    path: str
    """`my_package.module:my_function`."""
    scale: Literal["right or wrong", "open"] = "right or wrong"
    """right or wrong: 1 means that the answer is right. open: scores of any size; no share of right answers is given."""
    seconds: PositiveFloat = 60.0
    """The longest that one answer may take."""

    @property
    def open_scale(self) -> bool:
        return self.scale == "open"

    @field_validator("path")
    @classmethod
    def _can_be_called(cls, path: str) -> str:
        function = imported(path)
        if not callable(function):
            raise ValueError(f"{path!r} is a {type(function).__name__}, not a function (problem, text) -> float")
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise ValueError(f"{path!r} is a coroutine or a generator; a grader is a plain function that returns a number")
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            raise ValueError(f"{path!r} cannot be called with (problem, text): {inspect.signature(function)}") from None
        except ValueError:  # some built-in functions do not say what they take
            pass
        return path

    def grade(self, problem: Problem, text: str) -> Grade:
        own = replace(problem, facts=copy.deepcopy(dict(problem.facts)))  # what it changes is seen by no other grade
        try:
            value = within(self.seconds, lambda: imported(self.path)(own, text))
        except TookTooLong as error:
            return failed(f"{self.path} {error}")
        except (Exception, SystemExit) as error:
            return failed(f"{self.path} raised {told(error)}")
        if isinstance(value, Grade):
            return checked(value)
        wrong = _not_a_number(value)
        return failed(f"{self.path} returned {_returned(value, wrong)}") if wrong else Grade(float(value))


class TookTooLong(Exception):
    """A function has not come back."""


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function gives. Raises TookTooLong where it takes longer: its thread cannot be ended, and is left alone.

    Code in C that never lets go of the interpreter, such as `re` on a hostile pattern, cannot be given up.
    """
    found: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            found.append((True, function()))
        except BaseException as error:
            found.append((False, error))

    thread = threading.Thread(target=run, daemon=True, name="grader")
    thread.start()
    thread.join(seconds)
    if not found:
        raise TookTooLong(f"has not answered in {seconds:g} s")
    good, value = found[0]
    if not good:
        raise value
    return value


def _returned(value: Any, wrong: str) -> str:
    return "None, not a number" if value is None else wrong.replace("of type ", "a value of type ")
