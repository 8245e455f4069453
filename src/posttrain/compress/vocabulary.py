"""The tokenizer of a GGUF file: byte-level BPE, whose ways of splitting text into words llama.cpp knows by name."""

import json
from dataclasses import dataclass
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from posttrain.errors import ModelError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
SPLITS = {  # what words are, by llama.cpp's names
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}": "llama-bpe",
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}": "qwen2",
    rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}": "tekken",
    rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}": "gpt-4o",
}
WHOLE_WORDS = {"llama-bpe", "tekken"}  # where llama.cpp takes a word that is a token as that token, whatever the merges


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer."""

    tokens: dict[int, str]
    merges: list[str]
    control: set[int]
    added: set[int]
    split: str
    """The name of its way of splitting text into words."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Raises ModelError for a tokenizer that llama.cpp, or transformers from its files, would not read as it is."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _cannot(f"is a {type(tokenizer).__name__}, written in Python")
        known = json.loads(backend.to_str())
        model = known["model"]
        if model["type"] != "BPE" or model.get("byte_fallback") or (known["decoder"] or {}).get("type") != "ByteLevel":
            raise _cannot(f"is a {model['type']}{' with bytes as a fallback' * bool(model.get('byte_fallback'))}")
        normalizer = known["normalizer"] or {"type": "NFC"}
        if normalizer["type"] != "NFC":
            raise _cannot(f"normalises text ({normalizer['type']})")
        split = _split(known["pre_tokenizer"])
        if model.get("ignore_merges") and split not in WHOLE_WORDS:
            raise _cannot(f"takes whole words before merges (ignore_merges), which llama.cpp does not under {split}")
        added = {each["id"]: each for each in known["added_tokens"]}
        return cls(
            {index: token for token, index in tokenizer.get_vocab().items()},
            [each if isinstance(each, str) else " ".join(each) for each in model["merges"]],
            {index for index, each in added.items() if each["special"]}, set(added), split,
        )  # fmt: skip


def _cannot(what: str) -> ModelError:
    return ModelError(
        f"the tokenizer {what}; GGUF is written with byte-level BPE alone: leave the tokenizer out (--no-tokenizer), or use "
        "format folder"
    )


def _split(found: dict[str, Any] | None) -> str:
    """llama.cpp's name for a way of splitting text into words."""
    parts = (found or {}).get("pretokenizers", [found])
    last = parts[-1]
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _cannot("does not work on bytes, or puts a blank before every text")
    if len(parts) == 1 and last["use_regex"]:
        return "gpt-2"
    pattern = parts[0].get("pattern", {}).get("Regex")
    if len(parts) != 2 or last["use_regex"] or pattern not in SPLITS:
        raise _cannot(f"splits text into words in a way that llama.cpp has no name for ({pattern or parts[0]['type']})")
    return SPLITS[pattern]


def describe(
    writer: Any, gguf: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], rows: int, text: bool = True
) -> None:
    """Writes tokens, merges, control tokens and chat template. `rows`: of the embeddings, which may be more than the tokens."""
    if text:
        known = Vocabulary.of(tokenizer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(known.split)
        writer.add_token_list([known.tokens.get(index, f"[PAD{index}]") for index in range(rows)])
        writer.add_token_types([_type(gguf, known, index) for index in range(rows)])
        writer.add_token_merges(known.merges)
        begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        writer.add_add_bos_token(begins)
    else:
        writer.add_tokenizer_model("none")
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stop_ids)
    further = [index for index in stop_ids if index != eos]
    if len(further) > 2:
        raise ModelError(
            f"{len(further) + 1} tokens end an answer of this model, and a GGUF file has places for 3; use format folder"
        )
    writer.add_eos_token_id(eos)
    for add, index in zip((writer.add_eot_token_id, writer.add_eom_token_id), further, strict=False):
        add(index)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template is not None:
        if not isinstance(tokenizer.chat_template, str):
            raise ModelError(
                "the tokenizer has several chat templates; choose one with model.chat_template, or use format folder"
            )
        writer.add_chat_template(tokenizer.chat_template)


def _type(gguf: Any, known: Vocabulary, index: int) -> int:
    kinds = gguf.TokenType
    if index not in known.tokens:
        return int(kinds.UNUSED)
    return int(kinds.CONTROL if index in known.control else kinds.USER_DEFINED if index in known.added else kinds.NORMAL)
