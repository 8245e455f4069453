"""Objectives: what signal moves the parameters. Sums and units, never means: the loop divides by the whole update's units."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from posttrain.component import Component

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from posttrain.models.roles import Roles
    from posttrain.text import Grade, RenderedRow, Row, Sample

Stats = "dict[str, tuple[Tensor | float, int]]"


@dataclass(frozen=True)
class Loss:
    """terms: sums with a gradient, by name. stats: (sum, count) of quantities to log, without gradient."""

    terms: "dict[str, Tensor]"
    stats: "dict[str, tuple[Tensor | float, int]]" = field(default_factory=dict)


class Objective(Component):
    """What signal moves the parameters."""

    reads: ClassVar[str]
    """The name of the batch type in posttrain.batch."""
    rows: ClassVar[frozenset[str]] = frozenset()
    """The names of the row types in posttrain.text that it learns from; empty for objectives that sample their own."""
    measures: ClassVar[tuple[str, ...]] = ()
    """The figures of held-out rows, beside `loss`, by which the best weights may be chosen."""
    scores: ClassVar[bool] = False
    """Whether it trains a model that scores (a ScalarLM), not one that writes (an LM)."""
    reference_per_row: ClassVar[bool] = False
    """Whether what it asks of the reference is known of each row alone, so that it can be computed once and kept."""
    trains: ClassVar[frozenset[str]] = frozenset()
    """The roles that it trains beside the policy: `critic`."""

    @property
    def needs(self) -> frozenset[str]:
        """The frozen roles that it asks for."""
        return frozenset()

    def controls(self) -> dict[str, float]:
        """What its controllers begin with, by name; they live in `roles.controls` and are part of a run's state."""
        return {}

    def settled(self, rows: "Sequence[Row]") -> Self:
        """With what it finds in all the rows that it learns from, such as their labels. Raises DataError."""
        return self

    def check_rows(self, rows: "Sequence[Row]", learning: bool = True) -> None:
        """Refuses, before any weight is read, rows that it cannot learn from, or cannot be measured on. Raises DataError."""

    def split(self, row: "RenderedRow") -> "tuple[RenderedRow, ...]":
        """The rows that a rendered row is for it."""
        return (row,)

    def units(self, batch: Any) -> dict[str, int]:
        """What each loss term is counted in, from masks alone: {term: tokens, sequences or pairs}."""
        raise NotImplementedError

    def annotate(self, batch: Any, policy: Any, roles: "Roles") -> Any:
        """The batch with what is known before the update: reference log-probs, batch statistics. Once an update, no gradient."""
        return batch

    def loss(self, policy: Any, batch: Any) -> Loss:
        """Sums over the batch; a batch with nothing to train gives a zero that back-propagates."""
        raise NotImplementedError

    def learned(self, figures: "Mapping[str, float]", controls: dict[str, float]) -> None:
        """Called after each update with its figures: where controllers move."""


class OnPolicy(Objective):
    """An objective that learns from what the policy itself samples."""

    refills: ClassVar[int] = 0
    """How often, by default, further problems are drawn in place of those whose answers all have one score."""

    @property
    def also_samples(self) -> frozenset[str]:
        """Who answers each problem beside the policy: `reference`, as often as it; `greedy`, the policy's likeliest answer."""
        return frozenset()

    def check_rollout(self, problems: int, per_problem: int) -> None:
        """Refuses a plan of rollouts that it cannot learn from. Raises ValueError."""

    def planned(self, max_tokens: int) -> Self:
        """With what it takes from the plan of sampling: the most tokens of an answer."""
        return self

    def credit(
        self, samples: "Sequence[Sample]", grades: "Sequence[Grade]", policy: Any, roles: "Roles", temperature: float
    ) -> "tuple[Any, list[str]]":
        """A batch from graded samples, and the id of the problem that each of its rows answers.

        Samples whose grade is a failure take no part in anything.
        """
        raise NotImplementedError
