"""Matching another model's logits: what a model that was made smaller lost, it learns back from the one that it was made from."""

from typing import TYPE_CHECKING

from posttrain import losses
from posttrain.objectives.objective import Loss, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Taught
    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles


class MatchLogits(Objective, kind="match_logits"):
    """mean over tokens and vocabulary of (z_teacher - z)^2, z the logits; arXiv 2402.10193 eq. 5.

    Of answers the trained tokens, of raw text all but the first. The teacher is frozen and has the policy's tokenizer.
    """

    reads = "Taught"
    rows = frozenset({"Conversation", "Completion", "Text"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher"})

    def units(self, batch: "Taught") -> dict[str, int]:
        return {"logits": batch.seqs.trained}

    def annotate(self, batch: "Taught", policy: "LM", roles: "Roles") -> "Taught":
        from dataclasses import replace

        assert roles.teacher is not None
        return replace(batch, teacher=roles.teacher)

    def loss(self, policy: "LM", batch: "Taught") -> Loss:
        teacher = batch.teacher
        assert teacher is not None, "annotated first"

        def gap(logits: "Tensor", _target: "Tensor", theirs: "Tensor") -> "Tensor":
            wanted = teacher.logits_of(theirs)
            both = min(logits.shape[1], wanted.shape[1])  # tables may be padded to different sizes
            return losses.logit_gap(logits[:, :both], wanted[:, :both].to(logits.device))

        total = policy.over_vocab(batch.seqs, gap, teacher.hidden(batch.seqs)).sum()
        return Loss({"logits": total})
