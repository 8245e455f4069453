"""Loading classifiers: encoders and decoders with a head that tells texts apart, as stored or new."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.batch import Sequences
from posttrain.errors import ModelError
from posttrain.models.encoder import Encoder, separator_of
from posttrain.models.heads import head_parameters, head_parts, in_config, is_encoder, of_config
from posttrain.models.load import from_pretrained, hub_options, resolved, restore_head, said_by, wrap_scalar, wrapped
from posttrain.models.scalar import ScalarLM
from posttrain.models.source import ModelSource
from posttrain.text import Classes


@dataclass(frozen=True)
class LoadedClassifier:
    """A model that says what texts are, and its tokenizer."""

    lm: ScalarLM | Encoder
    tokenizer: PreTrainedTokenizerBase

    @property
    def classes(self) -> Classes:
        """What it tells apart."""
        return of_config(self.lm.model.config)


def load_classifier(
    source: ModelSource | str | Path, fresh: Callable[[Tensor], Any] | None = None, classes: Classes | None = None,
    new_head: bool = False,
) -> LoadedClassifier:  # fmt: skip
    """Loads a model that says what texts are, an encoder or a decoder.

    classes: what it is to tell apart, by default what its folder says. fresh: what fills the matrices of a new head, where the
    folder has none, or `new_head` leaves its own aside. Raises ModelError as `load`, and for a model of other classes.
    """
    source = resolved(source)
    stored = None if new_head else stored_classes(source)
    if stored is None and (fresh is None or classes is None):
        raise ModelError(f"{source.path}: is no classifier: it has no head; train one with objective classify")
    if stored is not None and classes is not None:
        refuse_other_classes(str(source.path), stored, classes)
    classes = classes or stored
    assert classes is not None
    model, tokenizer, report = from_pretrained(AutoModelForSequenceClassification, source, stored is None, **in_config(classes))
    missing = sorted({*report["missing_keys"], *(str(each[0]) for each in report["mismatched_keys"])})
    model.new_pooler = stored is None and any(".pooler." in name for name in missing)
    head = head_parameters(model)
    if odd := [name for name in missing if stored is not None or name not in head]:
        raise ModelError(f"{source.path}: the weights lack {odd[0]} ({len(odd)} missing in all); it is no whole model")
    for part in head_parts(model).values():
        part.to(torch.promote_types(next(part.parameters()).dtype, torch.float32))
        part.register_forward_pre_hook(_begin_wide)
        part.register_forward_hook(_end_wide, always_call=True)
    if stored is None and fresh is not None:
        _fill(head, fresh)
    else:
        restore_head(model, source.folder())
    if not is_encoder(model):
        return LoadedClassifier(wrap_scalar(model, source), tokenizer)
    model.separator = separator_of(tokenizer, model)
    return LoadedClassifier(wrap_encoder(model, source), tokenizer)


def stored_classes(source: ModelSource) -> Classes | None:
    """What a model's folder tells apart; None for one without a head."""
    with said_by(source):
        config = AutoConfig.from_pretrained(**hub_options(source))
    has_head = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return of_config(config) if has_head else None


def refuse_other_classes(name: str, stored: Classes, wanted: Classes) -> None:
    """Raises ModelError where a model tells apart something else than the data."""
    unnamed = tuple(f"LABEL_{index}" for index in range(len(stored.labels)))
    alike = stored.labels in (wanted.labels, unnamed) and stored.outputs == wanted.outputs
    if stored.problem == wanted.problem and alike:
        return
    theirs, ours = (f"{each.problem}: {', '.join(each.labels) or 'a number'}" for each in (stored, wanted))
    first = "set objective.labels to the model's, in their order, or " if set(wanted.labels) <= set(stored.labels) else ""
    raise ModelError(
        f"{name}: its head gives {stored.outputs} numbers ({theirs}), and the data ask for {wanted.outputs} ({ours}); "
        f"{first}begin with a new head: objective.new_head: true"
    )


def _fill(head: Mapping[str, nn.Parameter], fresh: Callable[[Tensor], Any]) -> None:
    """A new head: matrices as `fresh` gives them, biases 0, scales of normalisations 1."""
    with torch.no_grad():
        for name, parameter in head.items():
            if parameter.ndim > 1:
                fresh(parameter)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _begin_wide(part: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A head computes in float32 or wider whatever the model does: small updates, and small differences, would round away."""
    anchor = next(part.parameters())
    part.wide = torch.autocast(anchor.device.type, enabled=False)
    part.wide.__enter__()
    return tuple(each.to(anchor.dtype) for each in inputs)


def _end_wide(part: Any, _inputs: tuple[Any, ...], _output: Any) -> None:
    part.wide.__exit__(None, None, None)


def wrap_encoder(model: PreTrainedModel, source: ModelSource) -> Encoder:
    """An Encoder around a transformers sequence classifier."""
    return wrapped(Encoder, model, source, padding_gap)


def padding_gap(lm: Encoder) -> float:
    """The difference between an encoder's logits of 8 and of 5 tokens in one padded batch and of each alone."""
    pad, vocabulary = lm.model.config.get_text_config().pad_token_id, lm.model.get_input_embeddings().weight.shape[0]
    passed = {pad, getattr(lm.model, "separator", None)}
    tokens = [token % vocabulary for token in range(3, 12) if token % vocabulary not in passed]
    rows = [(part, [False] * len(part)) for part in (tokens, tokens[2:])]
    with torch.no_grad():
        together = lm.logits(Sequences.of(rows))
        alone = torch.cat([lm.logits(Sequences.of([row])) for row in rows])
    return float(((together - alone).abs() / alone.abs().clamp(min=1.0)).max())
