"""Graders of the way to an answer: what an episode has earned turn by turn, and whether each line of a solution is right."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat, PrivateAttr, field_validator

from posttrain.component import imported
from posttrain.errors import told
from posttrain.expressions import expression
from posttrain.tasks.grader import Grader, TookTooLong, checked, failed, score, within
from posttrain.text import Grade, Message, Problem, Sample

if TYPE_CHECKING:
    from posttrain.data.render import Template
    from posttrain.models.source import ModelSource


class ReturnsGrader(Grader, kind="returns"):
    """What the environment has paid: the sum of the rewards of all turns, each of which is a step of the grade."""

    scale: Literal["right or wrong", "open"] = "right or wrong"
    """right or wrong: a sum of 1 means that the episode was won. open: no share of right answers is given."""

    @property
    def open_scale(self) -> bool:
        return self.scale == "open"

    @property
    def of_episodes(self) -> bool:
        return True

    def grade(self, problem: Problem, text: str) -> Grade:
        return failed("grader returns needs an episode, and this is a text alone")

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        return [self._of_episode(sample) for sample in samples]

    def _of_episode(self, sample: Sample) -> Grade:
        if sample.transcript is None:
            return failed("grader returns needs a task with an environment")
        steps = tuple(zip(sample.transcript.ends, sample.transcript.rewards, strict=True))
        return checked(Grade(float(sum(reward for _, reward in steps)), steps=steps))


class EquationGrader(Grader, kind="equation"):
    """1 where the text is one equation, such as `2 * (3 + 4) = 14`, and it is true."""

    def grade(self, problem: Problem, text: str) -> Grade:
        sides = [expression(side, signs=True) for side in text.split("=")] if text.count("=") == 1 else [None]
        return score(None not in sides and len({side[0] for side in sides if side is not None}) == 1)


class LinesGrader(Grader, kind="lines"):
    """Process supervision: `line` grades each line of the answer that is not blank, as a step; `outcome` the whole, at its end.

    The score is the outcome's (without one, the mean over lines); who learns from steps (`supervision: process`) learns from
    both. arXiv 2402.03300 section 4.1.3.
    """

    line: Grader
    """What grades a line by itself: `equation`, or any other."""
    outcome: Grader | None = None
    """What grades the whole answer; also what is measured."""
    weight: float = 1.0
    """What the score of a line is multiplied by."""

    _template: "Any" = PrivateAttr(default=None)

    @property
    def open_scale(self) -> bool:
        return self.outcome is None or self.outcome.open_scale

    def _graders(self) -> list[Grader]:
        return [self.line] if self.outcome is None else [self.line, self.outcome]

    def check(self) -> None:
        for grader in self._graders():
            grader.check()

    def check_policy(self, policy: "ModelSource") -> None:
        for grader in self._graders():
            grader.check_policy(policy)

    def gold_problem(self, problem: Problem) -> str | None:
        return next((wrong for grader in self._graders() if (wrong := grader.gold_problem(problem))), None)

    def prepare(self, template: "Template") -> None:
        self._template = template
        for grader in self._graders():
            grader.prepare(template)

    def grade(self, problem: Problem, text: str) -> Grade:
        return self.grade_all([Sample(problem, 0, (), (), (), "end", text)])[0]

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        lines = [[line for line in one.text.split("\n") if line.strip()] for one in samples]
        parts = [replace(one, text=line) for one, each in zip(samples, lines, strict=True) for line in each]
        of_lines = iter(self.line.grade_all(parts))
        outcomes = [None] * len(samples) if self.outcome is None else self.outcome.grade_all(samples)
        return [
            self._joined(one, [next(of_lines) for _ in each], outcome)
            for one, each, outcome in zip(samples, lines, outcomes, strict=True)
        ]

    def _joined(self, one: Sample, lines: Sequence[Grade], outcome: Grade | None) -> Grade:
        for grade in (*lines, *([] if outcome is None else [outcome])):
            if grade.score is None:
                return grade
        found = [self.weight * (grade.score or 0.0) for grade in lines]
        mean = sum(found) / len(found) if found else 0.0
        steps = list(zip(self._ends(one), found, strict=True))
        if outcome is not None:
            steps.append((len(one.logp), outcome.score or 0.0))
        parts = {"lines": mean, **({} if outcome is None else {**outcome.parts, "outcome": outcome.score or 0.0})}
        return checked(Grade(mean if outcome is None else outcome.score, parts, steps=tuple(steps)))

    def _ends(self, one: Sample) -> list[int]:
        """Of each line that is not blank: how many sampled tokens there are up to the one with its line break, or to the end."""
        lines = one.text.split("\n")
        if not one.logp:  # a text without tokens, as in an audit
            return [0] * sum(bool(line.strip()) for line in lines)
        drawn = [token for token, sampled in zip(one.tokens, one.sampled, strict=True) if sampled]
        start = 0 if one.transcript is None or len(one.transcript.ends) < 2 else one.transcript.ends[-2]
        counts = [self._template.decode([token]).count("\n") for token in drawn[start:]]
        breaks = [place for place, count in enumerate(counts, start + 1) for _ in range(count)]
        ends = [*breaks, *[len(drawn)] * (len(lines) - len(breaks))]
        return [end for line, end in zip(lines, ends, strict=False) if line.strip()]


class RewardFunctionGrader(Grader, kind="reward_function"):
    """A reward function written for TRL: `(prompts, completions, **columns) -> list[float]`, asked for all answers at once.

    prompts and completions are lists of messages, as TRL gives them for conversations; columns are those of the problems, each a
    list. `None` for an answer means that there is no reward, and is a failure here: it is not learned from; so are all answers of
    a call that takes longer than `seconds`. TRL's `trainer_state`, `environments`, `log_extra` and `log_metric`
    are not given.
    """

    path: str
    """`my_package.module:my_function`."""
    scale: Literal["right or wrong", "open"] = "open"
    """right or wrong: 1 means that the answer is right. open: scores of any size; no share of right answers is given."""
    plain: bool = False
    """Give prompts and completions as text, as TRL does for data without roles."""
    seconds: PositiveFloat = 600.0
    """The longest that one call, for all answers of a rollout, may take."""

    @field_validator("path")
    @classmethod
    def _can_be_called(cls, path: str) -> str:
        function = imported(path)
        if not callable(function):
            raise ValueError(f"{path!r} is no function (prompts, completions, **columns) -> list[float]")
        if inspect.iscoroutinefunction(function):
            raise ValueError(f"{path!r} is a coroutine; write a plain function that calls asyncio.run itself")
        takes = inspect.signature(function).parameters.values()
        if all(each.kind is not each.VAR_KEYWORD for each in takes) and "completions" not in {each.name for each in takes}:
            raise ValueError(f"{path!r} takes neither `completions` nor **columns: {inspect.signature(function)}")
        return path

    @property
    def open_scale(self) -> bool:
        return self.scale == "open"

    def grade(self, problem: Problem, text: str) -> Grade:
        return self.grade_all([Sample(problem, 0, (), (), (), "end", text)])[0]

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        try:
            asked = self._asked(samples)
            rewards = list(within(self.seconds, lambda: imported(self.path)(**asked)))
        except TookTooLong as error:
            return [failed(f"{self.path} {error}")] * len(samples)
        except (Exception, SystemExit) as error:
            return [failed(f"{self.path} raised {told(error)}")] * len(samples)
        if len(rewards) != len(samples):
            return [failed(f"{self.path} returned {len(rewards)} rewards for {len(samples)} answers")] * len(samples)
        return [checked(Grade(plain_number(reward))) for reward in rewards]

    def _asked(self, samples: Sequence[Sample]) -> dict[str, Any]:
        columns: dict[str, list[Any]] = {
            name: [copy.deepcopy(one.problem.facts.get(name)) for one in samples]
            for name in dict.fromkeys(name for one in samples for name in one.problem.facts)
        }
        if any(one.problem.answer is not None for one in samples):
            columns["answer"] = [one.problem.answer for one in samples]
        if self.plain:
            columns["prompts"] = ["\n".join(message.content for message in one.problem.prompt) for one in samples]
            columns["completions"] = [one.shown for one in samples]
        else:
            columns["prompts"] = [[message.as_dict() for message in one.problem.prompt] for one in samples]
            columns["completions"] = [[message.as_dict() for message in messages_of(one)] for one in samples]
        columns["completion_ids"] = [
            [token for token, sampled in zip(one.tokens, one.sampled, strict=True) if sampled] for one in samples
        ]
        return columns


def messages_of(one: Sample) -> tuple[Message, ...]:
    """What was written, and in an episode what was answered."""
    return (Message("assistant", one.text),) if one.transcript is None else one.transcript.messages


def plain_number(reward: Any) -> Any:
    """Numbers of numpy and torch as Python's own."""
    return reward.item() if hasattr(reward, "item") else reward
