"""Updates: what one optimizer step learns from. Data and on-policy sampling come to the loop in this one form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.data.stream import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Batch
    from posttrain.objectives import Objective
    from posttrain.rl import OnPolicyStream
    from posttrain.text import Grade, RenderedRow, Sample


@dataclass(frozen=True)
class Item:
    """A batch for an objective; labels[i] says where row i came from, for messages. `weight`: of its loss in the update's; its
    figures are logged under `name`, where it has one."""

    objective: "Objective"
    batch: "Batch"
    labels: Sequence[str]
    weight: float = 1.0
    name: str = ""


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
        self, objective: "Objective", table: "list[list[RenderedRow]]", places: list[list[str]], weights: Sequence[float] | None,
        rows: int, seed: int, references: "list[Tensor] | None" = None,
    ) -> None:  # fmt: skip
        """table[s][i]: row i of source s, from places[s][i]; references[s][i]: what the reference says of it, if it is known."""
        self.objective, self.table, self.places, self.rows, self.references = objective, table, places, rows, references
        self.stream = Stream([len(each) for each in table], weights, seed)

    def __next__(self) -> Update:
        from posttrain import batch as batches

        chosen = self.stream.take(self.rows)
        batch = getattr(batches, self.objective.reads).from_rows([self.table[source][row] for source, row in chosen])
        if self.references is not None:
            import torch

            batch = batch.with_refs(*torch.stack([self.references[source][row] for source, row in chosen]).unbind(1))
        return Update((Item(self.objective, batch, [self.places[source][row] for source, row in chosen]),))

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


class Mixed:
    """The updates of a stage, each with rows of something else to learn from beside."""

    def __init__(self, first: Updates, beside: Updates, weight: float) -> None:
        self.first, self.beside, self.weight = first, beside, weight

    def __next__(self) -> Update:
        update = next(self.first)
        more = [replace(item, weight=self.weight, name="mix/") for item in next(self.beside).items]
        return replace(update, items=(*update.items, *more))

    def state(self) -> "tuple[dict[str, Any], dict[str, Tensor]]":
        plain, tensors = self.first.state()
        return {"first": plain, "beside": self.beside.state()[0]}, tensors

    def load(self, plain: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
        self.first.load(plain["first"], tensors)
        self.beside.load(plain["beside"], {})
