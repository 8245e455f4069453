"""What becomes of a reward model after training: its scores brought to a known mean, and a folder that transformers reads."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.batch import Sequences
from posttrain.models.load import save
from posttrain.models.scalar import ScalarLM

NEW_PAD = "<|pad|>"


def normalise(lm: ScalarLM, answers: Sequences, unit_variance: bool, micro_tokens: int) -> dict[str, float]:
    """Brings the scores of some answers to mean 0 (and deviation 1), for good; returns what they were before. Order is kept."""
    with torch.no_grad():
        scores = lm.scores_of_many(answers, micro_tokens).double()
        mean, deviation = float(scores.mean()), float(scores.std(correction=0))
        gain = 1.0 / deviation if unit_variance and deviation > 0 else 1.0
        lm.head.weight.mul_(gain)
        if lm.head.bias is not None:
            lm.head.bias.mul_(gain)
        lm.shift = (lm.shift - mean) * gain
    return {"mean": mean, "deviation": deviation, "answers": answers.count}


def save_reward_model(lm: ScalarLM, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], folder: Path) -> None:
    """Writes a folder for `AutoModelForSequenceClassification`: its score plus `config.reward_shift` is ours.

    transformers finds the last token of a padded text by the pad id, so that id is one that ends no text: not the end-of-text
    token that many tokenizers pad with.
    """
    pad = _pad_token(tokenizer, set(stop_ids))
    if pad is None:
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
        with torch.random.fork_rng():
            torch.manual_seed(0)  # a new row is drawn; nothing reads it, but the file is the same wherever it is made
            lm.model.resize_token_embeddings(max(len(tokenizer), lm.model.get_input_embeddings().weight.shape[0]))
    else:
        tokenizer.pad_token = pad
    for config in {id(each): each for each in (lm.model.config, lm.model.config.get_text_config())}.values():
        config.pad_token_id = tokenizer.pad_token_id
    lm.keep_shift()
    save(lm.model, tokenizer, folder)


def _pad_token(tokenizer: Any, stop_ids: set[int]) -> str | None:
    """A control token that ends no text: the tokenizer's own pad, what begins a text, or any other; None where there is none."""

    def candidates() -> Iterator[int]:
        yield from (each for each in (tokenizer.pad_token_id, tokenizer.bos_token_id) if each is not None)
        yield from sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)

    found = next((index for index in candidates() if index not in stop_ids), None)
    return None if found is None else str(tokenizer.convert_ids_to_tokens(found))
