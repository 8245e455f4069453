"""Batches that are made of rows: answers with what is known of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posttrain.batch.sequences import Answers, Sequences, moved

if TYPE_CHECKING:
    from posttrain.text import RenderedRow


@dataclass(frozen=True, slots=True)
class Pairs:
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

    def to(self, device: "torch.device | str") -> "Pairs":
        return moved(self, device)


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
class Ranked:
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

    def to(self, device: "torch.device | str") -> "Ranked":
        return moved(self, device)


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
class Classified(Answers):
    """Texts with what is to be said of each: the number of its class, or a number (K = 1); 0 or 1 for each of K labels."""

    target: Float[Tensor, "B K"]

    @classmethod
    def from_rows(cls, rows: Sequence["RenderedRow"]) -> "Classified":
        target = torch.tensor([row.numbers for row in rows], dtype=torch.float32)
        return cls(Sequences.of([row.sequences[0] for row in rows]), target)

    def select(self, rows: Sequence[int]) -> "Classified":
        rows = sorted(rows)
        return Classified(self.seqs.select(rows), self.target[rows])


@dataclass(frozen=True, slots=True)
class Taught(Answers):
    """Answers that another model is asked about, token by token, while they are learned from: nothing of size [N, V] is kept."""

    teacher: Any = None  # a `models.roles.Frozen`

    @classmethod
    def from_rows(cls, rows: Sequence["RenderedRow"]) -> "Taught":
        return cls(Sequences.from_rows(rows))

    def select(self, rows: Sequence[int]) -> "Taught":
        return Taught(self.seqs.select(rows), self.teacher)

    def to(self, device: "torch.device | str") -> "Taught":
        return Taught(self.seqs.to(device), self.teacher)  # who stays where it is


def _columns(rows: Sequence["RenderedRow"], count: int) -> list[Float[Tensor, " B"]]:
    """The numbers of rows that have `count` each, number by number."""
    table = torch.tensor([row.numbers for row in rows], dtype=torch.float32).reshape(len(rows), count)
    return [table[:, index] for index in range(count)]
