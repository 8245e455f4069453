"""The world of tensors. Legend: B sequences, T tokens laid end to end, N trained tokens.

Every per-token tensor is indexed by the token it is *about*: `train[i]`, `logp[i]` and `advantage[i]` all speak of "token i,
given the tokens before it in its sequence". Per-token results are flat over the N trained tokens, in order. Nothing predicts
the first token of a sequence, so it is never trained. There is no padding here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from posttrain.text import RenderedRow


AnyBatch = TypeVar("AnyBatch")


class Movable:
    """What all batches share."""

    __slots__ = ()

    def to(self: AnyBatch, device: "torch.device | str") -> AnyBatch:
        return moved(self, device)


@dataclass(frozen=True, slots=True)
class Sequences(Movable):
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


@dataclass(frozen=True, slots=True)
class Answers(Movable):
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


@dataclass(frozen=True, slots=True)
class Rollouts(Answers):
    """Sampled sequences with their credit; every tensor is flat over the N sampled tokens.

    sampled_logp: of the distribution that each token was drawn from; old_logp: the trainer's own, where the two differ;
    version: the update that the policy had when it sampled each sequence.
    """

    sampled_logp: Float[Tensor, " N"]
    advantage: Float[Tensor, " N"]
    version: Int[Tensor, " B"]
    old_logp: Float[Tensor, " N"] | None = None
    ref_logp: Float[Tensor, " N"] | None = None
    temperature: float = 1.0

    def select(self, rows: Sequence[int]) -> "Rollouts":
        rows = sorted(rows)
        kept = self.seqs.trained_tokens(rows)
        return replace(
            self,
            seqs=self.seqs.select(rows),
            version=self.version[rows],
            sampled_logp=self.sampled_logp[kept],
            advantage=self.advantage[kept],
            old_logp=None if self.old_logp is None else self.old_logp[kept],
            ref_logp=None if self.ref_logp is None else self.ref_logp[kept],
        )


@dataclass(frozen=True, slots=True)
class Valued(Movable):
    """Rollouts with what a critic learns from: its value of the state before each sampled token as they were sampled, and the
    return that it should have said."""

    rollouts: Rollouts
    value: Float[Tensor, " N"]
    returns: Float[Tensor, " N"]

    @property
    def count(self) -> int:
        return self.rollouts.count

    @property
    def sequences(self) -> tuple[Sequences, ...]:
        return self.rollouts.sequences

    @property
    def row_tokens(self) -> list[tuple[list[int], ...]]:
        return self.rollouts.row_tokens

    def select(self, rows: Sequence[int]) -> "Valued":
        kept = self.rollouts.seqs.trained_tokens(rows)
        return Valued(self.rollouts.select(rows), self.value[kept], self.returns[kept])


@dataclass(frozen=True, slots=True)
class Pairs(Movable):
    """P pairs of answers; the two sides of a pair begin with the same prompt.

    prefer: the probability that chosen wins; margin: by how much a reward must prefer it; chosen_ref, rejected_ref: the
    reference's log-probability of each answer, summed over its tokens; weight: of the pair's loss; theirs: of sampled pairs,
    whether the chosen side is the reference's answer and the rejected one the policy's.
    """

    chosen: Sequences
    rejected: Sequences
    prefer: Float[Tensor, " P"]
    margin: Float[Tensor, " P"]
    chosen_ref: Float[Tensor, " P"] | None = None
    rejected_ref: Float[Tensor, " P"] | None = None
    weight: Float[Tensor, " P"] | None = None
    theirs: Bool[Tensor, " P"] | None = None

    @classmethod
    def from_rows(cls, rows: Sequence["RenderedRow"]) -> "Pairs":
        prefer, margin = _columns(rows, 2)
        chosen, rejected = (Sequences.of([row.sequences[side] for row in rows]) for side in (0, 1))
        return cls(chosen, rejected, prefer, margin)

    @property
    def refs(self) -> tuple[Float[Tensor, " P"], ...]:
        """What the reference says of each row; nothing where it has not been asked."""
        return () if self.chosen_ref is None or self.rejected_ref is None else (self.chosen_ref, self.rejected_ref)

    def with_refs(self, *refs: Float[Tensor, " P"]) -> "Pairs":
        return replace(self, chosen_ref=refs[0], rejected_ref=refs[1])

    @property
    def count(self) -> int:
        return self.chosen.count

    @property
    def sequences(self) -> tuple[Sequences, ...]:
        return (self.chosen, self.rejected)

    @property
    def row_tokens(self) -> list[tuple[list[int], ...]]:
        return list(zip(self.chosen.rows(), self.rejected.rows(), strict=True))

    def select(self, rows: Sequence[int]) -> "Pairs":
        rows = sorted(rows)
        known = (self.chosen_ref, self.rejected_ref, self.weight, self.theirs)
        optional = (None if each is None else each[rows] for each in known)
        return Pairs(self.chosen.select(rows), self.rejected.select(rows), self.prefer[rows], self.margin[rows], *optional)


@dataclass(frozen=True, slots=True)
class Labelled(Answers):
    """Single answers that are good or bad. ref: the reference's summed log-probability of each; point: what a log-ratio (or a
    reward) is measured from, one value for the whole update."""

    good: Bool[Tensor, " B"]
    ref: Float[Tensor, " B"] | None = None
    point: Float[Tensor, " B"] | None = None

    @classmethod
    def from_rows(cls, rows: Sequence["RenderedRow"]) -> "Labelled":
        (good,) = _columns(rows, 1)
        return cls(Sequences.of([row.sequences[0] for row in rows]), good > 0.5)

    @property
    def refs(self) -> tuple[Float[Tensor, " B"], ...]:
        """What the reference says of each row; nothing where it has not been asked."""
        return () if self.ref is None else (self.ref,)

    def with_refs(self, *refs: Float[Tensor, " B"]) -> "Labelled":
        return replace(self, ref=refs[0])

    def select(self, rows: Sequence[int]) -> "Labelled":
        rows = sorted(rows)
        ref, point = (None if each is None else each[rows] for each in (self.ref, self.point))
        return Labelled(self.seqs.select(rows), self.good[rows], ref, point)


@dataclass(frozen=True, slots=True)
class Ranked(Movable):
    """For each of B prompts some answers with a score each: row b has sizes[b] of the S sequences, in order."""

    seqs: Sequences
    sizes: Int[Tensor, " B"]
    score: Float[Tensor, " S"]

    @classmethod
    def from_rows(cls, rows: Sequence["RenderedRow"]) -> "Ranked":
        sizes = torch.tensor([len(row.sequences) for row in rows], dtype=torch.long)
        score = torch.tensor([number for row in rows for number in row.numbers], dtype=torch.float32)
        return cls(Sequences.of([each for row in rows for each in row.sequences]), sizes, score)

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def sequences(self) -> tuple[Sequences, ...]:
        return (self.seqs,)

    @property
    def group(self) -> Int[Tensor, " S"]:
        """The row that each sequence belongs to."""
        return torch.arange(self.count, device=self.sizes.device).repeat_interleave(self.sizes)

    @property
    def row_tokens(self) -> list[tuple[list[int], ...]]:
        answers = iter(self.seqs.rows())
        return [tuple(islice(answers, size)) for size in self.sizes.tolist()]

    def select(self, rows: Sequence[int]) -> "Ranked":
        rows = sorted(rows)
        kept = torch.isin(self.group, torch.tensor(rows, device=self.sizes.device)).nonzero()[:, 0].tolist()
        return Ranked(self.seqs.select(kept), self.sizes[rows], self.score[kept])


@dataclass(frozen=True, slots=True)
class Stepped(Answers):
    """Answers in steps. The marked (`train`) tokens are those that end a step; right: the probability that it is right."""

    right: Float[Tensor, " N"]

    @classmethod
    def from_rows(cls, rows: Sequence["RenderedRow"]) -> "Stepped":
        right = torch.tensor([number for row in rows for number in row.numbers], dtype=torch.float32)
        return cls(Sequences.of([row.sequences[0] for row in rows]), right)

    def select(self, rows: Sequence[int]) -> "Stepped":
        return Stepped(self.seqs.select(rows), self.right[self.seqs.trained_tokens(rows)])


@dataclass(frozen=True, slots=True)
class Taught(Answers):
    """Answers that a `models.roles.Frozen` teacher is asked about while they are learned from: nothing of size [N, V] is kept."""

    teacher: Any = None

    @classmethod
    def from_rows(cls, rows: Sequence["RenderedRow"]) -> "Taught":
        return cls(Sequences.from_rows(rows))

    def select(self, rows: Sequence[int]) -> "Taught":
        return Taught(self.seqs.select(rows), self.teacher)


def _columns(rows: Sequence["RenderedRow"], count: int) -> list[Float[Tensor, " B"]]:
    """The numbers of rows that have `count` each, number by number."""
    table = torch.tensor([row.numbers for row in rows], dtype=torch.float32).reshape(len(rows), count)
    return [table[:, index] for index in range(count)]


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


def flattened(batch: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A batch as (plain values, tensors) by dotted name, for a checkpoint; `rebuilt` makes it whole again."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for each in fields(batch):
        name, value = prefix + each.name, getattr(batch, each.name)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif is_dataclass(value):
            inner, more = flattened(value, f"{name}.")
            plain |= inner
            tensors |= more
        elif value is not None:
            plain[name] = value
    return plain, tensors


def rebuilt(kind: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """The batch of a kind (the name of its type here) from what `flattened` gave."""
    cls = globals()[kind]
    values: dict[str, Any] = {}
    for each in fields(cls):
        name = prefix + each.name
        if name in tensors or name in plain:
            values[each.name] = tensors[name] if name in tensors else plain[name]
        elif any(key.startswith(f"{name}.") for key in tensors):
            values[each.name] = rebuilt(getattr(each.type, "__name__", str(each.type)), plain, tensors, f"{name}.")
    return cls(**values)
