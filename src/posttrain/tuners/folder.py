"""Adapter folders: what a tuner has learned, without the model that it was learned on.

They hold adapter_model.safetensors; peft's adapter_config.json, where peft knows the tuner; and posttrain_adapter.json, which
names the tuner and the model below, with the hash of its files. Nothing is ever unpickled.
"""

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.heads import head_parameters, head_parts, of_config
from posttrain.models.quantized import quantized
from posttrain.models.source import ADAPTER, HUB, PEFT, ModelSource, about_adapter
from posttrain.paths import named
from posttrain.text import Classes
from posttrain.tuners.below import folds, kind_of_peft, made_of
from posttrain.tuners.injected import ADAPTER as NAME
from posttrain.tuners.injected import PREFIX, activate, fold, refuse_dora, task_of
from posttrain.tuners.soft import SoftTuner
from posttrain.tuners.tuner import Tuner, in_dtype_of, refuse_misfit

WEIGHTS = "adapter_model.safetensors"
HEADS = ("score.", "classifier.", "pre_classifier.", "head.")  # how transformers' classifiers call theirs


def save_adapter(tuner: Tuner, model: PreTrainedModel, folder: Path, base: ModelSource) -> None:
    """Writes what a tuner has learned. `PeftModel.from_pretrained` loads the folder where peft knows the tuner."""
    state = {name: each.detach().cpu().contiguous() for name, each in tuner.state(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {
        "tuner": tuner.model_dump(mode="json"), "base": base.path, "revision": base.revision, "weights": base.weights(),
    }  # fmt: skip
    if base.quantize is not None:
        known |= {"quantize": base.quantize, "double": base.double}
    local = base.folder()
    if local is not None and not str(base.path).startswith("posttrain:"):
        known["beside"] = os.path.relpath(local, folder)  # where the two folders are moved together
    config, head = tuner.peft_config(model), head_parameters(model)
    kind = None if config is None else tuner.peft_type
    state |= {_in_file(name, kind): each.detach().cpu().contiguous() for name, each in head.items()}
    if head and model.config.problem_type is not None:
        known["classes"] = asdict(of_config(model.config))
    elif head:
        known["reward_shift"] = float(getattr(model.config, "reward_shift", None) or 0.0)
    save_file(state, folder / WEIGHTS, metadata=tuner.header(model, known))
    if config is not None:
        config.base_model_name_or_path, config.revision, config.inference_mode = base.path, base.revision, True
        parts = [path.rpartition(".")[2] for path in head_parts(model)]
        config.modules_to_save = parts if parts and hasattr(config, "modules_to_save") else None
        config.save_pretrained(str(folder))
    (folder / ADAPTER).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def load_adapter(
    model: PreTrainedModel, folder: Path, base: ModelSource, new_head: bool = False, apart: bool = False
) -> dict[str, Any]:
    """Puts a folder's adapter into the model that it was learned on, frozen; it is folded into the weights where that can be,
    unless it is to stay `apart`.

    new_head: the model's own head stays, and the folder's is left aside. Returns what the folder says of it.

    Raises ModelError for the adapter of another model, by hash or by shapes.
    """
    known = about_adapter(folder)
    refuse_other_base(known, folder, base)
    state = read(folder)
    peft = json.loads((folder / PEFT).read_text(encoding="utf-8")) if (folder / PEFT).is_file() else None
    places = head_parameters(model)
    own = [name for name in state if (_bare(name) in places if places else _bare(name).startswith(HEADS))]
    head = {_bare(name): state.pop(name) for name in own}
    if places:  # of a language model's adapter, for a critic or a classifier that begins as it
        state = {name: each for name, each in state.items() if not _bare(name).startswith("lm_head.")}
    try:
        _put_in(model, folder, known.get("tuner"), peft, state, not apart and foldable(model, base))
        if head and not new_head:
            _put_head(model, head)
    except ModelError as error:
        raise ModelError(f"{named(folder)}: {error}") from None
    model.requires_grad_(False)
    return known


def refuse_other_base(known: dict[str, Any], folder: Path, base: ModelSource) -> None:
    """Raises ModelError where an adapter was made on other weights than those of `base`, and both are at hand."""
    recorded = str(known.get("weights") or HUB)
    if not recorded.startswith(HUB) and base.folder() is not None and recorded != base.weights():
        raise ModelError(
            f"{named(folder)}: this adapter was made on another model than {base.path}: its weights have changed since, or it is "
            "not the one; name the right one with `base`"
        )


def foldable(model: PreTrainedModel, source: ModelSource) -> bool:
    """Whether a loaded model consists of weights alone, into which what is learned on it can be folded."""
    return folds(source) and not quantized(model)


def _put_in(
    model: PreTrainedModel, folder: Path, settings: dict[str, Any] | None, peft: dict[str, Any] | None, state: dict[str, Tensor],
    exact: bool,
) -> None:  # fmt: skip
    kind = None if peft is None else kind_of_peft(peft)
    if peft is not None and (kind is None or not issubclass(kind, SoftTuner)):
        inject(model, folder, state, NAME if exact else f"below{len(getattr(model, 'peft_config', {}))}")
        if exact:
            fold(model)
        else:
            activate(model)
        return
    if settings is not None:
        begun = {"text": None} if "text" in settings else {}  # what it began with is overwritten
        tuner = made_of(settings | begun)
    else:
        assert kind is not None
        assert peft is not None
        tuner = kind.from_peft(peft)
    with torch.random.fork_rng():
        tuner.install_stored(model, state)


def inject(model: PreTrainedModel, folder: Path, state: dict[str, Tensor], name: str) -> None:
    """Any adapter that peft puts into layers, beside those that are there. Raises ModelError where it does not fit."""
    from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    from posttrain.tuners.low_rank import take_for

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"peft does not understand its {PEFT}: {type(error).__name__}: {error}") from None
    config.inference_mode, config.task_type = False, task_of(model)
    if isinstance(config, LoraConfig):
        take_for(config)
    for only in ("lora_bias", "alora_invocation_tokens", "trainable_token_indices"):
        if getattr(config, only, None):
            raise ModelError(f"its {only} is something that peft alone computes; merge the adapter with peft first")
    config.modules_to_save = None
    if getattr(config, "use_dora", False):
        refuse_dora(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model, name)
            places = get_peft_model_state_dict(model, adapter_name=name)
            if own := sorted({key.removeprefix(PREFIX) for key in state} - set(places)):
                whose = "a weight of the model itself" if own[0] in dict(model.named_parameters()) else "unknown to this model"
                raise ModelError(
                    f"the adapter holds {own[0]}, which is {whose}: it was made for another model, or learned more than an "
                    "adapter; merge it with peft first"
                )
            for key, parameter in model.named_parameters():
                if name in key.split("."):  # in the precision that it was learned in, whatever the model's
                    parameter.data = parameter.data.to(in_dtype_of(model))
            found = set_peft_model_state_dict(model, {key.removeprefix(PREFIX): each for key, each in state.items()}, name)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"peft cannot put this adapter into the model: {str(error).splitlines()[0]}") from None
    missing = [key for key in found.missing_keys if name in key.split(".")]
    if missing:
        raise ModelError(f"the adapter lacks {missing[0]}: it was made for another model, or its file is not whole")


def read(folder: Path) -> dict[str, Tensor]:
    """What an adapter's file holds. Raises ModelError for one that is not whole."""
    file = folder / WEIGHTS
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{named(file)}: cannot be read: {str(error).splitlines()[0]}; the file is not whole") from None


def _lengths(folder: Path) -> dict[str, int]:
    """{tensor of an adapter's file: its first size}, from the file's header; 1 for a single number."""
    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: ([*stored.get_slice(name).get_shape(), 1])[0] for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{named(file)}: cannot be read: {str(error).splitlines()[0]}; the file is not whole") from None


def has_score(folder: Path) -> bool:
    """Whether an adapter's file holds a score head."""
    return any(_bare(name) == "score.weight" for name in _lengths(folder))


def classes_in(folder: Path) -> Classes | None:
    """What an adapter's own head tells apart; None where it has none. peft's files name no labels."""
    known = about_adapter(folder)
    if "classes" in known:
        return Classes(known["classes"]["problem"], tuple(known["classes"]["labels"]))
    last = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    outputs = next((length for name, length in _lengths(folder).items() if _bare(name) in last), None)
    if outputs is None:
        return None
    labels = tuple(f"LABEL_{index}" for index in range(outputs))
    return Classes("regression") if outputs == 1 else Classes("single", labels)


def _in_file(name: str, peft_type: str | None) -> str:
    """What a file calls a parameter of a head, which is trained in full beside any tuner."""
    of_prompts = peft_type in {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
    return name if peft_type is None else f"base_model.{name}" if of_prompts else f"{PREFIX}{name}"


def _bare(name: str) -> str:
    """The name of a parameter in the model, from that in a file."""
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name


def _put_head(model: PreTrainedModel, head: dict[str, Tensor]) -> None:
    places = head_parameters(model)
    if not places:
        raise ModelError("is an adapter of a model that scores or classifies, and does not write; name a language model")
    refuse_misfit(head, {name: each.shape for name, each in places.items()})
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(head[name])
