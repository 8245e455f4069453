"""Models that score: a reward for a whole sequence, or the value of the state before each token.

The score is that of the sequence's last token, which the layout knows exactly: no pad id is looked for.
"""

from typing import overload

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.batch import Sequences
from posttrain.models import layout
from posttrain.models.backbone import Backbone, LayoutName
from posttrain.models.products import wide


class ScalarLM(Backbone):
    """Wraps a transformers sequence classifier with one output (`score`); the head computes in float32 or wider.

    `shift` is added to every score. A transformers config keeps it as `reward_shift`, which transformers itself does not add.
    """

    gives = "scores"

    def __init__(self, model: PreTrainedModel, layout: LayoutName = "tree", mixed: bool = False) -> None:
        super().__init__(model, layout, mixed)
        self.shift = float(getattr(model.config, "reward_shift", None) or 0.0)

    @property
    def head(self) -> nn.Linear:
        return self.model.get_submodule("score")

    def of(self, states: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """The score of each state."""
        head = self.head
        bias = None if head.bias is None else wide(head.bias)
        return F.linear(wide(states), wide(head.weight), bias)[:, 0] + self.shift

    @overload
    def scores(self, seqs: Sequences, /) -> Tensor: ...
    @overload
    def scores(self, first: Sequences, second: Sequences, /, *more: Sequences) -> tuple[Tensor, ...]: ...
    def scores(self, *seqs: Sequences) -> Tensor | tuple[Tensor, ...]:
        """[B]: the score of each sequence, read at its last token. One Sequences in, one tensor out; several, a tuple."""
        found = [self.of(states) for states in self.states_at(layout.at_last, seqs)]
        return found[0] if len(found) == 1 else tuple(found)

    def scores_of_many(self, seqs: Sequences, micro_tokens: int) -> Float[Tensor, " B"]:
        """`scores` of any number of sequences, at most about `micro_tokens` tokens at a time. For use without gradients."""
        found = seqs.starts.new_zeros(seqs.count, dtype=wide(self.head.weight).dtype, device=self.device)
        for rows in layout.micro_batches(seqs, micro_tokens):
            found[rows] = self.scores(seqs.select(rows))
        return found

    def values(self, seqs: Sequences) -> Float[Tensor, " N"]:
        """[N]: the score of the state before each trained token."""
        return self.of(self.hidden(seqs))

    def step_scores(self, seqs: Sequences) -> Float[Tensor, " N"]:
        """[N]: the score of each trained token itself; a process reward's steps end at those."""
        (states,) = self.states_at(layout.at_trained, (seqs,))
        return self.of(states)
