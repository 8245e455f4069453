"""Tasks: problems and what grades them. The same object serves reinforcement learning, evaluation and rejection sampling."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

from pydantic import Field, PositiveInt, model_validator

from posttrain.component import Component
from posttrain.data.format import Format, Problems, Unusable
from posttrain.data.source import Raw, Source
from posttrain.environments import Environment, GuessNumber, Rooms
from posttrain.errors import DataError
from posttrain.tasks.countdown import CountdownGrader
from posttrain.tasks.grader import Grader
from posttrain.tasks.mathematics import MathGrader
from posttrain.tasks.numeric import EquationsGrader, NumberGrader
from posttrain.tasks.process import ReturnsGrader
from posttrain.text import Message, Problem


class Task(Component):
    """Problems from a source, and the grader of the answers to them.

    Nothing is dropped: a task whose 400 problems are silently 390 cannot be compared with itself. A row that makes no problem,
    or none that its grader can grade, is refused with its place in the file.
    """

    source: Source
    """Where the problems are."""
    format: Format = Field(default_factory=Problems)
    """What the columns mean: `{kind: problem, fields: {prompt: question}}`."""
    grader: Grader
    """What judges an answer."""
    environment: Environment | None = None
    """What answers the policy, turn by turn; null: its first turn is its answer."""
    limit: PositiveInt | None = None
    """Only the first so many problems."""
    system: str | None = None
    """A system message to put before each problem."""
    instruction: str | None = None
    """A text to add to the last user message, after a blank line; with `{prompt}` in it, it stands around that message."""

    @model_validator(mode="after")
    def _episodes_are_played(self) -> "Task":
        if self.environment is None and self.grader.of_episodes:
            raise ValueError(f"grader: {self.grader.kind} grades episodes, and nothing answers the policy; give an `environment`")
        if self.grader.of_episodes and self.environment is not None and not self.environment.pays:
            raise ValueError(
                f"grader: {self.grader.kind} sums what the environment pays, and {self.environment.kind} here pays nothing (no "
                "`get_reward`); take a grader that judges the answer"
            )
        return self

    def problems(self) -> list[Problem]:
        """All problems in the order of the file. Raises DataError for a row that is none, and where there are none."""
        found: dict[str, Problem] = {}
        for raw in islice(self.source.read(), self.limit):
            problem = self._problem(raw)
            if problem.id in found:
                other = f"the id {problem.id!r} is that of {found[problem.id].where} too"
                raise DataError(f"{raw.where}: {other}; an id addresses random draws, change one")
            found[problem.id] = problem
        if not found:
            raise DataError(f"{self.source.label()}: holds no problems")
        return list(found.values())

    def check(self) -> None:
        """What is cheap to know before weights load: the source is there, its first row is a problem that can be graded."""
        self.source.check()
        self.grader.check()
        if self.environment is not None:
            self.environment.check()
        first = self.source.first()
        if first is not None:
            self._problem(first)

    def fingerprint(self) -> str:
        """sha256 that changes when the problems, their prompts or their grading change, wherever the file lies."""
        settings = self.model_dump(mode="json")
        settings.pop("source")  # its path does not matter, what it holds does
        text = json.dumps([self.source.fingerprint(), settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _problem(self, raw: Raw) -> Problem:
        try:
            row = self.format.parse(raw)
        except Unusable as error:
            raise DataError(f"{raw.where}: this row is no problem: {error}; correct it or take it out") from None
        if not isinstance(row, Problem):
            raise DataError(f"{raw.where}: format {self.format.kind} makes no problems; a task needs format: problem")
        wrong = self.grader.gold_problem(row)
        if wrong:
            what = f"grader {self.grader.kind} cannot grade this problem: {wrong}"
            raise DataError(f"{raw.where}: {what}; correct it or take it out")
        return replace(row, prompt=self._prompt(row))

    def _prompt(self, problem: Problem) -> tuple[Message, ...]:
        *before, last = problem.prompt
        if last.role not in {"user", "tool"}:
            raise DataError(f"{problem.where}: the prompt ends with a turn of {last.role}; it must end with one of user")
        if self.system is not None:
            if problem.prompt[0].role == "system":
                raise DataError(f"{problem.where}: this problem brings its own system message; leave `system` out of the task")
            before = [Message("system", self.system), *before]
        return (*before, replace(last, content=self._instructed(last.content)))

    def _instructed(self, content: str) -> str:
        if self.instruction is None:
            return content
        if "{prompt}" in self.instruction:
            return self.instruction.replace("{prompt}", content)
        return f"{content}\n\n{self.instruction}"


def shipped(name: str) -> Callable[[], Source]:
    """The source of a file that comes with the package."""
    return lambda: Source.model_validate(f"posttrain:data/{name}")


def made(function: str) -> Callable[[], Source]:
    """The source of rows that a function of ours makes."""
    return lambda: Source.model_validate({"kind": "function", "path": function})


class ArithmeticTask(Task, kind="arithmetic"):
    """Small story problems, worked as lines of `a + b = c`; by default the 500 test problems that come with the package."""

    source: Source = Field(default_factory=shipped("arith_test.jsonl"))
    grader: Grader = Field(default_factory=EquationsGrader)


class Gsm8kTask(Task, kind="gsm8k"):
    """School mathematics in words (arXiv 2110.14168); by default the 7,473 training problems that come with the package.

    The answer is the number after the last `####`, or, in a completion without that sign, its last number.
    """

    source: Source = Field(default_factory=shipped("gsm8k_train.jsonl.gz"))
    grader: Grader = Field(default_factory=lambda: NumberGrader(marker="####"))


class CountdownTask(Task, kind="countdown"):
    """Reach a target with given numbers; by default the 400 test problems that come with the package."""

    source: Source = Field(default_factory=shipped("countdown_test.jsonl"))
    grader: Grader = Field(default_factory=CountdownGrader)


class MathTask(Task, kind="math"):
    r"""Mathematics with an answer in LaTeX, graded by math-verify; the prompt asks for a `\boxed{}` answer."""

    grader: Grader = Field(default_factory=MathGrader)
    instruction: str | None = "Put your final answer in \\boxed{}."


class GuessNumberTask(Task, kind="guess_number"):
    """A number from 1 to 20 is guessed in at most eight turns, each answered `higher` or `lower`."""

    source: Source = Field(default_factory=made("posttrain.environments.games:numbers_to_guess"))
    environment: Environment | None = GuessNumber()
    grader: Grader = Field(default_factory=ReturnsGrader)


class RoomsTask(Task, kind="rooms"):
    """A small game in text: find the key (0.25), then open the door (0.75), in at most twelve turns."""

    source: Source = Field(default_factory=made("posttrain.environments.games:rooms_to_walk"))
    environment: Environment | None = Rooms()
    grader: Grader = Field(default_factory=ReturnsGrader)


class ProblemsTask(Task, kind="problems"):
    """Any file of problems with a grader of one's choice: a task without a line of code."""
