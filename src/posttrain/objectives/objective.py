"""Objectives: what signal moves the parameters. Sums and units, never means: the loop divides by the whole update's units."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.component import Component

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles
    from posttrain.text import Grade, Sample


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

    @property
    def needs(self) -> frozenset[str]:
        """The frozen roles that it asks for."""
        return frozenset()

    def units(self, batch: Any) -> dict[str, int]:
        """What each loss term is counted in, from masks alone: {term: tokens, sequences or pairs}."""
        raise NotImplementedError

    def loss(self, policy: "LM", batch: Any) -> Loss:
        """Sums over the batch; a batch with nothing to train gives a zero that back-propagates."""
        raise NotImplementedError


class OnPolicy(Objective):
    """An objective that learns from what the policy itself samples."""

    def credit(self, samples: "Sequence[Sample]", grades: "Sequence[Grade]", frozen: "Roles", temperature: float) -> Any:
        """A batch from graded samples. Samples whose grade is a failure take no part in anything."""
        raise NotImplementedError
