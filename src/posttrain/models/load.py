"""Loading: from a `ModelSource` to an LM and its tokenizer, checked on a few tokens before anything is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from posttrain.errors import ModelError
from posttrain.models import layout
from posttrain.models.attention import TreePlan
from posttrain.models.lm import LM, LayoutName
from posttrain.models.source import ModelSource
from posttrain.paths import resolve

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WHOLE_ROW_ROPE = {"dynamic", "longrope"}  # position scaling that depends on the length of the whole row


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer."""

    lm: LM
    tokenizer: PreTrainedTokenizerBase


def load(source: ModelSource | str | Path) -> Loaded:
    """Loads a causal LM. Raises ModelError for what transformers cannot load, or what posttrain cannot train rightly."""
    if not isinstance(source, ModelSource):
        source = ModelSource(path=str(source))
    assert source.path is not None, "a stage is resolved to its folder before loading"
    source.check()
    folder = source.folder()
    name = str(folder) if folder else source.path
    transformers_logging.disable_progress_bar()
    trust = source.trust_remote_code is not None
    shared: dict[str, Any] = {"revision": source.trust_remote_code or source.revision, "trust_remote_code": trust}
    try:
        config = AutoConfig.from_pretrained(name, **shared)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=DTYPES[source.dtype], use_safetensors=True, output_loading_info=True, **shared
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **shared)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{source.path}: transformers cannot load this model: {first}") from None
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{source.path}: the weights lack {missing[0]} ({len(missing)} missing in all); the file is not whole")
    if source.chat_template is not None:
        tokenizer.chat_template = resolve(source.chat_template).read_text(encoding="utf-8")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{source.path}: the tokenizer has {len(tokenizer)} tokens, but the model only {vocabulary} embeddings; "
            "this tokenizer belongs to another model"
        )
    device = source.device if source.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ModelError(f"{source.path}: device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return Loaded(wrap(model, source), tokenizer)


def wrap(model: PreTrainedModel, source: ModelSource) -> LM:
    """An LM around a transformers model, in the layout that it takes."""
    model.eval()
    model.config.use_cache = False
    able = source.layout != "padded" and takes_the_tree(model)
    if source.layout == "tree" and not able:
        raise ModelError(f"{source.path}: {type(model).__name__} does not take layout: tree; use layout: auto, or padded")
    name: LayoutName = "tree" if able else "padded"
    lm = LM(model, name, mixed=source.dtype == "mixed")
    if (gap := head_gap(lm)) > 1e-2:
        raise ModelError(
            f"{source.path}: this architecture ({type(model).__name__}) does something to its logits that posttrain does "
            f"not know: they differ from the model's own by {gap:.3g}; please report it"
        )
    if source.gradient_checkpointing:
        checkpoint_activations(model, offload=source.gradient_checkpointing == "offload")
    return lm


def fresh(config: Any, source: ModelSource) -> LM:
    """A randomly initialised model of a transformers config (torch's generator decides the weights)."""
    return wrap(AutoModelForCausalLM.from_config(config).to(DTYPES[source.dtype]), source)


def checkpoint_activations(model: PreTrainedModel, offload: bool = False) -> None:
    """Gradient checkpointing without train mode, which would turn dropout on; recomputation follows the same attention plan.

    offload: the layers' inputs, all that checkpointing keeps of them, are kept in host memory.
    """
    from posttrain.models.attention import recompute_context

    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its older name
    enable({"use_reentrant": False, "context_fn": recompute_context(model)})
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
            if offload:
                module._gradient_checkpointing_func = in_host_memory(module._gradient_checkpointing_func)


def in_host_memory(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """torch's checkpointing of one layer, whose inputs wait for the backward in host memory (pinned, for a GPU of CUDA)."""

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):  # inside, checkpointing's own hooks rule
            return checkpoint(*args, **kwargs)

    return checkpointed


def takes_the_tree(model: PreTrainedModel) -> bool:
    """Whether a flat row of several sequences gives each what it gets alone. Asked of the model itself, on 44 tokens."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if not getattr(model, "_supports_attention_backend", False) or rope.get("rope_type") in WHOLE_ROW_ROPE:
        return False
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    prefix, one, other, apart = (torch.randint(0, vocabulary, (size,), generator=draw).tolist() for size in (16, 7, 6, 15))
    together, alone = [prefix + one, prefix + other, apart], []
    lm = LM(model, "tree")
    try:
        with torch.no_grad():
            tree = layout.tree(together)
            states = lm.states(tree, TreePlan(tree))
            for row in together:
                alone.append(lm.backbone(input_ids=torch.tensor([row], device=lm.device), use_cache=False).last_hidden_state[0])
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, AssertionError):
        return False  # the architecture has attention of its own
    tolerance = 1e-3 if states.dtype in (torch.float32, torch.float64) else 5e-2
    return all(
        _relative(states[torch.from_numpy(path).to(lm.device)], expected) < tolerance
        for path, expected in zip(tree.paths, alone, strict=True)
    )


def head_gap(lm: LM) -> float:
    """The relative difference between `LM.project` of the last states and the model's own logits, on 8 tokens."""
    ids = torch.arange(3, 11, device=lm.device)[None] % lm.model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        ours = lm.project(lm.backbone(input_ids=ids, use_cache=False).last_hidden_state[0])
        return _relative(ours, lm.model(input_ids=ids, use_cache=False).logits[0])


def _relative(one: "Tensor", other: "Tensor") -> float:
    one, other = one.float(), other.float()
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes an ordinary transformers folder: safetensors, config, tokenizer and chat template."""
    transformers_logging.disable_progress_bar()
    before, model.config.use_cache = model.config.use_cache, True  # off while training; not for those who use the model
    try:
        model.save_pretrained(folder, safe_serialization=True)
    except SafetensorError as error:  # a full disk, as the library says it
        raise OSError(f"{error} while writing {folder}") from error
    model.config.use_cache = before
    tokenizer.save_pretrained(folder)
