"""A causal language model as the rest of posttrain sees it: token sequences in, log-probabilities of trained tokens out.

Every per-token tensor is indexed by the token it is about: `logp[i]` is log p(token i | tokens before it). The shift between
states and the tokens that they predict exists in `layout.predictors` and nowhere else.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.batch import Sequences
from posttrain.models import head as vocabulary
from posttrain.models import layout
from posttrain.models.attention import TreePlan, attending
from posttrain.models.products import linear, of_layers, replaced, wide

LayoutName = Literal["tree", "padded"]


class LM(nn.Module):
    """Wraps a transformers causal LM. Every method shares prefixes across all the sequences it is given in one call.

    mixed: compute in bfloat16 over float32 weights. Dropout is always off.
    """

    def __init__(self, model: PreTrainedModel, layout: LayoutName = "tree", mixed: bool = False) -> None:
        super().__init__()
        self.model = model.eval()
        self.layout: LayoutName = layout
        self.mixed = mixed
        self.shape = vocabulary.Shape.of(model.config)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def backbone(self) -> nn.Module:
        """The model below its vocabulary head."""
        return self.model.base_model

    @property
    def context(self) -> int | None:
        """The longest sequence that the model was made for; None where there is no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """What the model's modules compute in, and by which products."""
        with self.precision(), replaced([] if self.mixed else of_layers(self.backbone)):
            yield

    def states(self, tree: layout.Tree, plan: TreePlan) -> Float[Tensor, "T D"]:
        """The last hidden state of every token of a tree. `plan` is what attention follows."""
        with attending(self.model, plan), self.arithmetic():
            return self.backbone(
                input_ids=tree.tokens[None].to(self.device), position_ids=tree.positions[None].to(self.device), use_cache=False
            ).last_hidden_state[0]

    def _hidden(self, seqs: tuple[Sequences, ...]) -> list[Float[Tensor, "N D"]]:
        if self.layout == "padded" and any(each.count > 0 for each in seqs):
            plain = layout.padded(seqs)
            with self.arithmetic():
                states = self.backbone(
                    input_ids=plain.tokens.to(self.device), attention_mask=plain.valid.long().to(self.device), use_cache=False
                ).last_hidden_state
            return [states[rows.to(self.device), columns.to(self.device)] for rows, columns in plain.predictors]
        plan = layout.tree([row for each in seqs for row in each.rows()])
        if not len(plan.tokens):
            return [self._nothing() for _ in seqs]
        states = self.states(plan, TreePlan(plan))
        return [states[index.to(self.device)] for index in layout.predictors(plan, seqs)]

    def _nothing(self) -> Float[Tensor, "0 D"]:
        """No states, with a gradient all the same: a batch with nothing to train is a zero that back-propagates."""
        anchor = next((each for each in self.model.parameters() if each.requires_grad), self.head.get_parameter("weight"))
        return anchor.reshape(-1, 1)[:0].expand(0, self.model.config.get_text_config().hidden_size)

    @overload
    def hidden(self, seqs: Sequences, /) -> Tensor: ...
    @overload
    def hidden(self, first: Sequences, second: Sequences, /, *more: Sequences) -> tuple[Tensor, ...]: ...
    def hidden(self, *seqs: Sequences) -> Tensor | tuple[Tensor, ...]:
        """[N, D]: the state that each trained token was predicted from. One Sequences in, one tensor out; several, a tuple."""
        found = self._hidden(seqs)
        return found[0] if len(found) == 1 else tuple(found)

    @overload
    def logprobs(self, seqs: Sequences, /, *, temperature: float = 1.0) -> Tensor: ...
    @overload
    def logprobs(
        self, first: Sequences, second: Sequences, /, *more: Sequences, temperature: float = 1.0
    ) -> tuple[Tensor, ...]: ...
    def logprobs(self, *seqs: Sequences, temperature: float = 1.0) -> Tensor | tuple[Tensor, ...]:
        """[N]: log p of each trained token, float32 or wider. One Sequences in, one tensor out; several, a tuple."""
        found = [
            vocabulary.log_probs(self.head, self.project, self.shape, states, targets(each, states), None, temperature)[1]
            for states, each in zip(self._hidden(seqs), seqs, strict=True)
        ]
        return found[0] if len(found) == 1 else tuple(found)

    def logprobs_of_many(self, seqs: Sequences, micro_tokens: int, temperature: float = 1.0) -> Float[Tensor, " N"]:
        """`logprobs` of any number of sequences, at most about `micro_tokens` tokens at a time. For use without gradients."""
        found = torch.empty(seqs.trained, device=self.device)
        for rows in layout.micro_batches(seqs, micro_tokens):
            logp = self.logprobs(seqs.select(rows), temperature=temperature)
            found = found.to(logp.dtype)
            found[seqs.trained_tokens(rows).to(self.device)] = logp
        return found

    def token_sum(
        self, seqs: Sequences, fn: vocabulary.TokenLoss, temperature: float = 1.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """(sum of fn, logp without gradient), where fn(logp[part], part) gives a value for each of some trained tokens.

        The fast path of every loss that is a sum over tokens: its gradients are formed in the forward, so that the vocabulary
        projection runs once.
        """
        (states,) = self._hidden((seqs,))
        return vocabulary.log_probs(self.head, self.project, self.shape, states, targets(seqs, states), fn, temperature)

    def weighted_sum(
        self, seqs: Sequences, weight: Float[Tensor, " N"], temperature: float = 1.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """(sum of weight * logp, logp without gradient)."""
        weight = weight.to(self.device)
        return self.token_sum(seqs, lambda logp, part: weight[part] * logp, temperature)

    def over_vocab(self, seqs: Sequences, fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """fn(logits of a chunk of trained tokens, their target ids) -> per-token values; recomputed in the backward."""
        (states,) = self._hidden((seqs,))

        def chunk(rows: Tensor, wanted: Tensor) -> Tensor:
            return fn(self.project(rows), wanted)

        return vocabulary.over_rows(chunk, vocabulary.vocabulary_of(self.head), states, targets(seqs, states))

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
