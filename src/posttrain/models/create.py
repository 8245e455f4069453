"""A new model: tokenizer trained on text, decoder with random weights, and a chat template that neither has seen."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from posttrain import draws
from posttrain.models.load import save

END_OF_TEXT, END_OF_TURN = "<|end_of_text|>", "<|end_of_turn|>"
ROLES = ("system", "user", "assistant", "tool")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end_of_turn|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# an operator with its spaces, a digit, a word with its space, other signs, white space
PIECES = r" [-+*/=] |\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own, so that numbers look the same everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, END_OF_TURN, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE,
        additional_special_tokens=special[1:], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def create(texts: Iterable[str], vocabulary: int, architecture: dict[str, int], seed: int, folder: Path) -> dict[str, Any]:
    """Writes the model folder; returns its size."""
    tokenizer = train_tokenizer(texts, vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture["hidden_size"],
        intermediate_size=architecture["feed_forward"],
        num_hidden_layers=architecture["layers"],
        num_attention_heads=architecture["heads"],
        num_key_value_heads=architecture["key_value_heads"],
        max_position_embeddings=architecture["context"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(seed, "weights") % 2**63)
        model = AutoModelForCausalLM.from_config(config)
    save(model, tokenizer, folder)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "vocabulary": len(tokenizer)}
