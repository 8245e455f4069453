"""Supervised fine-tuning and continued pretraining: one loss, other rows."""

from typing import TYPE_CHECKING

from posttrain.objectives.objective import Loss, Objective

if TYPE_CHECKING:
    from posttrain.batch import Sequences
    from posttrain.models.lm import LM


class SFT(Objective, kind="sft"):
    """-sum log p(answer token | what is before it) / answer tokens of the update.

    Only answers are trained, their end-of-turn token included. The mean is over the tokens of the whole update (all
    micro-batches), not a mean of means.
    """

    reads = "Sequences"
    rows = frozenset({"Conversation", "Completion"})

    def units(self, batch: "Sequences") -> dict[str, int]:
        return {"nll": batch.trained}

    def loss(self, policy: "LM", batch: "Sequences") -> Loss:
        import torch

        weight = torch.ones(batch.trained) if batch.weight is None else batch.weight[batch.owner]
        total, logp = policy.weighted_sum(batch, -weight)
        return Loss({"nll": total}, {"nll": (-logp.sum(), batch.trained)})


class Pretrain(SFT, kind="pretrain"):
    """-sum log p(token | what is before it in its document) / tokens of the update.

    Raw text: every token but the first of each document is trained; documents do not see each other.
    """

    rows = frozenset({"Text"})
