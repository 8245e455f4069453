"""On-policy training as an iterator: it samples from the policy as it is now, and hands out updates.

The state that a checkpoint needs is what has been sampled and not yet learned from, and a few counters; every draw is addressed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from posttrain.component import Settings
from posttrain.errors import RunError
from posttrain.sampling import Sampler, Sampling, sample
from posttrain.text import Grade, Problem, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Rollouts
    from posttrain.data.render import Template
    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles
    from posttrain.objectives import OnPolicy
    from posttrain.tasks import Grader


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

    batch: "Rollouts"
    labels: tuple[str, ...]
    stats: dict[str, tuple[float, int]]
    samples: tuple[tuple[Sample, Grade], ...] = ()


class OnPolicyStream:
    """Yields minibatches of credited samples. Nothing is sampled before the previous update has been applied."""

    def __init__(
        self, objective: "OnPolicy", problems: Sequence[Problem], grader: "Grader", sampler: Sampler, plan: Rollout,
        policy: "LM", template: "Template", roles: "Roles", seed: int,
    ) -> None:  # fmt: skip
        from posttrain.data.stream import Stream

        self.objective, self.problems, self.grader, self.sampler, self.plan = objective, problems, grader, sampler, plan
        self.policy, self.template, self.roles, self.seed = policy, template, roles, seed
        self.stream = Stream([len(problems)], None, seed)
        self.rollout = 0  # rollouts sampled so far
        self.updates = 0  # minibatches handed out so far
        self.batch: Rollouts | None = None
        self.pending: list[list[int]] = []  # rows of self.batch still to be learned from, one list an update

    def __next__(self) -> Rolled:
        stats: dict[str, tuple[float, int]] = {}
        samples: tuple[tuple[Sample, Grade], ...] = ()
        if not self.pending:
            stats, samples = self._sample()
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
        samples = sample(
            self.sampler, self.policy, self.template, problems, self.plan.per_problem, self.plan.sampling, self.seed,
            address=("rollout", self.rollout), version=self.updates,
        )  # fmt: skip
        grades = self.grader.grade_all(samples)
        self._check_failures(grades)
        self.batch = self.objective.credit(samples, grades, self.roles, self.plan.sampling.temperature)
        self.pending = self._minibatches(
            [sample.problem.id for sample, grade in zip(samples, grades, strict=True) if grade.score is not None]
        )
        return describe(samples, grades), tuple(zip(samples, grades, strict=True))

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
            for part in np.array_split(order, min(self.plan.minibatches, len(members))):
                plan.append([row for group in part for row in members[group]])
        return plan

    def state(self) -> "tuple[dict[str, Any], dict[str, Tensor]]":
        """(plain values, tensors): counters, and the rollout that is not used up yet."""
        plain: dict[str, Any] = {
            "stream": self.stream.state(), "rollout": self.rollout, "updates": self.updates, "pending": self.pending,
        }  # fmt: skip
        if self.batch is None:
            return plain, {}
        plain["temperature"] = self.batch.temperature
        names = ("sampled_logp", "advantage", "version", "old_logp", "ref_logp")
        tensors = {name: value for name in names if (value := getattr(self.batch, name)) is not None}
        seqs = {f"seqs.{name}": getattr(self.batch.seqs, name) for name in ("tokens", "starts", "train")}
        return plain, {**tensors, **seqs}

    def load(self, plain: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
        from posttrain.batch import Rollouts, Sequences

        self.stream.load(plain["stream"])
        self.rollout, self.updates, self.pending = plain["rollout"], plain["updates"], plain["pending"]
        self.batch = None
        if tensors:
            seqs = Sequences(tensors["seqs.tokens"], tensors["seqs.starts"], tensors["seqs.train"].bool())
            rest = {name: value for name, value in tensors.items() if not name.startswith("seqs.")}
            self.batch = Rollouts(seqs, temperature=plain["temperature"], **rest)


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
        "mixed_groups": (float(sum(len(each) > 1 for each in groups.values())), len(groups)),
    }
    for name in sorted({part for grade in grades for part in grade.parts}):
        values = [grade.parts[name] for grade in grades if name in grade.parts]
        stats[f"reward/{name}"] = (sum(values), len(values))
    return stats
