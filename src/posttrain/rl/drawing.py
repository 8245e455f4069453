"""Where rollouts come from: problems are drawn, answered by the policy as it is now, and graded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.errors import RunError
from posttrain.rl.curriculum import Deck
from posttrain.rl.plan import Rollout
from posttrain.sampling import Sampler, Sampling, sample
from posttrain.text import Grade, Problem, Sample

if TYPE_CHECKING:
    from posttrain.data.render import Template
    from posttrain.environments import Environment
    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles
    from posttrain.objectives import OnPolicy
    from posttrain.tasks import Grader

Graded = tuple[Sample, Grade]


@dataclass(frozen=True)
class Drawn:
    """The samples of a rollout. all: what was drawn from the policy; learned: what is learned from, others' answers among it."""

    all: tuple[Graded, ...]
    learned: tuple[Graded, ...]


class Source(Protocol):
    """Rollouts, one after another."""

    def take(self, rollout: int, version: int) -> Drawn:
        """Number `rollout`, drawn when the policy had learned from `version` updates, or from fewer."""
        ...

    def state(self) -> dict[str, Any]:
        """Which problems have been drawn, up to what was taken last."""
        ...

    def load(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Drawer:
    """Draws rollouts in this process, from the policy as it is when it is asked."""

    def __init__(
        self, objective: "OnPolicy", problems: Sequence[Problem], grader: "Grader", sampler: Sampler, plan: Rollout, policy: "LM",
        template: "Template", roles: "Roles", seed: int, environment: "Environment | None" = None,
    ) -> None:  # fmt: skip
        grader.prepare(template)
        self.objective, self.grader, self.environment = objective, grader, environment
        self.refills = objective.refills if plan.refill is None else plan.refill
        self.sampler, self.plan = sampler, plan
        self.policy, self.template, self.roles, self.seed = policy, template, roles, seed
        self.deck = Deck(problems, plan.curriculum, seed)
        self.rollout = self.version = 0

    def take(self, rollout: int, version: int) -> Drawn:
        self.rollout, self.version = rollout, version
        drawn = self._draw()
        kept = self._refilled(drawn)
        others = self._others(list({one.problem.id: one.problem for one, _ in kept}.values()))
        return Drawn(tuple(drawn), (*kept, *zip(others, self.grader.grades(others), strict=True)))

    def state(self) -> dict[str, Any]:
        return self.deck.state()

    def load(self, state: dict[str, Any]) -> None:
        self.deck.load(state)

    def close(self) -> None:
        """Nothing is held."""

    def _draw(self, *address: int | str) -> list[tuple[Sample, Grade]]:
        """The policy's answers to the next problems, and their grades."""
        samples = self._answers(self.policy, self.deck.take(self.plan.problems), *address)
        grades = self.grader.grades(samples)
        self._check_failures(grades)
        drawn = list(zip(samples, grades, strict=True))
        self.deck.measured(drawn)
        return drawn

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
            self.seed, address=("rollout", self.rollout, *address), version=self.version, environment=self.environment,
        )  # fmt: skip

    def _check_failures(self, grades: Sequence[Grade]) -> None:
        failures = [grade.failure for grade in grades if grade.score is None]
        if len(failures) > self.plan.max_failures * len(grades) or len(failures) == len(grades):
            raise RunError(
                f"{len(failures)} of {len(grades)} samples could not be graded (rollout {self.rollout}): {failures[0]}; "
                "a failure is not a score, so nothing was learned from them; mend that, then run again to resume"
            )


def mixed(drawn: Sequence[tuple[Sample, Grade]]) -> dict[str, list[tuple[Sample, Grade]]]:
    """The answers to each problem, by its id, where their scores differ."""
    groups: dict[str, list[tuple[Sample, Grade]]] = {}
    for one, grade in drawn:
        groups.setdefault(one.problem.id, []).append((one, grade))
    return {name: pairs for name, pairs in groups.items() if len({grade.score for _, grade in pairs} - {None}) > 1}
