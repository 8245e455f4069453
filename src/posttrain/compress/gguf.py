"""GGUF files, as llama.cpp reads them: written through llama.cpp's own `gguf` package, read back by transformers.

What llama.cpp and transformers could not read as the model is refused by name: first by the settings that transformers finds in
the finished header, then by the tensors for which the format has no name.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from posttrain.compress import vocabulary
from posttrain.errors import ModelError

DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q5_1": "Q5_1", "q5_0": "Q5_0", "q4_1": "Q4_1",
    "q4_0": "Q4_0",
}  # fmt: skip
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "gemma3_text": "gemma3"
}  # fmt: skip
SIDE = {  # settings of a config that do not decide what a model computes, or are kept elsewhere in the file
    "_model_name_or_path", "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "bos_token_id", "dtype",
    "embd_pdrop", "eos_token_id", "feed_forward_length", "id2label", "initializer_range", "label2id", "max_window_layers",
    "model_type", "n_ctx", "pad_token_id", "pretraining_tp", "resid_pdrop", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "tie_word_embeddings", "tokenizer_class",
    "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip


def library() -> Any:
    """The package gguf. Raises ModelError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError("format gguf needs the package gguf: pip install 'posttrain[gguf]'") from None
    return gguf


def refuse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises ModelError for an architecture, or a tokenizer, that no such file can be written of. `write` refuses the rest."""
    library()
    if (kind := model.config.model_type) not in ARCHITECTURES:
        raise ModelError(
            f"{type(model).__name__} ({kind}) cannot be written as GGUF: posttrain writes {', '.join(ARCHITECTURES)}; use format "
            "folder, from which llama.cpp's own converter may make a file"
        )
    if tokenizer is not None:
        vocabulary.Vocabulary.of(tokenizer)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], file: Path, dtype: str, text: bool = True
) -> None:
    """Writes a model and its tokenizer; `text=False` leaves the tokenizer out, and keeps its control tokens and template.

    Matrices are stored in `dtype`, normalisations and learned positions in float32, and matrices whose rows are no whole blocks
    in float16. The model is left with the weights that the file holds, rounded as they are there. Raises ModelError for what the
    file could not say.
    """
    gguf = library()
    refuse(model, tokenizer if text else None)

    def begun(path: Path) -> Any:
        writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type])
        writer.add_name(f"{file.stem} {dtype}")  # never `mistral` alone, which transformers takes for the architecture
        writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if dtype == "float32" else f"MOSTLY_{DTYPES[dtype]}"))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        describe(writer, model.config)
        vocabulary.describe(writer, gguf, tokenizer, stop_ids, model.get_input_embeddings().weight.shape[0], text)
        return writer

    header = file.with_name("header.gguf")
    _finish(begun(header))
    refuse_other_reading(model.config, header)
    header.unlink()
    writer, kinds = begun(file), []
    for name, weight, form in tensors(model, gguf):
        shape = form.there(np.empty(weight.shape, np.uint8)).shape
        kinds.append(_type_of(gguf, name, shape, dtype))
        nbytes = gguf.quant_shape_to_byte_shape(shape, kinds[-1])
        writer.add_tensor_info(name, nbytes, np.dtype(np.uint8), math.prod(nbytes), kinds[-1])
    _finish(writer, _stored(model, gguf, kinds))


def _finish(writer: Any, stored: Iterable[Any] = ()) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in stored:
        writer.write_tensor_data(each)
    writer.close()


def _stored(model: PreTrainedModel, gguf: Any, kinds: list[Any]) -> Iterator[Any]:
    """What the file holds of each weight, one after another; the model is given the same."""
    for (_, weight, form), kind in zip(tensors(model, gguf), kinds, strict=True):
        stored = gguf.quants.quantize(np.ascontiguousarray(form.there(weight.detach().float().cpu().numpy())), kind)
        yield stored.view(np.uint8)
        if kind != gguf.GGMLQuantizationType.F32:
            held = form.back(gguf.quants.dequantize(stored, kind))
            with torch.no_grad():
                weight.copy_(torch.from_numpy(np.ascontiguousarray(held)))


def describe(writer: Any, config: Any) -> None:
    """The sizes of a model, under llama.cpp's names."""
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)


def refuse_other_reading(config: Any, file: Path) -> None:
    """Raises ModelError where transformers reads other settings from a file than the model has."""
    wanted = config.to_dict()
    if config.model_type == "mistral" and (wanted["sliding_window"] or math.inf) >= config.max_position_embeddings:
        del wanted["sliding_window"]  # no longer than the context: it closes nothing out
    found = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    for key in sorted((wanted.keys() | found.keys()) - SIDE):
        ours, theirs = wanted.get(key), found.get(key)
        if not _same(ours, theirs) and not (key == "head_dim" and ours is None):
            raise ModelError(
                f"{key} is {ours} in this model, and a GGUF file of {ARCHITECTURES[config.model_type]} is read as {theirs}: the "
                "format, or its reader in transformers, has no place for it; use format folder"
            )


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are equal, numbers to the digits of float32; one that is left out is as good as one that is off."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_same(one.get(key), other.get(key)) for key in one.keys() | other.keys())
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other or (not one and not other)


class Form:
    """How a weight lies in a file, and back."""

    def __init__(self, there: Callable[[Any], Any] = lambda one: one, back: Callable[[Any], Any] = lambda one: one) -> None:
        self.there, self.back = there, back


def rotated(heads: int) -> Form:
    """llama.cpp pairs neighbours where transformers pairs the halves of a head: row i of the first half goes to 2 i, that of
    the second to 2 i + 1."""

    def swap(parts: tuple[int, int]) -> Callable[[Any], Any]:
        return lambda one: one.reshape(heads, *parts, *one.shape[1:]).swapaxes(1, 2).reshape(one.shape)

    return Form(swap((2, -1)), swap((-1, 2)))


def tensors(model: PreTrainedModel, gguf: Any) -> Iterator[tuple[str, Tensor, Form]]:
    """(the file's name, the weight, its form in the file) of all weights, tied ones once. ModelError for one without a name."""
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    transposed = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    for path, weight in model.named_parameters():
        name = names.get_name(path, (".weight", ".bias"))
        if name is None:
            raise ModelError(f"GGUF has no name for {path} in {architecture}; use format folder")
        if architecture == "llama" and ".attn_q." in name:
            form = rotated(config.num_attention_heads)
        elif architecture == "llama" and ".attn_k." in name:
            form = rotated(config.num_key_value_heads)
        elif path in transposed:
            form = Form(np.transpose, np.transpose)
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            form = Form(lambda one: one + 1, lambda one: one - 1)
        else:
            form = Form()
        yield name, weight, form


def _type_of(gguf: Any, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """What a tensor of this shape in the file is stored as."""
    kind = getattr(gguf.GGMLQuantizationType, DTYPES[dtype])
    if len(shape) == 1 or name.startswith("position_embd"):
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def told(file: Path) -> tuple[str | None, list[int]]:
    """(the chat template, the tokens that end an answer) of a file."""
    fields = library().GGUFReader(file).fields
    template = fields.get("tokenizer.chat_template")
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return None if template is None else template.contents(), [int(each.contents()) for each in ends if each is not None]
