"""Batches that are made of samples: what was drawn, and the credit that it got."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posttrain.batch.sequences import Answers, Sequences, moved


@dataclass(frozen=True, slots=True)
class Rollouts(Answers):
    """Sampled sequences with their credit; every tensor is flat over the N sampled tokens.

    sampled_logp: of the distribution that each token was drawn from; old_logp: the trainer's own, where the two differ;
    version: the update that the policy had when it sampled each sequence; learns: which tokens have a part in the policy's
    loss, all of them where None.
    """

    sampled_logp: Float[Tensor, " N"]
    advantage: Float[Tensor, " N"]
    version: Int[Tensor, " B"]
    old_logp: Float[Tensor, " N"] | None = None
    ref_logp: Float[Tensor, " N"] | None = None
    learns: Bool[Tensor, " N"] | None = None
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
            learns=None if self.learns is None else self.learns[kept],
        )


@dataclass(frozen=True, slots=True)
class Valued:
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

    def to(self, device: "torch.device | str") -> "Valued":
        return moved(self, device)
