"""Graders made of graders: a weighted sum, and a score behind gates."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from posttrain.component import Settings
from posttrain.tasks.grader import Grader, checked, failed
from posttrain.text import Grade, Problem, Sample

if TYPE_CHECKING:
    from posttrain.data.render import Template
    from posttrain.models.source import ModelSource


class Part(Settings):
    """One of the graders of a sum."""

    grader: Grader
    """What grades."""
    weight: float = 1.0
    """What its score is multiplied by; negative for a penalty."""


class ComposedGrader(Grader):
    """What graders made of others share: each is asked about every answer, and its score is a part of the grade.

    Where one of them fails, there is no score.
    """

    def graders(self) -> dict[str, Grader]:
        """The others, by the name under which they are logged."""
        raise NotImplementedError

    def composed(self, scores: dict[str, float]) -> float:
        """The score, from those of the others."""
        raise NotImplementedError

    def check(self) -> None:
        for grader in self.graders().values():
            grader.check()

    def check_policy(self, policy: "ModelSource") -> None:
        for grader in self.graders().values():
            grader.check_policy(policy)

    def prepare(self, template: "Template") -> None:
        for grader in self.graders().values():
            grader.prepare(template)

    def gold_problem(self, problem: Problem) -> str | None:
        wrong = (grader.gold_problem(problem) for grader in self.graders().values())
        return next((each for each in wrong if each), None)

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        columns = {name: grader.grade_all(samples) for name, grader in self.graders().items()}
        rows = [{name: grades[row] for name, grades in columns.items()} for row in range(len(samples))]
        return [self._stepwise(self._joined(row), row, len(one.logp)) for row, one in zip(rows, samples, strict=True)]

    def grade(self, problem: Problem, text: str) -> Grade:
        return self._joined({name: grader.grade(problem, text) for name, grader in self.graders().items()})

    def _joined(self, grades: dict[str, Grade]) -> Grade:
        for name, grade in grades.items():
            if grade.score is None:
                return failed(f"{name}: {grade.failure}")
        scores = {name: grade.score for name, grade in grades.items() if grade.score is not None}
        inner = {f"{name}/{part}": value for name, grade in grades.items() for part, value in grade.parts.items()}
        return checked(Grade(self.composed(scores), {**scores, **inner}))

    def _stepwise(self, joined: Grade, grades: dict[str, Grade], length: int) -> Grade:
        """With what its parts weigh, and what the steps of the answer earn where one of the others says so. length: in tokens."""
        return joined

    @property
    def of_episodes(self) -> bool:
        return any(grader.of_episodes for grader in self.graders().values())


class WeightedGrader(ComposedGrader, kind="weighted"):
    """A weighted sum of other graders' scores, each logged as a part of the reward. Where one fails, there is no score."""

    parts: dict[str, Part] = Field(min_length=1)
    """The graders by name, each with its weight."""

    @property
    def open_scale(self) -> bool:
        return True

    def graders(self) -> dict[str, Grader]:
        return {name: part.grader for name, part in self.parts.items()}

    def composed(self, scores: dict[str, float]) -> float:
        return sum(self.parts[name].weight * score for name, score in scores.items())

    def _stepwise(self, joined: Grade, grades: dict[str, Grade], length: int) -> Grade:
        """The steps of all; what a grader without steps says is earned at the end."""
        if joined.score is None:
            return joined
        joined = replace(joined, weights={name: part.weight for name, part in self.parts.items()})
        if not any(grade.steps for grade in grades.values()):
            return joined
        all_steps = [
            (end, self.parts[name].weight * reward)
            for name, grade in grades.items()
            for end, reward in grade.steps or ((length, grade.score or 0.0),)
        ]
        return replace(joined, steps=tuple(sorted(all_steps, key=lambda step: step[0])))


class GatedGrader(ComposedGrader, kind="gated"):
    """The score of one grader where all gates are passed, else `otherwise`. Every score is logged as a part of the reward.

    A reward that counts only in the right form cannot be had by the form alone, nor without it.
    """

    gates: dict[str, Grader] = Field(min_length=1)
    """Graders by name; each must give at least `threshold`."""
    grader: Grader
    """What grades an answer that passes, logged as `score`."""
    threshold: float = 1.0
    """The least score that passes a gate."""
    otherwise: float = 0.0
    """The score of an answer that does not pass."""

    @property
    def open_scale(self) -> bool:
        return self.grader.open_scale or self.otherwise != 0

    def graders(self) -> dict[str, Grader]:
        return {**self.gates, "score": self.grader}

    def composed(self, scores: dict[str, float]) -> float:
        return scores["score"] if all(scores[name] >= self.threshold for name in self.gates) else self.otherwise
