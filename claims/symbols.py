"""Small tasks on strings of digits and letters, and tiny Llamas that learn them: `37+48=085`, `40217=71204`.

A row is a question, a sign and an answer of a fixed length, its end token with it; only the answer is trained. Everything that
learns here does so by posttrain's own tuners, objectives and loop.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from claims import strings
from posttrain import draws
from posttrain.batch import Sequences
from posttrain.models.lm import LM
from posttrain.models.load import fresh
from posttrain.models.source import ModelSource
from posttrain.objectives import SFT
from posttrain.text import RenderedRow
from posttrain.training.fit import Learner
from posttrain.training.optim import AdamW
from posttrain.tuners import Tuner, tuned

SYMBOLS = "\n0123456789abcdefghijklmnop+=<>"
"""The first one ends every row."""
MICRO_TOKENS = 1 << 14
Maker = Callable[[np.random.Generator], tuple[str, str]]
"""Draws a question, its sign included, and its answer."""


def row(question: str, answer: str) -> tuple[list[int], list[bool]]:
    """(tokens, marks) of a question and its answer, between end tokens."""
    tokens = [SYMBOLS.index(each) for each in f"\n{question}{answer}\n"]
    return tokens, [False] * (1 + len(question)) + [True] * (len(answer) + 1)


def rows(maker: Maker, count: int, seed: int, *purpose: str | int) -> list[RenderedRow]:
    """`count` different questions with their answers."""
    draw, found = draws.generator(seed, "symbols", *purpose), {}
    while len(found) < count:
        question, answer = maker(draw)
        found[question] = answer
    return [RenderedRow((row(question, answer),)) for question, answer in found.items()]


def write_model(seed: int, layout: Any = "tree", **shape: int) -> LM:
    """A new tiny Llama of these sizes."""
    tokens: Any = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    config = LlamaConfig(vocab_size=len(SYMBOLS), max_position_embeddings=64, **tokens, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(seed, "symbols", "weights") % 2**63)
        return fresh(config, ModelSource(path="claims", layout=layout))


def twin(lm: LM) -> LM:
    """A copy with weights of its own."""
    return LM(copy.deepcopy(lm.model), lm.layout)


def tune(
    lm: LM, tuner: Tuner, learned: list[RenderedRow], steps: int, batch: int, rate: float, seed: int,
    watcher: strings.Watcher | None = None,
) -> None:  # fmt: skip
    """Installs a tuner and trains it by `sft`."""
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(seed, "symbols", "tuner") % 2**63)
        tuner.install(lm.model)
    optim = AdamW(learning_rate=rate, schedule="cosine", warmup=0.05)
    updates = strings.row_updates(SFT(), learned, batch, seed)
    strings.learn(lm, {"policy": Learner.of(tuned(lm.model), optim, tuner)}, updates, steps, watcher=watcher)


def nll(lm: LM, held_out: list[RenderedRow]) -> float:
    """-log p of an answer's tokens, their mean."""
    seqs = Sequences.of([each.sequences[0] for each in held_out])
    with torch.no_grad():
        return -float(lm.logprobs_of_many(seqs, MICRO_TOKENS).double().mean())
