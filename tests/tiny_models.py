"""Tiny random models of each architecture, made on the spot: 2 layers, 97 tokens, weights wide enough that every token matters.

`make("gemma3")` gives an LM, `make_scalar("gemma3")` a model that scores, the same weights every time. Sliding windows are 8
tokens, shorter than the sequences of the tests.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tiny_encoders
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from posttrain.models.actor_critic import ActorCritic, ValueHead
from posttrain.models.lm import LM
from posttrain.models.load import DTYPES, wrap, wrap_scalar
from posttrain.models.scalar import ScalarLM
from posttrain.models.source import ModelSource

VOCABULARY, WINDOW = 97, 8
TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, **TOKENS,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8, final_logit_softcapping=3.0,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **TOKENS
    ),
    "phi": lambda: PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, **TOKENS
    ),
}  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {  # other in kind, and not in the grids over architectures
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        **{**TOKENS, "pad_token_id": 0},
    ),
    "gemma3_sees": lambda: Gemma3Config(
        text_config=CONFIGS["gemma3"]().to_dict() | {"final_logit_softcapping": None}, image_token_index=96, boi_token_index=95, eoi_token_index=94,
        mm_tokens_per_image=4,
        vision_config={  # deeper and of another width than the text's
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28,
            "patch_size": 14,
        },
    ),
}  # fmt: skip
TREE = [name for name in CONFIGS if name != "mamba"]


def transformer(
    name: str, dtype: str = "float32", seed: int = 0, auto: Any = AutoModelForCausalLM, **changes: Any
) -> PreTrainedModel:
    """The transformers model with random weights of deviation 0.2. `changes` are settings of its config."""
    config = (CONFIGS | OTHERS)[name]()
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation="sdpa" if name != "mamba" else None).double()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                offset = (
                    1.0 if parameter.ndim == 1 and key.endswith("weight") and "gemma" not in name else 0.0
                )  # norms scale around 1
                if key.rpartition(".")[2] not in {"A_log", "D", "dt_bias"}:
                    parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    return model.to(DTYPES[dtype])


def make(name: str, dtype: str = "float32", layout: str = "auto", seed: int = 0, **changes: Any) -> LM:
    """An LM as `load` would give it."""
    return wrap(transformer(name, dtype, seed, **changes), ModelSource(path="tiny", dtype=dtype, layout=layout))


@cache
def _home() -> "TemporaryDirectory[str]":
    return TemporaryDirectory(prefix="tiny-fine-")


@cache
def fine(name: str, seed: int = 5, by: float = 0.02) -> Path:
    """The folder of a model that was fine-tuned from `transformer(name)`: all its weights moved a little. Without a tokenizer."""
    made = transformer if name in CONFIGS else tiny_encoders.transformer
    model, draw = made(name), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw))
    folder = Path(_home().name) / f"{name}-{seed}-{by}"
    model.save_pretrained(folder)
    return folder


def make_scalar(name: str, dtype: str = "float32", layout: str = "auto", seed: int = 0, **changes: Any) -> ScalarLM:
    """A ScalarLM as `load_scalar` would give it."""
    model = transformer(name, dtype, seed, AutoModelForSequenceClassification, **{"num_labels": 1, **changes})
    return wrap_scalar(model, ModelSource(path="tiny", dtype=dtype, layout=layout))


def twin(lm: Any, layout: str) -> Any:
    """The same weights under another layout."""
    if isinstance(lm, ActorCritic):
        critic = lm.critic if isinstance(lm.critic, ValueHead) else twin(lm.critic, layout)
        return ActorCritic(LM(lm.model, layout, lm.mixed), critic)
    return type(lm)(lm.model, layout, lm.mixed)
