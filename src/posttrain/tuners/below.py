"""What a model folder stands on, known from files alone."""

from collections.abc import Mapping
from typing import Any

from posttrain.errors import ModelError
from posttrain.models.source import ModelSource, about_adapter
from posttrain.tuners.tuner import Tuner


def folds(source: ModelSource) -> bool:
    """Whether a model consists of weights alone once it is loaded: numbers into which all adapters on the way can be folded."""
    below = source.below()
    if below is None:
        return not source.is_quantized()
    folder = source.folder()
    assert folder is not None
    known = about_adapter(folder)
    tuner = kind_of_peft(known["peft"]) if "peft" in known else made_of(known["tuner"])
    return (tuner is None or (tuner.merges and not tuner.kept_apart)) and folds(below)


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
