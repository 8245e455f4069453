"""On-policy training as an iterator: it samples from the policy as it is now, and hands out updates.

The state that a checkpoint needs is what has been sampled and not yet learned from, and a few counters; every draw is addressed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.errors import RunError
from posttrain.rl.drawing import Graded, Source
from posttrain.rl.plan import Rollout
from posttrain.text import Grade, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Batch
    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles
    from posttrain.objectives import OnPolicy


ENDED = 0.02  # the share of programs that end before their tests, from which on it is said
BARREN = 10  # rollouts in a row without anything to learn from, after which a run gives up


@dataclass(frozen=True)
class Rolled:
    """Minibatch of a rollout, with what is worth logging of the rollout it came from (on its first minibatch only)."""

    batch: "Batch"
    labels: tuple[str, ...]
    stats: dict[str, tuple[float, int]]
    samples: tuple[tuple[Sample, Grade], ...] = ()


class OnPolicyStream:
    """Yields minibatches of credited samples, rollout by rollout."""

    def __init__(
        self, objective: "OnPolicy", source: Source, plan: Rollout, policy: "LM", roles: "Roles", seed: int,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:  # fmt: skip
        self.say = say
        self.objective = objective.planned(plan.sampling.max_tokens)
        self.refills = objective.refills if plan.refill is None else plan.refill
        self.source, self.plan, self.policy, self.roles, self.seed = source, plan, policy, roles, seed
        self.rollout = 0  # rollouts taken so far
        self.updates = 0  # minibatches handed out so far
        self.batch: Batch | None = None
        self.failed = 0.0  # the largest share of samples that could not be graded, and that was mentioned
        self.ended = 0.0  # the largest share of programs that ended early, and that was mentioned
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

    def _sample(self) -> tuple[dict[str, tuple[float, int]], tuple[Graded, ...]]:
        """Takes and credits one rollout, and plans its updates."""
        self.rollout += 1
        drawn = self.source.take(self.rollout, self.updates)
        if self.rollout == 1:
            self._mention_constant([grade for _, grade in drawn.all])
        samples, grades = [one for one, _ in drawn.learned], [grade for _, grade in drawn.learned]
        self.batch, owners = self.objective.credit(samples, grades, self.policy, self.roles, self.plan.sampling.temperature)
        self.pending = self._minibatches(owners)
        stats = describe(*zip(*drawn.all, strict=True))
        if self.refills:
            kept = {one.problem.id for one in samples if one.by == "policy"}
            stats["filled"] = (float(len(kept)), self.plan.problems)
        self._mention_ended(stats)
        self._mention_failures(drawn.all)
        stale = [self.updates - one.version for one, _ in drawn.all]
        if any(stale):
            stats["stale"] = (float(sum(stale)), len(stale))
        return stats, drawn.all

    def _mention_ended(self, stats: dict[str, tuple[float, int]]) -> None:
        """Programs that do not live to the end of their tests may have learned to leave early."""
        for name, (total, count) in stats.items():
            share = total / count
            if name.endswith("/ended_early") and share > max(ENDED, 2 * self.ended):
                self.ended = share
                self.say(
                    f"{share:.1%} of the programs of rollout {self.rollout} ended before their tests did: where that grows, a "
                    "policy is learning to leave; read the samples"
                )

    def _mention_failures(self, drawn: Sequence[Graded]) -> None:
        """Samples without a grade, when they begin and where they become more."""
        why = [grade.failure for _, grade in drawn if grade.score is None]
        if len(why) > 2 * self.failed * len(drawn):
            self.failed = len(why) / len(drawn)
            left_out = f"{len(why)} of {len(drawn)} samples of rollout {self.rollout} could not be graded and are left out"
            self.say(f"{left_out}: {why[0]}")

    def _mention_constant(self, grades: Sequence[Grade]) -> None:
        """Of the first rollout, where it has only one reward."""
        scores = {grade.score for grade in grades if grade.score is not None}
        if len(scores) == 1 and len(grades) > 1:
            self.say(
                f"every answer of rollout 1 has the same reward, {next(iter(scores)):g}: a constant reward teaches nothing; "
                "look at the samples and the grader"
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
            "stream": self.source.state(), "rollout": self.rollout, "updates": self.updates, "pending": self.pending,
        }  # fmt: skip
        if self.batch is None:
            return plain, {}
        from posttrain.batch import flattened

        values, tensors = flattened(self.batch)
        return {**plain, "batch": values}, tensors

    def load(self, plain: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
        from posttrain.batch import rebuilt

        self.source.load(plain["stream"])
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
