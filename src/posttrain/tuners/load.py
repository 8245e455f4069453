"""Loading a model with whatever was learned on top of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import ModelError
from posttrain.models import classifier
from posttrain.models import load as plain
from posttrain.models.classifier import LoadedClassifier
from posttrain.models.load import Loaded, LoadedScalar
from posttrain.models.source import ModelSource
from posttrain.text import Classes
from posttrain.tuners.below import folder_of
from posttrain.tuners.folder import classes_in, has_score, load_adapter


def load(source: ModelSource | str | Path, apart: bool = False, codes: bool = True) -> Loaded:
    """A causal LM: a model folder, a hub model, or an adapter folder with the model below it.

    apart: leave the topmost adapter beside the weights, where it could be folded into them. codes=False: do not quantise the
    model below, though its adapters were learned on it quantised; they stay beside its weights. Raises ModelError for what
    transformers cannot load, what posttrain cannot train rightly, and adapters of other models.
    """
    source = plain.resolved(source)
    below = source.below()
    if below is None:
        return plain.load(source if codes else _unquantised(source))
    found = load(below, codes=codes)
    load_adapter(found.lm.model, folder_of(source), below, apart=apart)
    return Loaded(found.lm, tokenizer_of(source, found.tokenizer))


def load_scalar(
    source: ModelSource | str | Path, fresh: Callable[[Tensor], Any] | None = None, apart: bool = False, codes: bool = True
) -> LoadedScalar:
    """A model that scores sequences, in the same ways. `fresh`: as for `models.load.load_scalar`."""
    source = plain.resolved(source)
    below = source.below()
    if below is None:
        return plain.load_scalar(source if codes else _unquantised(source), fresh)
    found = load_scalar(below, nn.init.zeros_ if has_score(folder_of(source)) else fresh, codes=codes)
    known = load_adapter(found.lm.model, folder_of(source), below, apart=apart)
    if "reward_shift" in known:
        found.lm.shift = float(known["reward_shift"])
    return LoadedScalar(found.lm, tokenizer_of(source, found.tokenizer))


def load_classifier(
    source: ModelSource | str | Path, fresh: Callable[[Tensor], Any] | None = None, classes: Classes | None = None,
    new_head: bool = False,
) -> LoadedClassifier:  # fmt: skip
    """A model that says what texts are, in the same ways. Settings as for `models.classifier.load_classifier`."""
    source = plain.resolved(source)
    below = source.below()
    if below is None:
        return classifier.load_classifier(source, fresh, classes, new_head)
    own = None if new_head else classes_in(folder_of(source))
    if own is not None and classes is not None:
        classifier.refuse_other_classes(str(source.path), own, classes)
    found = load_classifier(below, nn.init.zeros_ if own else fresh, classes or own, new_head or own is not None)
    load_adapter(found.lm.model, folder_of(source), below, new_head)
    return LoadedClassifier(found.lm, tokenizer_of(source, found.tokenizer))


def load_weights(source: ModelSource, like: PreTrainedModel) -> PreTrainedModel:
    """The weights alone, with all adapters folded in, of a model of the same architecture as another; on the CPU.

    Raises ModelError as `load`.
    """
    source = plain.resolved(source)
    below = source.below()
    if below is not None:
        lower = load_weights(below, like)
        load_adapter(lower, folder_of(source), below)
        return lower
    place = plain.hub_options(source)
    with plain.said_by(source):
        config = AutoConfig.from_pretrained(**place)
    if config.model_type != like.config.model_type:
        ours = like.config.model_type
        raise ModelError(f"{source.path}: is a {config.model_type} model and not of the base's architecture, {ours}")
    with plain.said_by(source):
        found, report = type(like).from_pretrained(
            **place, dtype=plain.DTYPES[source.dtype], use_safetensors=True, output_loading_info=True
        )
    if missing := sorted(set(report["missing_keys"]) - {"score.weight"}):
        raise ModelError(f"{source.path}: the weights lack {missing[0]} ({len(missing)} missing in all); the file is not whole")
    model: PreTrainedModel = found
    return model


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer alone, without the model. Raises ModelError as `load`."""
    source = plain.resolved(source)
    below = source.below()
    return plain.load_tokenizer(source) if below is None else tokenizer_of(source, load_tokenizer(below))


def _unquantised(source: ModelSource) -> ModelSource:
    return source.model_copy(update={"quantize": None, "double": False})


def tokenizer_of(source: ModelSource, below: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The adapter's own, where it has one: its chat template is the one that was learned."""
    if source.chat_template is not None or not (folder_of(source) / "tokenizer_config.json").is_file():
        return below
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder_of(source)))
    return found
