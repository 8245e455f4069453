"""A model with the adapters on it folded into its weights."""

import json
from typing import TYPE_CHECKING, Literal

from posttrain.errors import ModelError
from posttrain.models.source import ModelSource, about_adapter
from posttrain.tuners.below import refuse_codes, refuse_unfoldable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.models.load import Loaded, LoadedScalar


Codes = Literal["dequantized", "before"]


def codes_of(source: ModelSource, dequantize: bool, beside: bool = False) -> Codes | None:
    """What becomes of quantised weights: a `base` that was named is taken as it is, but by an adapter that stays `beside` it."""
    if dequantize:
        return "dequantized"
    return "before" if source.base is not None and not beside and source.is_quantized() else None


def as_trained(source: ModelSource) -> "Loaded | LoadedScalar":
    """The model as it was while its topmost adapter was learned: that beside the weights, which may be quantised."""
    from posttrain.tuners.load import load, load_scalar

    return load_scalar(source, apart=True) if is_scalar(source) else load(source, apart=True)


def merged(source: ModelSource, codes: Codes | None = None) -> "Loaded | LoadedScalar":
    """A model with all of its adapters folded into its weights; a reward model with its score.

    codes: what becomes of quantised weights: those that their codes stand for, or those before they were quantised. Raises
    ModelError for quantised ones without it, and for adapters that cannot be folded.
    """
    from posttrain.models import delta
    from posttrain.models.quantized import quantized
    from posttrain.tuners.injected import fold_all
    from posttrain.tuners.load import load, load_scalar

    refuse_unfoldable(source)
    if codes is None:
        refuse_codes(source)
    keep = codes != "before"
    loaded = load_scalar(source, codes=keep) if is_scalar(source) else load(source, codes=keep)
    if codes is None and quantized(loaded.lm.model):  # of a hub model, which says so itself
        raise ModelError(f"{source.path}: is quantised; --dequantize writes the weights that its codes stand for")
    if delta.active(loaded.lm.model) is not None:
        if quantized(loaded.lm.model):
            raise ModelError(
                f"{source.path}: a delta on quantised weights is not merged; name the model that it is of with --base"
            )
        delta.merge(loaded.lm.model)
    dequantize(loaded.lm.model)
    fold_all(loaded.lm.model)
    as_built(loaded.lm.model)
    return loaded


def dequantize(model: "PreTrainedModel") -> None:
    """Puts linear layers in the places of quantised ones, with the weights that their codes stand for."""
    from torch import nn

    from posttrain.models.quantized import quantized, replace
    from posttrain.models.quantizer import unmark

    found = quantized(model)
    for path, codes in found.items():
        layer = nn.Linear(codes.in_features, codes.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(codes.dense(), requires_grad=False)
        layer.bias = codes.bias
        replace(model, path, layer)
    if found:
        unmark(model)


def as_built(model: "PreTrainedModel") -> None:
    """Transposes the layers that an architecture has transposed (GPT-2's), where they were quantised."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from posttrain.models.quantized import replace

    with torch.device("meta"):
        plain = type(model)(model.config)
    for path in [path for path, each in plain.named_modules() if isinstance(each, Conv1D)]:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            own = Conv1D(layer.out_features, layer.in_features)
            own.weight, own.bias = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False), layer.bias
            replace(model, path, own)


def is_scalar(source: ModelSource) -> bool:
    """Whether it is a reward model: an adapter with a score, or a folder whose config says so. ModelError for classifiers."""
    from posttrain.tuners.folder import classes_in

    folder, below = source.folder(), source.below()
    if folder is None:
        return False
    if below is not None:
        known = classes_in(folder)
        scores, classifies = known is not None, known is not None and known.problem != "regression"
        classifies = classifies or (scores and "classes" in about_adapter(folder))
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        scores = any("Classification" in each for each in config.get("architectures") or [])
        classifies = scores and len(config.get("id2label") or "12") > 1  # transformers leaves two labels out
        classifies = classifies or (scores and config.get("problem_type") == "regression")
    if classifies:
        raise ModelError(
            f"{source.path}: is a classifier, and only language and reward models are merged and exported; use its folder as it "
            "is (peft loads an adapter's)"
        )
    return scores or (below is not None and is_scalar(below))
