"""Differences from a base as files: one safetensors file whose header says what it is of. Nothing is unpickled."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import ModelError
from posttrain.models.delta import Delta, LowRank, add
from posttrain.models.linears import below_head, matrix_of
from posttrain.models.source import HUB, ModelSource
from posttrain.paths import named

KEY, FORMAT = "posttrain_delta", 1  # of the header; the version of what follows it
IN_FOLDER = "adapter_model.safetensors"  # the same file as an adapter folder has it


def header(delta: Delta, model: PreTrainedModel, base: Mapping[str, Any]) -> dict[str, str]:
    """base: its `base` (a path or a hub name) and the hash of its `weights`."""
    forms = {"low_rank" if isinstance(part, LowRank) else "signs" for part in delta.parts.values()}
    shapes = {path: list(matrix_of(layer).shape) for path, layer in below_head(model).items()}
    about = {
        "format": FORMAT, "form": " ".join(sorted(forms)), "base": base.get("base"), "weights": base.get("weights"),
        "shapes": shapes,
    }  # fmt: skip
    return {KEY: json.dumps(about)}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what the file says of itself, its tensors); of an adapter folder that in it. Raises ModelError for no whole delta."""
    file = path / IN_FOLDER if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{named(path)}: no such file; make one with `posttrain delta FINE BASE`")
    try:
        with safe_open(file, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get(KEY, "null"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()} if about else {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"{named(file)}: cannot be read: {first}; the file is not whole, or no delta") from None
    if not isinstance(about, dict):
        raise ModelError(f"{named(file)}: is no delta: its header does not say of what; make one with `posttrain delta`")
    if about.get("format") != FORMAT:
        raise ModelError(f"{named(file)}: is of format {about.get('format')}, made with a newer posttrain; update this one")
    return about, tensors


def write_alone(folder: Path, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Writes the delta of an adapter folder as a file of its own, with what its tokenizer has beside the base's tokens."""
    about, tensors = read(folder)
    about |= {"chat_template": tokenizer.chat_template, "eos_token": tokenizer.eos_token}
    save_file(tensors, file, metadata={KEY: json.dumps(about)})


def tokenizer_with(path: Path, below: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The base's tokenizer as it is used with a delta: with the chat template and the end of text of the fine-tuned model."""
    if (path / "tokenizer_config.json").is_file():
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
        return found
    about, tokenizer = read(path)[0], deepcopy(below)
    if about.get("chat_template") is not None:
        tokenizer.chat_template = about["chat_template"]
    if about.get("eos_token") is not None:
        tokenizer.eos_token = about["eos_token"]
    return tokenizer


def add_file(model: PreTrainedModel, path: Path, name: str, base: ModelSource) -> None:
    """Gives the base a difference from a file, not yet active. Raises ModelError for a file of another base."""
    about, tensors = read(path)
    recorded = str(about.get("weights") or HUB)
    if not recorded.startswith(HUB) and base.folder() is not None and recorded != base.weights():
        raise ModelError(
            f"{named(path)}: this delta was made on another model than {base.path}: on {about.get('base')}, or its weights have "
            "changed since"
        )
    for where, layer in below_head(model).items():
        wanted, shape = about.get("shapes", {}).get(where), list(matrix_of(layer).shape)
        if wanted != shape:
            shown = "is not in the delta" if wanted is None else f"{' x '.join(map(str, wanted))} in the delta"
            ours = f"{where} is {' x '.join(map(str, shape))} in {base.path}"
            raise ModelError(f"{named(path)}: {ours} and {shown}: it was made on another model")
    try:
        with torch.no_grad():
            add(model, Delta.of_tensors(tensors, model), name)
    except ModelError as error:
        raise ModelError(f"{named(path)}: {error}") from None
