"""On-policy training as an iterator: it samples from the policy as it is now, and hands out updates.

The state that a checkpoint needs is what has been sampled and not yet learned from, and a few counters; every draw is addressed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from posttrain.component import Settings
from posttrain.errors import RunError
from posttrain.sampling import Sampler, Sampling, sample
from posttrain.text import Grade, Problem, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Batch
    from posttrain.data.render import Template
    from posttrain.environments import Environment
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
    refill: NonNegativeInt | None = None
    """How often, at most, further problems are drawn in place of those whose answers all have one score, until `problems` of
    mixed scores are there (dynamic sampling, arXiv 2503.14476); null: as the objective has it (dapo 10, others 0)."""
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
        environment: "Environment | None" = None,
    ) -> None:  # fmt: skip
        from posttrain.data.stream import Stream

        grader.prepare(template)
        self.say, self.environment = say, environment
        self.objective = objective.planned(plan.sampling.max_tokens)
        self.refills = objective.refills if plan.refill is None else plan.refill
        self.problems, self.grader, self.sampler, self.plan = problems, grader, sampler, plan
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
        drawn = self._draw()
        if self.rollout == 1:
            self._mention_constant([grade for _, grade in drawn])
        kept = self._refilled(drawn)
        samples, grades = [one for one, _ in kept], [grade for _, grade in kept]
        others = self._others(list({one.problem.id: one.problem for one in samples}.values()))
        temperature = self.plan.sampling.temperature
        self.batch, owners = self.objective.credit(
            [*samples, *others], [*grades, *self.grader.grades(others)], self.policy, self.roles, temperature
        )
        self.pending = self._minibatches(owners)
        stats = describe(*zip(*drawn, strict=True))
        if self.refills:
            stats["filled"] = (float(len({one.problem.id for one in samples})), self.plan.problems)
        return stats, tuple(drawn)

    def _draw(self, *address: int | str) -> list[tuple[Sample, Grade]]:
        """The policy's answers to the next problems, and their grades."""
        chosen = [self.problems[row] for _, row in self.stream.take(self.plan.problems)]
        samples = self._answers(self.policy, list({problem.id: problem for problem in chosen}.values()), *address)
        grades = self.grader.grades(samples)
        self._check_failures(grades)
        return list(zip(samples, grades, strict=True))

    def _refilled(self, drawn: list[tuple[Sample, Grade]]) -> list[tuple[Sample, Grade]]:
        """What is learned from: with `refill` the first `problems` whose answers differ in their scores. Adds to `drawn`."""
        if not self.refills:
            return drawn
        kept = mixed(drawn)
        for turn in range(1, self.refills + 1):
            if len(kept) >= self.plan.problems:
                break
            more = self._draw("refill", turn)
            drawn += more
            kept |= {name: pairs for name, pairs in mixed(more).items() if name not in kept}
        return [pair for _, pairs in zip(range(self.plan.problems), kept.values(), strict=False) for pair in pairs]

    def _others(self, problems: Sequence[Problem]) -> list[Sample]:
        """Answers that are not drawn from the policy, for those who ask for them."""
        found: list[Sample] = []
        if "reference" in self.objective.also_samples:
            assert self.roles.reference is not None
            with self.roles.reference.switch():
                found += [replace(one, by="reference") for one in self._answers(self.roles.reference.lm, problems, "reference")]
        if "greedy" in self.objective.also_samples:
            likeliest = self.plan.sampling.model_copy(update={"temperature": 0.0})
            answers = self._answers(self.policy, problems, "greedy", count=1, sampling=likeliest)
            found += [replace(one, by="greedy") for one in answers]
        return found

    def _answers(
        self, policy: "LM", problems: Sequence[Problem], *address: int | str, count: int | None = None,
        sampling: Sampling | None = None,
    ) -> list[Sample]:  # fmt: skip
        return sample(
            self.sampler, policy, self.template, problems, count or self.plan.per_problem, sampling or self.plan.sampling,
            self.seed, address=("rollout", self.rollout, *address), version=self.updates, environment=self.environment,
        )  # fmt: skip

    def _mention_constant(self, grades: Sequence[Grade]) -> None:
        """Of the first rollout, where it has only one reward."""
        scores = {grade.score for grade in grades if grade.score is not None}
        if len(scores) == 1 and len(grades) > 1:
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


def mixed(drawn: Sequence[tuple[Sample, Grade]]) -> dict[str, list[tuple[Sample, Grade]]]:
    """The answers to each problem, by its id, where their scores differ."""
    groups: dict[str, list[tuple[Sample, Grade]]] = {}
    for one, grade in drawn:
        groups.setdefault(one.problem.id, []).append((one, grade))
    return {name: pairs for name, pairs in groups.items() if len({grade.score for _, grade in pairs} - {None}) > 1}


def describe(samples: Sequence[Sample], grades: Sequence[Grade]) -> dict[str, tuple[float, int]]:
    """(sum, count) of what a person wants to see of a rollout: reward and its parts, length, how many groups teach something."""
    scored = [(one, grade.score) for one, grade in zip(samples, grades, strict=True) if grade.score is not None]
    groups: dict[tuple[str, int], set[float]] = {}
    turns: Counter[tuple[str, int]] = Counter()  # a problem may have been drawn more than once
    for one, score in scored:
        turns[one.problem.id, one.index] += 1
        groups.setdefault((one.problem.id, turns[one.problem.id, one.index]), set()).add(score)
    stats: dict[str, tuple[float, int]] = {
        "reward": (sum(score for _, score in scored), len(scored)),
        "length": (float(sum(len(one.logp) for one in samples)), len(samples)),
        "cut_off": (float(sum(one.stop != "end" for one in samples)), len(samples)),
        "ungraded": (float(len(samples) - len(scored)), len(samples)),
    }
    if len(scored) > len(groups):
        stats["mixed_groups"] = (float(sum(len(each) > 1 for each in groups.values())), len(groups))
    stats |= of_episodes(samples)
    for name in sorted({part for grade in grades for part in grade.parts}):
        values = [grade.parts[name] for grade in grades if name in grade.parts]
        stats[f"reward/{name}"] = (sum(values), len(values))
    return stats


def of_episodes(samples: Sequence[Sample]) -> dict[str, tuple[float, int]]:
    """(sum, count) of the turns of episodes, of what their environment counts, and of how many it has failed."""
    played = [one.transcript for one in samples if one.transcript is not None]
    if not played:
        return {}
    stats = {
        "turns": (float(sum(len(each.ends) for each in played)), len(played)),
        "environment_failed": (float(sum(each.failure is not None for each in played)), len(played)),
    }
    for name in sorted({name for each in played for name in each.counts}):
        stats[f"episode/{name}"] = (float(sum(each.counts.get(name, 0.0) for each in played)), len(played))
    return stats
