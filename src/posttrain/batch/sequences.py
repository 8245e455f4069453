"""Token sequences laid end to end, and what every type of batch offers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from posttrain.text import RenderedRow


@dataclass(frozen=True, slots=True)
class Sequences:
    """B token sequences laid end to end; sequence b is tokens[starts[b]:starts[b + 1]]."""

    tokens: Int[Tensor, " T"]
    starts: Int[Tensor, " edges"]
    train: Bool[Tensor, " T"]
    weight: Float[Tensor, " B"] | None = None

    @classmethod
    def from_rows(cls, rows: Sequence["RenderedRow"]) -> "Sequences":
        return cls.of([row.sequences[0] for row in rows])

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]], weight: Sequence[float] | None = None) -> "Sequences":
        """From (tokens, train) rows. Raises ValueError where the lengths differ or a first token is trained."""
        for tokens, train in rows:
            if len(tokens) != len(train):
                raise ValueError(f"{len(tokens)} tokens but {len(train)} training marks")
            if len(train) and train[0]:
                raise ValueError("the first token of a sequence cannot be trained: nothing predicts it")
        flat = torch.tensor([token for tokens, _ in rows for token in tokens], dtype=torch.long)
        marks = torch.tensor([mark for _, train in rows for mark in train], dtype=torch.bool)
        starts = torch.tensor([0] + [len(tokens) for tokens, _ in rows]).cumsum(0)
        return cls(flat, starts, marks, None if weight is None else torch.tensor(weight, dtype=torch.float32))

    @classmethod
    def joined(cls, several: "Sequence[Sequences]") -> "Sequences":
        """All sequences of several batches, in order; their weights are left out."""
        starts = torch.cat([several[0].starts[:1], torch.cat([each.lengths for each in several]).cumsum(0)])
        return cls(torch.cat([each.tokens for each in several]), starts, torch.cat([each.train for each in several]))

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    @property
    def sequences(self) -> "tuple[Sequences, ...]":
        return (self,)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        return self.starts.diff()

    @property
    def trained(self) -> int:
        """N, the number of trained tokens."""
        return int(self.train.sum())

    @property
    def owner(self) -> Int[Tensor, " N"]:
        """The sequence that each trained token belongs to."""
        return torch.arange(self.count, device=self.tokens.device).repeat_interleave(self.lengths)[self.train]

    @property
    def trained_lengths(self) -> Int[Tensor, " B"]:
        """The number of trained tokens of each sequence."""
        total = torch.zeros(len(self.tokens) + 1, dtype=torch.long, device=self.tokens.device)
        total[1:] = self.train.cumsum(0)
        return total[self.starts].diff()

    def rows(self) -> list[list[int]]:
        """The token ids of each sequence."""
        flat, edges = self.tokens.tolist(), self.starts.tolist()
        return [flat[a:b] for a, b in pairwise(edges)]

    @property
    def row_tokens(self) -> list[tuple[list[int], ...]]:
        """The token sequences that make up each row of the batch."""
        return [(row,) for row in self.rows()]

    def trained_tokens(self, rows: Sequence[int]) -> Bool[Tensor, " N"]:
        """Which of the N trained tokens belong to `rows`."""
        chosen = torch.zeros(self.count, dtype=torch.bool, device=self.tokens.device)
        chosen[list(rows)] = True
        return chosen[self.owner]

    def select(self, rows: Sequence[int]) -> "Sequences":
        """The given sequences, in ascending order."""
        rows = sorted(rows)
        edges = self.starts.tolist()
        index = torch.cat([torch.arange(edges[r], edges[r + 1]) for r in rows] or [torch.arange(0)]).to(self.tokens.device)
        starts = torch.tensor([0] + [edges[r + 1] - edges[r] for r in rows], device=self.starts.device).cumsum(0)
        weight = None if self.weight is None else self.weight[rows]
        return replace(self, tokens=self.tokens[index], starts=starts, train=self.train[index], weight=weight)

    def to(self, device: "torch.device | str") -> "Sequences":
        return moved(self, device)


@dataclass(frozen=True, slots=True)
class Answers:
    """A batch each of whose rows is one sequence."""

    seqs: Sequences

    @property
    def count(self) -> int:
        return self.seqs.count

    @property
    def sequences(self) -> tuple[Sequences, ...]:
        return (self.seqs,)

    @property
    def row_tokens(self) -> list[tuple[list[int], ...]]:
        return self.seqs.row_tokens

    def to(self: "AnyAnswers", device: "torch.device | str") -> "AnyAnswers":
        return moved(self, device)


AnyAnswers = TypeVar("AnyAnswers", bound=Answers)


@runtime_checkable
class Batch(Protocol):
    """What every batch type offers, so that one function can cut any of them into micro-batches."""

    @property
    def count(self) -> int: ...
    @property
    def sequences(self) -> tuple[Sequences, ...]: ...
    @property
    def row_tokens(self) -> list[tuple[list[int], ...]]: ...
    def select(self, rows: Sequence[int]) -> "Batch": ...
    def to(self, device: "torch.device | str") -> "Batch": ...


AnyBatch = TypeVar("AnyBatch")


def moved(batch: AnyBatch, device: "torch.device | str") -> AnyBatch:
    """The same batch with every tensor on `device`, through nested batches."""
    changed: dict[str, Any] = {}
    for each in fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, each.name)
        if isinstance(value, Tensor):
            changed[each.name] = value.to(device)
        elif is_dataclass(value):
            changed[each.name] = moved(value, device)
    return replace(batch, **changed)  # type: ignore[type-var]
