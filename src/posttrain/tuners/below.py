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
    known = about_adapter(folder_of(source))
    tuner = kind_of_peft(known["peft"]) if "peft" in known else made_of(known["tuner"])
    return (tuner is None or tuner.merges) and folds(below)


def refuse_unfoldable(source: ModelSource) -> None:
    """Raises ModelError, from files alone, where an adapter on the way to a model cannot be part of its weights."""
    below = source.below()
    if below is None:
        return
    refuse_unfoldable(below)
    if not folds(source):
        name = kind_of(source)
        why = "puts learned tokens before every text" if name in {"prompt", "p_tuning", "prefix"} else "adds networks of its own"
        raise ModelError(
            f"{source.path}: tuner {name} {why}, which are no part of any weight, so it cannot be merged; use the adapter "
            "folder as a model as it is, or train with a tuner that merges, such as lora"
        )


def kind_of(source: ModelSource) -> str:
    """The tuner of an adapter folder, as posttrain calls it; as peft does where posttrain has none such."""
    known = about_adapter(folder_of(source))
    if "peft" not in known:
        return str(made_of(known["tuner"]).kind)
    kind = kind_of_peft(known["peft"])
    return str(known["peft"].get("peft_type")) if kind is None else str(kind.kind)


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
