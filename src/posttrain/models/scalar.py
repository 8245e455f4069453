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
    """Wraps a transformers sequence classifier for decoders (head `score`); the head computes in float32 or wider.

    A reward model has one output, a classifier C: `scores` is the first of `logits`. `shift` is added to every score;
    a transformers config keeps it as `reward_shift`, which transformers itself does not add.
    """

    gives = "scores"

    def __init__(self, model: PreTrainedModel, layout: LayoutName = "tree", mixed: bool = False) -> None:
        super().__init__(model, layout, mixed)
        self.shift = float(getattr(model.config, "reward_shift", None) or 0.0)

    def keep_shift(self) -> None:
        """Writes the shift into the config; a classifier has none."""
        if self.shift or self.model.config.problem_type is None:
            self.model.config.reward_shift = self.shift

    @property
    def head(self) -> nn.Linear:
        return self.model.get_submodule("score")

    def logits_of(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """What the head says of each state."""
        head = self.head
        bias = None if head.bias is None else wide(head.bias)
        return F.linear(wide(states), wide(head.weight), bias)

    def of(self, states: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """The score of each state."""
        return self.logits_of(states)[:, 0] + self.shift

    def logits(self, seqs: Sequences) -> Float[Tensor, "B C"]:
        """What the head says of each sequence, read at its last token."""
        (states,) = self.states_at(layout.at_last, (seqs,))
        return self.logits_of(states)

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
        return self.logits_of_many(seqs, micro_tokens)[:, 0] + self.shift

    def values(self, seqs: Sequences) -> Float[Tensor, " N"]:
        """[N]: the score of the state before each trained token."""
        return self.of(self.hidden(seqs))

    def step_scores(self, seqs: Sequences) -> Float[Tensor, " N"]:
        """[N]: the score of each trained token itself; a process reward's steps end at those."""
        (states,) = self.states_at(layout.at_trained, (seqs,))
        return self.of(states)
