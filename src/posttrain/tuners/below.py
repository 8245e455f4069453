"""What a model folder stands on, known from files alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.models.source import ModelSource, about_adapter
from posttrain.tuners.tuner import Tuner


def folds(source: ModelSource) -> bool:
    """Whether a model consists of weights alone once it is loaded: numbers into which all adapters on the way can be folded."""
    below = source.below()
    if below is None:
        return not source.is_quantized()
    tuner = tuner_of(source)
    return (tuner is None or (tuner.merges and not tuner.kept_apart)) and folds(below)


def refuse_unfoldable(source: ModelSource) -> None:
    """Raises ModelError, from files alone, where an adapter on the way to a model cannot be part of its weights."""
    below = source.below()
    if below is None:
        return
    refuse_unfoldable(below)
    if not (tuner_of(source) is None or tuner_of(source).merges):
        name = kind_of(source)
        why = "puts learned tokens before every text" if name in {"prompt", "p_tuning", "prefix"} else "adds networks of its own"
        raise ModelError(
            f"{source.path}: tuner {name} {why}, which are no part of any weight, so it cannot be merged; use the adapter "
            "folder as a model as it is, or train with a tuner that merges, such as lora"
        )


def refuse_codes(source: ModelSource) -> None:
    """Raises ModelError for a model whose lowest weights are quantised, with what can be done."""
    if not source.is_quantized():
        return
    lowest = source.foundation()
    if source.below() is None:
        raise ModelError(f"{source.path}: is quantised; --dequantize writes the weights that its codes stand for")
    other = "; --base MODEL into weights that are not quantised, which gives another (the difference is printed)"
    raise ModelError(
        f"{source.path}: the adapter was learned on {lowest.path} quantised to {lowest.quantize or 'codes'}, which cannot take a "
        "difference up; --dequantize folds it into the weights that the codes stand for, which gives the model that was trained"
        + (other if lowest.quantize else "")
    )


def tuner_of(source: ModelSource) -> Any:
    """The tuner of an adapter folder, or its class; None for one that peft alone knows, and folds in by itself."""
    known = about_adapter(folder_of(source))
    return kind_of_peft(known["peft"]) if "peft" in known else made_of(known["tuner"])


def kind_of(source: ModelSource) -> str:
    """What posttrain calls the tuner of an adapter folder; as peft does where posttrain has none such."""
    tuner = tuner_of(source)
    return str(about_adapter(folder_of(source))["peft"].get("peft_type") if tuner is None else tuner.kind)


def folder_of(source: ModelSource) -> Path:
    folder = source.folder()
    assert folder is not None
    return folder


def made_of(settings: Mapping[str, Any]) -> Tuner:
    """The tuner that an adapter folder names. Raises ModelError where this posttrain has none such."""
    try:
        return Tuner.model_validate(dict(settings))
    except ValueError as error:
        said = str(error).splitlines()
        why = next((line.strip() for line in said if "Value error" in line), said[0])
        raise ModelError(f"{why.partition(' [type=')[0]}: the adapter was made with a newer posttrain, or by hand") from None


def kind_of_peft(config: Mapping[str, Any]) -> type[Tuner] | None:
    """The tuner that a configuration of peft's is of; None for one that peft alone knows, and folds in by itself."""
    kinds = {cls.peft_type: cls for cls in Tuner.kinds.values() if cls.peft_type is not None}
    return kinds.get(str(config.get("peft_type")))
