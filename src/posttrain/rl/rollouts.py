"""On-policy training as an iterator: it samples from the policy as it is now, and hands out updates.

The state that a checkpoint needs is what has been sampled and not yet learned from, and a few counters; every draw is addressed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from posttrain.component import Settings
from posttrain.errors import RunError
from posttrain.sampling import Sampler, Sampling, sample
from posttrain.text import Grade, Problem, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Batch
    from posttrain.data.render import Template
    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles
    from posttrain.objectives import OnPolicy
    from posttrain.tasks import Grader


BARREN = 10  # rollouts in a row without anything to learn from, after which a run gives up


class Rollout(Settings):
    """How much is sampled, and how often it is learned from."""

    problems: PositiveInt = 32
    """Problems sampled at a time."""
    per_problem: PositiveInt = 8
    """Samples of each problem: the group."""
    epochs: PositiveInt = 1
    """How often each sample is learned from."""
    minibatches: PositiveInt = 1
    """Updates an epoch; each takes whole groups."""
    sampling: Sampling = Sampling()
    """How tokens are drawn."""
    max_failures: float = Field(default=0.5, ge=0, lt=1)
    """The run stops when a larger share of samples could not be graded. A failure is not a score."""


@dataclass(frozen=True)
class Rolled:
    """Minibatch of a rollout, with what is worth logging of the rollout it came from (on its first minibatch only)."""

    batch: "Batch"
    labels: tuple[str, ...]
    stats: dict[str, tuple[float, int]]
    samples: tuple[tuple[Sample, Grade], ...] = ()


class OnPolicyStream:
    """Yields minibatches of credited samples. Nothing is sampled before the previous update has been applied."""

    def __init__(
        self, objective: "OnPolicy", problems: Sequence[Problem], grader: "Grader", sampler: Sampler, plan: Rollout,
        policy: "LM", template: "Template", roles: "Roles", seed: int, say: Callable[[str], None] = lambda _line: None,
    ) -> None:  # fmt: skip
        from posttrain.data.stream import Stream

        grader.prepare(template)
        self.say = say

        self.objective, self.problems, self.grader, self.sampler, self.plan = objective, problems, grader, sampler, plan
        self.policy, self.template, self.roles, self.seed = policy, template, roles, seed
        self.stream = Stream([len(problems)], None, seed)
        self.rollout = 0  # rollouts sampled so far
        self.updates = 0  # minibatches handed out so far
        self.batch: Batch | None = None
        self.pending: list[list[int]] = []  # rows of self.batch still to be learned from, one list an update

    def __next__(self) -> Rolled:
        stats: dict[str, tuple[float, int]] = {}
        samples: tuple[tuple[Sample, Grade], ...] = ()
        for _ in range(BARREN):
            if self.pending:
                break
            stats, samples = self._sample()
        if not self.pending:
            raise RunError(
                f"{BARREN} rollouts in a row gave nothing to learn from (up to rollout {self.rollout}): {objective_hint(stats)}"
            )
        assert self.batch is not None
        rows = self.pending.pop(0)
        self.updates += 1
        minibatch = self.batch.select(rows)
        labels = tuple(f"rollout {self.rollout}, sample {row}" for row in sorted(rows))
        if not self.pending:
            self.batch = None
        return Rolled(minibatch, labels, stats, samples)

    def _sample(self) -> tuple[dict[str, tuple[float, int]], tuple[tuple[Sample, Grade], ...]]:
        """Samples, grades and credits one rollout, and plans its updates."""
        self.rollout += 1
        chosen = [self.problems[row] for _, row in self.stream.take(self.plan.problems)]
        problems = list({problem.id: problem for problem in chosen}.values())
        samples = self._answers(self.policy, problems)
        grades = self.grader.grade_all(samples)
        self._check_failures(grades)
        drawn = tuple(zip(samples, grades, strict=True))
        others: list[Sample] = []
        if self.objective.samples_reference:
            assert self.roles.reference is not None
            with self.roles.reference.switch():
                others = [replace(one, by="reference") for one in self._answers(self.roles.reference.lm, problems, "reference")]
        samples, grades = [*samples, *others], [*grades, *self.grader.grade_all(others)]
        temperature = self.plan.sampling.temperature
        self.batch, owners = self.objective.credit(samples, grades, self.policy, self.roles, temperature)
        self.pending = self._minibatches(owners)
        self._mention_constant(grades)
        return describe(*zip(*drawn, strict=True)), drawn

    def _answers(self, policy: "LM", problems: Sequence[Problem], *address: str) -> list[Sample]:
        return sample(
            self.sampler, policy, self.template, problems, self.plan.per_problem, self.plan.sampling, self.seed,
            address=("rollout", self.rollout, *address), version=self.updates,
        )  # fmt: skip

    def _mention_constant(self, grades: Sequence[Grade]) -> None:
        """Once a run, where the first rollout has only one reward."""
        scores = {grade.score for grade in grades if grade.score is not None}
        if self.rollout == 1 and len(scores) == 1 and len(grades) > 1:
            self.say(
                f"every answer of rollout 1 has the same reward, {next(iter(scores)):g}: a constant reward teaches nothing; "
                "look at the samples and the grader"
            )

    def _check_failures(self, grades: Sequence[Grade]) -> None:
        failures = [grade.failure for grade in grades if grade.score is None]
        if len(failures) > self.plan.max_failures * len(grades) or len(failures) == len(grades):
            raise RunError(
                f"{len(failures)} of {len(grades)} samples could not be graded (rollout {self.rollout}): {failures[0]}; "
                "a failure is not a score, so nothing was learned from them; mend the grader, then run again to resume"
            )

    def _minibatches(self, owners: Sequence[str]) -> list[list[int]]:
        """Whole groups, shuffled anew for each epoch."""
        import numpy as np

        from posttrain import draws

        groups: dict[str, list[int]] = {}
        for row, owner in enumerate(owners):
            groups.setdefault(owner, []).append(row)
        members, plan = list(groups.values()), []
        for epoch in range(self.plan.epochs):
            order = draws.generator(self.seed, "minibatches", self.rollout, epoch).permutation(len(members))
            for part in np.array_split(order, max(1, min(self.plan.minibatches, len(members)))):
                plan.append([row for group in part for row in members[group]])
        return [rows for rows in plan if rows]

    def state(self) -> "tuple[dict[str, Any], dict[str, Tensor]]":
        """(plain values, tensors): counters, and the rollout that is not used up yet."""
        plain: dict[str, Any] = {
            "stream": self.stream.state(), "rollout": self.rollout, "updates": self.updates, "pending": self.pending,
        }  # fmt: skip
        if self.batch is None:
            return plain, {}
        from posttrain.batch import flattened

        values, tensors = flattened(self.batch)
        return {**plain, "batch": values}, tensors

    def load(self, plain: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
        from posttrain.batch import rebuilt

        self.stream.load(plain["stream"])
        self.rollout, self.updates, self.pending = plain["rollout"], plain["updates"], plain["pending"]
        self.batch = rebuilt(self.objective.reads, plain["batch"], tensors) if tensors else None


def objective_hint(stats: dict[str, tuple[float, int]]) -> str:
    """What the last of them looked like, for a message."""
    reward, count = stats["reward"]
    return (
        f"the answers to each problem have equal scores (mean reward {reward / max(1, count):g}) or are the same; "
        "take easier or harder problems, more answers of each (rollout.per_problem), or a grader that tells more apart"
    )


def describe(samples: Sequence[Sample], grades: Sequence[Grade]) -> dict[str, tuple[float, int]]:
    """(sum, count) of what a person wants to see of a rollout: reward and its parts, length, how many groups teach something."""
    scored = [(one, grade.score) for one, grade in zip(samples, grades, strict=True) if grade.score is not None]
    groups: dict[str, set[float]] = {}
    for one, score in scored:
        groups.setdefault(one.problem.id, set()).add(score)
    stats: dict[str, tuple[float, int]] = {
        "reward": (sum(score for _, score in scored), len(scored)),
        "length": (float(sum(len(one.logp) for one in samples)), len(samples)),
        "cut_off": (float(sum(one.stop == "length" for one in samples)), len(samples)),
        "ungraded": (float(len(samples) - len(scored)), len(samples)),
    }
    if len(scored) > len(groups):
        stats["mixed_groups"] = (float(sum(len(each) > 1 for each in groups.values())), len(groups))
    for name in sorted({part for grade in grades for part in grade.parts}):
        values = [grade.parts[name] for grade in grades if name in grade.parts]
        stats[f"reward/{name}"] = (sum(values), len(values))
    return stats
