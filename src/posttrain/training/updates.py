"""Updates: what one optimizer step learns from. Data and on-policy sampling come to the loop in this one form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.data.stream import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Batch
    from posttrain.data.dataset import Rendered
    from posttrain.objectives import Objective
    from posttrain.rl import OnPolicyStream
    from posttrain.text import Grade, Sample


@dataclass(frozen=True)
class Item:
    """A batch for an objective; labels[i] says where row i came from, for messages."""

    objective: "Objective"
    batch: "Batch"
    labels: Sequence[str]


@dataclass(frozen=True)
class Update:
    """Usually one item; several for mixtures. stats: (sum, count) known before the update; samples: drawn for it."""

    items: tuple[Item, ...]
    stats: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    samples: "Sequence[tuple[Sample, Grade]]" = ()


class Updates(Protocol):
    """An endless source of updates whose state is a few plain values and tensors."""

    def __next__(self) -> Update: ...
    def state(self) -> "tuple[dict[str, Any], dict[str, Tensor]]": ...
    def load(self, plain: dict[str, Any], tensors: "dict[str, Tensor]") -> None: ...


class RowUpdates:
    """Rows of data files in the stream's order."""

    def __init__(
        self, objective: "Objective", rendered: "Rendered", weights: Sequence[float] | None, rows: int, seed: int
    ) -> None:
        self.objective, self.rendered, self.rows = objective, rendered, rows
        self.stream = Stream([len(each) for each in rendered.rows], weights, seed)

    def __next__(self) -> Update:
        from posttrain.batch import Sequences

        chosen = self.stream.take(self.rows)
        batch = Sequences.of([self.rendered.rows[source][row] for source, row in chosen])
        return Update((Item(self.objective, batch, [self.rendered.places[source][row] for source, row in chosen]),))

    def state(self) -> "tuple[dict[str, Any], dict[str, Tensor]]":
        return self.stream.state(), {}

    def load(self, plain: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
        self.stream.load(plain)


class SampledUpdates:
    """Minibatches of what the policy samples."""

    def __init__(self, stream: "OnPolicyStream") -> None:
        self.stream = stream

    def __next__(self) -> Update:
        rolled = next(self.stream)
        return Update((Item(self.stream.objective, rolled.batch, rolled.labels),), rolled.stats, rolled.samples)

    def state(self) -> "tuple[dict[str, Any], dict[str, Tensor]]":
        return self.stream.state()

    def load(self, plain: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
        self.stream.load(plain, tensors)
