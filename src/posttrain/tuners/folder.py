"""Adapter folders: what a tuner has learned, without the model that it was learned on.

They hold adapter_model.safetensors; peft's adapter_config.json, where peft knows the tuner; and posttrain_adapter.json, which
names the tuner and the model below, with the hash of its files. Nothing is ever unpickled.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.quantized import quantized
from posttrain.models.source import ADAPTER, HUB, PEFT, ModelSource, about_adapter
from posttrain.paths import named
from posttrain.tuners.below import folds, kind_of_peft, made_of
from posttrain.tuners.injected import ADAPTER as NAME
from posttrain.tuners.injected import PREFIX, activate, fold, task_of
from posttrain.tuners.soft import SoftTuner
from posttrain.tuners.tuner import Tuner

WEIGHTS = "adapter_model.safetensors"


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
    if scores(model):
        state[_score(tuner.peft_type)] = head_of(model).weight.detach().cpu().contiguous()
        known["reward_shift"] = float(getattr(model.config, "reward_shift", None) or 0.0)
    save_file(state, folder / WEIGHTS)
    config = tuner.peft_config(model)
    if config is not None:
        config.base_model_name_or_path, config.revision, config.inference_mode = base.path, base.revision, True
        config.modules_to_save = ["score"] if scores(model) and hasattr(config, "modules_to_save") else None
        config.save_pretrained(str(folder))
    (folder / ADAPTER).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, folder: Path, base: ModelSource) -> dict[str, Any]:
    """Puts a folder's adapter into the model that it was learned on, frozen; it is folded into the weights where that can be.

    Returns what the folder says of it. Raises ModelError for the adapter of another model, by hash or by shapes.
    """
    known = about_adapter(folder)
    recorded = str(known.get("weights") or HUB)
    if not recorded.startswith(HUB) and base.folder() is not None and recorded != base.weights():
        raise ModelError(
            f"{named(folder)}: this adapter was made on another model than {base.path}: its weights have changed since, or it is "
            "not the one; name the right one with `base`"
        )
    state = _read(folder)
    peft = json.loads((folder / PEFT).read_text(encoding="utf-8")) if (folder / PEFT).is_file() else None
    kind = None if peft is None else str(peft.get("peft_type"))
    head = state.pop(_score(kind), None)
    if scores(model):  # of a language model's adapter, for a critic that begins as it
        state = {name: each for name, each in state.items() if not name.startswith("lm_head.")}
    try:
        _put_in(model, folder, known.get("tuner"), peft, state, foldable(model, base))
        if head is not None:
            _put_head(model, head)
    except ModelError as error:
        raise ModelError(f"{named(folder)}: {error}") from None
    model.requires_grad_(False)
    return known


def foldable(model: PreTrainedModel, source: ModelSource) -> bool:
    """Whether a loaded model consists of weights alone, into which what is learned on it can be folded."""
    return folds(source) and not quantized(model)


def _put_in(
    model: PreTrainedModel, folder: Path, settings: dict[str, Any] | None, peft: dict[str, Any] | None, state: dict[str, Tensor],
    exact: bool,
) -> None:  # fmt: skip
    kind = None if peft is None else kind_of_peft(peft)
    if peft is not None and (kind is None or not issubclass(kind, SoftTuner)):
        _inject(model, folder, state, exact)
        return
    if settings is not None:
        begun = {"text": None} if "text" in settings else {}  # what it began with is overwritten
        tuner = made_of(settings | begun)
    else:
        assert kind is not None
        assert peft is not None
        tuner = kind.from_peft(peft)
    with torch.random.fork_rng():
        tuner.install(model)
    tuner.restore(model, state)


def _inject(model: PreTrainedModel, folder: Path, state: dict[str, Tensor], exact: bool) -> None:
    """Any adapter that peft puts into layers; folded into the weights where those are all that the layers compute with."""
    from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.task_type = False, task_of(model)
    for only in ("lora_bias", "alora_invocation_tokens", "trainable_token_indices"):
        if getattr(config, only, None):
            raise ModelError(f"its {only} is something that peft alone computes; merge the adapter with peft first")
    config.modules_to_save = None
    name = NAME if exact else f"below{len(getattr(model, 'peft_config', {}))}"
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
            found = set_peft_model_state_dict(model, {key.removeprefix(PREFIX): each for key, each in state.items()}, name)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"peft cannot put this adapter into the model: {str(error).splitlines()[0]}") from None
    missing = [key for key in found.missing_keys if name in key.split(".")]
    if missing:
        raise ModelError(f"the adapter lacks {missing[0]}: it was made for another model, or its file is not whole")
    if exact:
        fold(model)
    else:
        activate(model)


def _read(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{named(file)}: cannot be read: {str(error).splitlines()[0]}; the file is not whole") from None


def has_score(folder: Path) -> bool:
    """Whether an adapter's file holds a score head."""
    return any(name.endswith("score.weight") for name in _read(folder))


def _score(peft_type: str | None) -> str:
    """What a file calls a score head, which is trained in full beside any tuner."""
    of_prompts = peft_type in {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
    return "score.weight" if peft_type is None else "base_model.score.weight" if of_prompts else f"{PREFIX}score.weight"


def _put_head(model: PreTrainedModel, head: Tensor) -> None:
    if not scores(model):
        raise ModelError("is a reward model's adapter: it scores and does not write; name a language model")
    if head.shape != head_of(model).weight.shape:
        raise ModelError(f"the adapter's score head is {tuple(head.shape)}: it was made for another model")
    with torch.no_grad():
        head_of(model).weight.copy_(head)


def scores(model: PreTrainedModel) -> bool:
    """Whether it is a model with a score head."""
    return model.get_output_embeddings() is None and hasattr(model, "score")


def head_of(model: PreTrainedModel) -> nn.Linear:
    head = model.get_submodule("score")
    assert isinstance(head, nn.Linear)
    return head
