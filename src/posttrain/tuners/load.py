"""Loading a model with whatever was learned on top of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from posttrain.models import load as plain
from posttrain.models.load import Loaded, LoadedScalar
from posttrain.models.source import ModelSource
from posttrain.tuners.below import folder_of
from posttrain.tuners.folder import has_score, load_adapter


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
    load_adapter(found.lm.model, folder_of(source), below, apart)
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
    known = load_adapter(found.lm.model, folder_of(source), below, apart)
    if "reward_shift" in known:
        found.lm.shift = float(known["reward_shift"])
    return LoadedScalar(found.lm, tokenizer_of(source, found.tokenizer))


def _unquantised(source: ModelSource) -> ModelSource:
    return source.model_copy(update={"quantize": None, "double": False})


def tokenizer_of(source: ModelSource, below: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The adapter's own, where it has one: its chat template is the one that was learned."""
    if source.chat_template is not None or not (folder_of(source) / "tokenizer_config.json").is_file():
        return below
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder_of(source)))
    return found
