"""A causal language model as the rest of posttrain sees it: token sequences in, log-probabilities of trained tokens out.

Every per-token tensor is indexed by the token it is about: `logp[i]` is log p(token i | tokens before it). The shift between
states and the tokens that they predict exists in `layout.before_trained` and nowhere else.
"""

from collections.abc import Callable
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.batch import Sequences
from posttrain.models import head as vocabulary
from posttrain.models import layout
from posttrain.models.backbone import Backbone, LayoutName
from posttrain.models.products import linear, wide


class LM(Backbone):
    """Wraps a transformers causal LM."""

    gives = "logits"

    def __init__(self, model: PreTrainedModel, layout: LayoutName = "tree", mixed: bool = False) -> None:
        super().__init__(model, layout, mixed)
        self.shape = vocabulary.Shape.of(model.config)

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @overload
    def logprobs(self, seqs: Sequences, /, *, temperature: float = 1.0) -> Tensor: ...
    @overload
    def logprobs(
        self, first: Sequences, second: Sequences, /, *more: Sequences, temperature: float = 1.0
    ) -> tuple[Tensor, ...]: ...
    def logprobs(self, *seqs: Sequences, temperature: float = 1.0) -> Tensor | tuple[Tensor, ...]:
        """[N]: log p of each trained token, float32 or wider. One Sequences in, one tensor out; several, a tuple."""
        states = self.states_at(layout.before_trained, seqs)
        wanted = [targets(each, rows) for each, rows in zip(seqs, states, strict=True)]
        _, logp = vocabulary.log_probs(
            self.head, self.project, self.shape, torch.cat(states), torch.cat(wanted), None, temperature
        )
        found = logp.split([len(rows) for rows in states])
        return found[0] if len(found) == 1 else found

    def logprobs_of_many(self, seqs: Sequences, micro_tokens: int, temperature: float = 1.0) -> Float[Tensor, " N"]:
        """`logprobs` of any number of sequences, at most about `micro_tokens` tokens at a time. For use without gradients."""
        return self.in_parts(lambda part: self.logprobs(part, temperature=temperature), seqs, micro_tokens)

    def token_sum(
        self, seqs: Sequences, fn: vocabulary.TokenLoss, temperature: float = 1.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """(sum of fn, logp without gradient), where fn(logp[part], part) gives a value for each of some trained tokens.

        The fast path of every loss that is a sum over tokens: its gradients are formed in the forward, so that the vocabulary
        projection runs once.
        """
        return self.token_sum_of(self.hidden(seqs), seqs, fn, temperature)

    def token_sum_of(
        self, states: Float[Tensor, "N D"], seqs: Sequences, fn: vocabulary.TokenLoss, temperature: float = 1.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """`token_sum` from the states that predict the trained tokens."""
        return vocabulary.log_probs(self.head, self.project, self.shape, states, targets(seqs, states), fn, temperature)

    def weighted_sum(
        self, seqs: Sequences, weight: Float[Tensor, " N"], temperature: float = 1.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """(sum of weight * logp, logp without gradient)."""
        weight = weight.to(self.device)
        return self.token_sum(seqs, lambda logp, part: weight[part] * logp, temperature)

    def over_vocab(self, seqs: Sequences, fn: Callable[..., Tensor], *beside: Tensor) -> Tensor:
        """fn(logits of a chunk of trained tokens, their target ids, their rows of each of `beside`) -> per-token values;
        recomputed in the backward."""
        states = self.hidden(seqs)

        def chunk(rows: Tensor, *more: Tensor) -> Tensor:
            return fn(self.project(rows), *more)

        return vocabulary.over_rows(chunk, vocabulary.vocabulary_of(self.head), states, targets(seqs, states), *beside)

    def project(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits as the model itself would give them, float32 or wider, through the head module and whatever sits on it."""
        head = self.head
        with torch.autocast(self.device.type, enabled=False):
            if vocabulary.is_plain(head):
                bias = None if head.bias is None else wide(head.bias)  # type: ignore[arg-type]
                logits = linear(wide(hidden), wide(head.weight), bias)  # type: ignore[arg-type]
            else:
                logits = wide(head(hidden.to(next(head.parameters()).dtype)))
        return self.shape(logits)


def targets(seqs: Sequences, states: Tensor) -> Tensor:
    return seqs.tokens[seqs.train].to(states.device)
