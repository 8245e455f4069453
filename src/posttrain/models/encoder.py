"""Encoders with a head, such as BERT: attention goes both ways, so that no prefix can be shared; rows are padded."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from posttrain.batch import Sequences
from posttrain.errors import ModelError
from posttrain.models import layout, soft
from posttrain.models.backbone import Backbone
from posttrain.models.products import wide


class Encoder(Backbone):
    """Wraps a transformers sequence classifier that is an encoder. Its own forward pools and computes the head.

    Where the model tells first and second texts apart, the second begins behind the first separator (`model.separator`).
    """

    gives = "logits"

    @property
    def context(self) -> int | None:
        """As for any model, less the positions that RoBERTa and its kin keep for padding."""
        limit = super().context
        for name, module in self.backbone.named_modules():
            if limit is not None and name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return limit if module.padding_idx is None else limit - module.padding_idx - 1
        return limit

    def logits(self, seqs: Sequences) -> Float[Tensor, "B C"]:
        """What the head says of each sequence."""
        soft.refuse_prefixes(self.model)
        if not seqs.count:
            return wide(self._nothing()[:, :1].expand(0, self.model.config.num_labels))
        plain = layout.padded([soft.placed(self.model, seqs)])
        tokens, separator = plain.tokens.to(self.device), getattr(self.model, "separator", None)
        kinds = {} if separator is None else {"token_type_ids": segments(tokens, separator)}
        with self.arithmetic():
            valid = plain.valid.long().to(self.device)
            return wide(self.model(**self._read(tokens), attention_mask=valid, **kinds).logits)


def segments(tokens: Int[Tensor, "R T"], separator: int) -> Int[Tensor, "R T"]:
    """0 through the first separator of a row, 1 behind it."""
    ends = (tokens == separator).long()
    return (ends.cumsum(1) - ends).clamp(max=1)


def separator_of(tokenizer: Any, model: Any) -> int | None:
    """The token behind which a second text begins, for models that tell the two apart. Raises ModelError where it is another."""
    if getattr(model.config, "type_vocab_size", None) in (None, 0, 1):
        return None
    import torch

    pair = tokenizer("a", "b", verbose=False, return_token_type_ids=True)
    kinds = torch.tensor([pair["token_type_ids"]])
    if not bool(kinds.any()):
        return None
    found: int | None = tokenizer.sep_token_id
    if found is None or not torch.equal(segments(torch.tensor([pair["input_ids"]]), found), kinds):
        raise ModelError("the tokenizer marks the second of two texts in a way that is not known; take another model")
    return found
