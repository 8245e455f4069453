"""Where the parts of a transformer's blocks are, by the names that architectures give them."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from posttrain.errors import RecipeError
from posttrain.tuners.injected import layers_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Part = Literal["query", "key", "value", "query_key_value", "attention_out", "feed_forward_in", "feed_forward_out"]

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|layer|blocks)\.(\d+)\.")  # the number of the block that a path leads into

NAMES: dict[str, Part] = {
    "q_proj": "query", "query": "query", "q_lin": "query",
    "k_proj": "key", "key": "key", "k_lin": "key",
    "v_proj": "value", "value": "value", "v_lin": "value",
    "qkv_proj": "query_key_value", "query_key_value": "query_key_value", "Wqkv": "query_key_value", "c_attn": "query_key_value",
    "o_proj": "attention_out", "out_lin": "attention_out",
    "gate_proj": "feed_forward_in", "up_proj": "feed_forward_in", "gate_up_proj": "feed_forward_in", "fc1": "feed_forward_in",
    "c_fc": "feed_forward_in", "Wi": "feed_forward_in", "dense_h_to_4h": "feed_forward_in", "lin1": "feed_forward_in",
    "down_proj": "feed_forward_out", "fc2": "feed_forward_out", "dense_4h_to_h": "feed_forward_out", "lin2": "feed_forward_out",
}  # fmt: skip
OUTPUTS = {"c_proj", "dense", "out_proj", "Wo"}  # of attention, or of the feed-forward layer: their parent says which


def part_of(path: str) -> Part | None:
    """The part that a linear layer is, by its path; None for one that is of no known block."""
    *parents, name = path.split(".")
    if name in NAMES:
        return NAMES[name]
    if name not in OUTPUTS:
        return None
    attention = any("attn" in parent or "attention" in parent for parent in parents[-2:])
    if attention:
        return "attention_out"
    if parents and parents[-1] == "intermediate":
        return "feed_forward_in"
    return "feed_forward_out" if parents and parents[-1] in {"mlp", "output", "ffn"} else None


def linears(model: "PreTrainedModel") -> "dict[str, nn.Module]":
    """The linear layers through which text goes by path, GPT-2's transposed ones among them; where peft's stand in their place,
    those."""
    from posttrain.models.senses import of_text

    reads = of_text(model)
    return {path: layer for path, layer in all_linears(model).items() if reads(path)}


def all_linears(model: "nn.Module") -> "dict[str, nn.Module]":
    """With those of a multimodal model's towers."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    adapted = layers_of(model)
    return {
        path: module
        for path, module in model.named_modules()
        if path in adapted or isinstance(module, nn.Linear | Conv1D)
        if not any(path.startswith(f"{other}.") for other in adapted)
    }


def places(model: "PreTrainedModel", parts: Iterable[Part], tuner: str) -> dict[str, list[str]]:
    """{part: the paths of its layers, one or more a block}. Raises RecipeError where the architecture has no such part, and for
    the feed-forward layer of a mixture, which is many."""
    found: dict[str, list[str]] = {part: [] for part in parts}
    if any(part.startswith("feed_forward") for part in found) and any("expert" in path for path, _ in model.named_modules()):
        raise RecipeError(
            f"tuner {tuner}: {type(model).__name__} is a mixture of experts, and no one layer of it is the feed-forward "
            "layer of a block; take another tuner, such as lora"
        )
    for path in linears(model):
        part = part_of(path)
        if part in found:
            found[part].append(path)
    for name, paths in found.items():
        if not paths:
            names = sorted({path.rpartition(".")[2] for path in linears(model)})
            raise RecipeError(
                f"tuner {tuner}: {type(model).__name__} has no layer that is known as its {name.replace('_', ' ')} "
                f"(its linear layers are called {', '.join(names)}); take another tuner, such as lora"
            )
    return found
