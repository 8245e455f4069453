"""Tiny random encoders with a word-level tokenizer of their kind, made on the spot; `make` gives one as `load_classifier` would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from posttrain.models.classifier import wrap_encoder
from posttrain.models.encoder import Encoder
from posttrain.models.heads import in_config
from posttrain.models.load import DTYPES
from posttrain.models.source import ModelSource
from posttrain.text import Classes

CONTROLS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "the", "cat", "dog", "sat", "on", "mat", "log", "was", "is", "not", "good", "bad", "film", "story", "but", "and", "very", "all", "day", "long", "night", "red", "blue", ",", ".", "?"]
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
SAYS: dict[str, Any] = {"vocab_size": 97, "pad_token_id": 0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**SHAPE, **SAYS),
    "roberta": lambda: RobertaConfig(**SHAPE, **SAYS, type_vocab_size=1),
    "distilbert": lambda: DistilBertConfig(
        dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, **SAYS
    ),
    "modernbert": lambda: ModernBertConfig(
        **SHAPE, **SAYS, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, global_attn_every_n_layers=2,
        local_attention=16, classifier_pooling="mean",
    ),
}  # fmt: skip
THREE = Classes("single", ("ant", "bee", "cow"))


def tokenizer(name: str) -> Any:
    """BERT's own; with pairs as RoBERTa has them (two separators, no kinds of tokens); and one without kinds."""
    vocabulary = {word: index for index, word in enumerate([*CONTROLS, *WORDS])}
    made = BertTokenizer(vocab=vocabulary)
    if name == "bert":
        return made
    from tokenizers.processors import BertProcessing, RobertaProcessing

    inner = made._tokenizer
    ends: Any = RobertaProcessing if name == "roberta" else BertProcessing
    inner.post_processor = ends(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", sep_token="[SEP]", cls_token="[CLS]", pad_token="[PAD]",
        mask_token="[MASK]", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def transformer(
    name: str, dtype: str = "float32", seed: int = 0, classes: Classes | None = THREE,
    auto: Any = AutoModelForSequenceClassification, **changes: Any,
) -> PreTrainedModel:  # fmt: skip
    """The transformers model with random weights of deviation 0.2."""
    config = CONFIGS[name]()
    for key, value in ((in_config(classes) if classes else {}) | changes).items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config).double()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                offset = 1.0 if parameter.ndim == 1 and key.endswith("weight") else 0.0
                parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    return model.eval().to(DTYPES[dtype])


def make(name: str, dtype: str = "float32", seed: int = 0, classes: Classes = THREE, **changes: Any) -> Encoder:
    """An Encoder as `load_classifier` would give it."""
    model = transformer(name, dtype, seed, classes, **changes)
    model.separator = 3 if name == "bert" else None
    return wrap_encoder(model, ModelSource(path="tiny", dtype=dtype))


def saved(folder: Path, name: str, **changes: Any) -> str:
    """The folder of a model with its tokenizer."""
    transformer(name, **changes).save_pretrained(folder)
    tokenizer(name).save_pretrained(folder)
    return str(folder)
