"""A transformers model below its head, as the rest of posttrain sees it: token sequences in, states out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.batch import Sequences
from posttrain.models import layout, soft
from posttrain.models.attention import TreePlan, attending
from posttrain.models.products import of_layers, replaced

LayoutName = Literal["tree", "padded"]


class Backbone(nn.Module):
    """Every method shares prefixes across all the sequences it is given in one call.

    mixed: compute in bfloat16 over float32 weights. Dropout is always off.
    """

    gives = "states"
    """What the model gives, in words."""

    def __init__(self, model: PreTrainedModel, layout: LayoutName = "tree", mixed: bool = False) -> None:
        super().__init__()
        self.model = model.eval()
        self.layout: LayoutName = layout
        self.mixed = mixed

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def backbone(self) -> nn.Module:
        """The model below its head."""
        return self.model.base_model

    @property
    def context(self) -> int | None:
        """The longest sequence that the model was made for, less its soft tokens; None where there is no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else limit - soft.count(self.model)

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed)

    def read_in_bfloat16(self) -> set[nn.Parameter]:
        """The weights that mixed arithmetic rounds before every use: those of plain linear layers below the head."""
        linears = [each for each in self.backbone.modules() if self.mixed and type(each) is nn.Linear]
        return {parameter for each in linears for parameter in each.parameters(recurse=False)}

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """What the model's modules compute in, and by which products."""
        with self.precision(), replaced([] if self.mixed else of_layers(self.backbone)):
            yield

    def states(self, tree: layout.Tree, plan: TreePlan) -> Float[Tensor, "T D"]:
        """The last hidden state of every token of a tree. `plan` is what attention follows."""
        tokens = tree.tokens.to(self.device)
        plan.given = soft.given(self.model, tokens)
        with attending(self.model, plan), self.arithmetic():
            return self.backbone(
                **self._read(tokens[None]), position_ids=tree.positions[None].to(self.device), use_cache=False
            ).last_hidden_state[0]

    def _read(self, tokens: Int[Tensor, "R T"]) -> dict[str, Tensor]:
        vectors = soft.embedded(self.model, tokens)
        return {"input_ids": tokens} if vectors is None else {"inputs_embeds": vectors}

    def states_at(self, places: layout.Places, seqs: Sequence[Sequences]) -> list[Float[Tensor, "N D"]]:
        """For each of `seqs` the states at the tokens that `places` names, in order."""
        seqs = [soft.placed(self.model, each) for each in seqs]
        if self.layout == "padded" and any(each.count > 0 for each in seqs):
            soft.refuse_prefixes(self.model)
            plain = layout.padded(seqs)
            with self.arithmetic():
                states = self.backbone(
                    **self._read(plain.tokens.to(self.device)), attention_mask=plain.valid.long().to(self.device), use_cache=False
                ).last_hidden_state
            cells = layout.cells(seqs, places)
            flat, width = states.flatten(0, 1), states.shape[1]
            return [flat.index_select(0, (rows * width + columns).to(self.device)) for rows, columns in cells]
        tree = layout.tree([row for each in seqs for row in each.rows()])
        if not len(tree.tokens):
            return [self._nothing() for _ in seqs]
        states = self.states(tree, TreePlan(tree))
        # A shared state is asked for by several. `states[index]` would add their gradients in any order, by several threads.
        return [states.index_select(0, index.to(self.device)) for index in layout.indices(tree, seqs, places)]

    @overload
    def hidden(self, seqs: Sequences, /) -> Tensor: ...
    @overload
    def hidden(self, first: Sequences, second: Sequences, /, *more: Sequences) -> tuple[Tensor, ...]: ...
    def hidden(self, *seqs: Sequences) -> Tensor | tuple[Tensor, ...]:
        """[N, D]: the state that each trained token was predicted from. One Sequences in, one tensor out; several, a tuple."""
        found = self.states_at(layout.before_trained, seqs)
        return found[0] if len(found) == 1 else tuple(found)

    def in_parts(self, fn: Callable[[Sequences], Tensor], seqs: Sequences, micro_tokens: int) -> Float[Tensor, " N"]:
        """fn, which gives a value for each trained token, of any number of sequences: at most about `micro_tokens` tokens at a
        time. For use without gradients."""
        found = torch.empty(seqs.trained, device=self.device)
        for rows in layout.micro_batches(seqs, micro_tokens):
            part = fn(seqs.select(rows))
            found = found.to(part.dtype)
            found[seqs.trained_tokens(rows).to(self.device)] = part
        return found

    def logits(self, seqs: Sequences) -> Float[Tensor, "B C"]:
        """What the head says of each sequence, where the model has one for whole sequences."""
        raise NotImplementedError

    def logits_of_many(self, seqs: Sequences, micro_tokens: int) -> Float[Tensor, "B C"]:
        """`logits` of any number of sequences, at most about `micro_tokens` tokens at a time. For use without gradients."""
        groups = layout.micro_batches(seqs, micro_tokens) or [[]]
        parts = torch.cat([self.logits(seqs.select(rows)) for rows in groups])
        order = torch.tensor([row for rows in groups for row in rows], dtype=torch.long, device=parts.device)
        return torch.empty_like(parts).index_copy(0, order, parts)

    def _nothing(self) -> Float[Tensor, "0 D"]:
        """No states, with a gradient all the same: a batch with nothing to train is a zero that back-propagates."""
        anchor = next((each for each in self.model.parameters() if each.requires_grad), next(self.model.parameters()))
        return anchor.reshape(-1, 1)[:0].expand(0, self.model.config.get_text_config().hidden_size)
