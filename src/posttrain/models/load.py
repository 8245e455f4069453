"""Loading: from a `ModelSource` to an LM and its tokenizer, checked on a few tokens before anything is trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from posttrain.errors import ModelError
from posttrain.models import layout
from posttrain.models.attention import TreePlan
from posttrain.models.backbone import Backbone, LayoutName
from posttrain.models.encoder import Encoder
from posttrain.models.heads import head_parameters
from posttrain.models.lm import LM
from posttrain.models.quantizer import plan_of
from posttrain.models.scalar import ScalarLM
from posttrain.models.source import ModelSource, compare_tokens
from posttrain.paths import resolve

DTYPES = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WHOLE_ROW_ROPE = {"dynamic", "longrope"}  # position scaling that depends on the length of the whole row


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer."""

    lm: LM
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedScalar:
    """A model that scores, and its tokenizer."""

    lm: ScalarLM
    tokenizer: PreTrainedTokenizerBase


def load(source: ModelSource | str | Path) -> Loaded:
    """Loads a causal LM. Raises ModelError for what transformers cannot load, or what posttrain cannot train rightly."""
    source = resolved(source)
    model, tokenizer, report = from_pretrained(AutoModelForCausalLM, source)
    judges = any("Classification" in each for each in model.config.architectures or [])
    if judges or "score.weight" in report["unexpected_keys"]:
        raise ModelError(f"{source.path}: scores or classifies, and does not write; name a language model")
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{source.path}: the weights lack {missing[0]} ({len(missing)} missing in all); the file is not whole")
    return Loaded(wrap(model, source), tokenizer)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone, with the chat template that its source names. Raises ModelError where transformers cannot
    load it."""
    source = resolved(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**hub_options(source))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source.path}: transformers cannot load this tokenizer: {str(error).splitlines()[0]}") from None
    if source.chat_template is not None:
        tokenizer.chat_template = resolve(source.chat_template).read_text(encoding="utf-8")
    return tokenizer


def refuse_other_tokenizer(role: str, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError, before its weights are read, where a role's tokenizer is not the policy's."""
    compare_tokens(role, str(source.path), tokenizer.get_vocab(), load_tokenizer(source).get_vocab())


def load_scalar(source: ModelSource | str | Path, fresh: Callable[[Tensor], Any] | None = None) -> LoadedScalar:
    """Loads a model that scores sequences: a reward model or a critic.

    fresh: what fills the weight [1, D] of a score head in place, where the folder holds a causal LM and so has none; without
    it a folder that has none is refused. Raises ModelError as `load`.
    """
    source = resolved(source)
    model, tokenizer, report = from_pretrained(AutoModelForSequenceClassification, source, num_labels=1)
    missing = sorted(report["missing_keys"])
    model.config.problem_type = None  # of a classifier, which has no shift
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ModelError(
            f"{source.path}: transformers gives {type(model).__name__} no linear layer `score`; take a decoder such as Llama"
        )
    model.score.to(torch.promote_types(model.score.weight.dtype, torch.float32))  # a difference of 1e-3 is a preference
    if missing == ["score.weight"] and fresh is not None:
        with torch.no_grad():
            fresh(model.score.weight)
    elif missing == ["score.weight"]:
        raise ModelError(f"{source.path}: is no reward model: it has no `score`; train one with objective bradley_terry")
    elif missing or report["mismatched_keys"]:
        odd = [*missing, *(str(each[0]) for each in report["mismatched_keys"])]
        raise ModelError(f"{source.path}: the weights lack {odd[0]} ({len(odd)} missing in all); it is no whole reward model")
    else:
        restore_head(model, source.folder())
    return LoadedScalar(wrap_scalar(model, source), tokenizer)


def restore_head(model: PreTrainedModel, folder: Path | None) -> None:
    """The head of a local folder as it was stored: not rounded to the dtype that the model is loaded in."""
    head = head_parameters(model)
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        with safe_open(file, framework="pt") as weights, torch.no_grad():
            for name in set(weights.keys()) & set(head):
                head[name].copy_(weights.get_tensor(name))


def resolved(source: ModelSource | str | Path) -> ModelSource:
    if not isinstance(source, ModelSource):
        source = ModelSource(path=str(source))
    assert source.path is not None, "a stage is resolved to its folder before loading"
    source.check()
    return source


def hub_options(source: ModelSource) -> dict[str, Any]:
    """What transformers' `from_pretrained` asks of any model: its place, its revision, and whether its own code may run."""
    return {
        "pretrained_model_name_or_path": str(source.folder() or source.path),
        "revision": source.trust_remote_code or source.revision,
        "trust_remote_code": source.trust_remote_code is not None,
    }


def stored_dtype(source: ModelSource) -> torch.dtype | None:
    """The precision of the weights that lie below all of a model's adapters, as its config says it."""
    found: torch.dtype | None = AutoConfig.from_pretrained(**hub_options(source.foundation())).dtype
    return found


@contextmanager
def said_by(source: ModelSource) -> Iterator[None]:
    """Says transformers' faults as ours, and keeps it quiet."""
    transformers_logging.disable_progress_bar()
    loudness = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that a score head is new is known
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{source.path}: transformers cannot load this model: {first}") from None
    finally:
        transformers_logging.set_verbosity(loudness)


def from_pretrained(
    auto: Any, source: ModelSource, resized: bool = False, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any]:
    """The model on its device, its tokenizer, and what transformers reports of the loading. `options` are settings of its config;
    `resized`: weights of another shape than these ask for are left out."""
    assert source.path is not None
    place = hub_options(source)
    with said_by(source):
        config = AutoConfig.from_pretrained(**place, **options)
        plan = plan_of(source.path, config, source.quantize, source.double)
        coded = {} if plan is None else {"quantization_config": plan}
        model, report = auto.from_pretrained(
            **place, config=config, dtype=DTYPES[source.dtype], use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=resized, **coded,
        )  # fmt: skip
    tokenizer = load_tokenizer(source)
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
    return model, tokenizer, report


Wrapped = TypeVar("Wrapped", LM, ScalarLM, Encoder)


def wrap(model: PreTrainedModel, source: ModelSource) -> LM:
    """An LM around a transformers causal LM, in the layout that it takes."""
    return wrapped(LM, model, source, head_gap)


def wrap_scalar(model: PreTrainedModel, source: ModelSource) -> ScalarLM:
    """A ScalarLM around a transformers sequence classifier for decoders, in the layout that it takes."""
    return wrapped(ScalarLM, model, source, score_gap)


def wrapped(kind: type[Wrapped], model: PreTrainedModel, source: ModelSource, gap_of: Callable[[Wrapped], float]) -> Wrapped:
    model.eval()
    model.config.use_cache = False
    able = source.layout != "padded" and kind is not Encoder and takes_the_tree(model)
    if source.layout == "tree" and not able:
        raise ModelError(f"{source.path}: {type(model).__name__} does not take layout: tree; use layout: auto, or padded")
    name: LayoutName = "tree" if able else "padded"
    lm = kind(model, name)  # not yet mixed: what that rounds is no fault of the architecture's
    if (gap := gap_of(lm)) > (1e-1 if kind is Encoder and model.dtype == torch.bfloat16 else 1e-2):
        raise ModelError(
            f"{source.path}: this architecture ({type(model).__name__}) does something to its {lm.gives} that posttrain does "
            f"not know: they differ from the model's own by {gap:.3g}; please report it"
        )
    lm.mixed = source.dtype == "mixed"
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
    lm = Backbone(model, "tree")
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


def score_gap(lm: ScalarLM) -> float:
    """The difference between `ScalarLM.logits_of` the last state and the model's own logits of 8 tokens, relative where large."""
    pad, vocabulary = lm.model.config.get_text_config().pad_token_id, lm.model.get_input_embeddings().weight.shape[0]
    tokens = [token % vocabulary for token in range(3, 11) if token % vocabulary != pad]  # the model passes over pads at the end
    ids = torch.tensor([tokens], device=lm.device)
    cast = lm.head.register_forward_pre_hook(lambda head, states: (states[0].to(head.weight.dtype),))  # float32 on bfloat16
    try:
        with torch.no_grad():
            ours = lm.logits_of(lm.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1:])[0]
            theirs = lm.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        cast.remove()
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1.0)).max())


def _relative(one: Tensor, other: Tensor) -> float:
    one, other = one.float(), other.float()
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes an ordinary transformers folder: safetensors, config, tokenizer and chat template."""
    transformers_logging.disable_progress_bar()
    before = getattr(model.config, "use_cache", True)
    model.config.use_cache = True  # off while training; not for those who use the model
    try:
        model.save_pretrained(folder, safe_serialization=True)
    except SafetensorError as error:  # a full disk, as the library says it
        raise OSError(f"{error} while writing {folder}") from error
    model.config.use_cache = before
    tokenizer.save_pretrained(folder)
