"""Every tuner as it is tested on the tiny models, with its number of parameters written out by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import fine

from posttrain.tuners import Tuner, tuned

ARCHITECTURES = ["llama", "qwen3", "gpt2", "gemma3"]
D, LAYERS, WORDS, HEAD, KEYS, INNER = 32, 2, 97, 8, 16, 48  # sizes of the tiny models; KEYS: the width of keys and of values
GATED = [(D, D), (D, KEYS), (D, KEYS), (D, D), (D, INNER), (D, INNER), (INNER, D)]  # inputs and outputs of a block's matrices
FUSED = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]  # of GPT-2's


def matrices(name):
    return FUSED if name == "gpt2" else GATED


def norms(name):
    """Parameters of all normalisations: q and k have theirs in Qwen 3 and Gemma 3, which has four a block."""
    if name == "gpt2":
        return (2 * LAYERS + 1) * 2 * D
    return {"llama": 2, "qwen3": 2, "gemma3": 4}[name] * LAYERS * D + D + (0 if name == "llama" else LAYERS * 2 * HEAD)


def lora(rank):
    return lambda name: LAYERS * sum(rank * (i + o) for i, o in matrices(name))


def dora(rank):
    return lambda name: lora(rank)(name) + LAYERS * sum(o for _, o in matrices(name))


def ia3(name):
    return LAYERS * (3 * D + 4 * D) if name == "gpt2" else LAYERS * (2 * KEYS + INNER)


def adapters(size, each):
    return lambda name: LAYERS * each * (2 * D * size + D + size) + norms(name)


def biases(name):
    attention = D + 2 * KEYS + D
    return {"gpt2": LAYERS * 11 * D + D, "llama": LAYERS * (attention + 2 * INNER + D)}.get(name, LAYERS * attention)


def last_block(name):
    if name == "gpt2":
        return 12 * D * D + 13 * D + 2 * D
    inside = sum(i * o for i, o in GATED) + (norms(name) - D) // LAYERS + D
    return inside + (WORDS * D if name == "qwen3" else 0)  # Qwen 3's head is its own


def mlp(tokens, hidden):
    return lambda name: tokens * D + (D * hidden + hidden) + (hidden * hidden + hidden) + (hidden * D + D)


def lstm(tokens, h):
    layers = 2 * (4 * h * (D + h) + 8 * h) + 2 * (4 * h * (2 * h + h) + 8 * h)
    return lambda name: tokens * D + layers + (2 * h * 2 * h + 2 * h) + (2 * h * D + D)


def keys(name):
    return D if name == "gpt2" else KEYS


def projected(tokens, hidden):
    def count(name):
        made = 2 * LAYERS * keys(name)
        return tokens * keys(name) + (keys(name) * hidden + hidden) + (hidden * made + made)

    return count


@dataclass(frozen=True)
class Case:
    """begins: how far its log-probabilities may be from the base's at the start; None where nothing is promised."""

    kind: str
    count: Callable[[str], int]
    settings: dict[str, Any] = field(default_factory=dict)
    begins: float | None = 0.0
    note: str = ""

    def tuner(self, name):
        settings = dict(self.settings)
        if self.kind == "bitfit" and name not in {"gpt2", "bert"}:
            settings["add"] = True
        if self.kind == "head" and name in {"qwen3", "bert"}:
            settings["untie"] = False
        if self.kind == "delta_scale":
            settings["of"] = str(fine(name))
        return Tuner.lookup(self.kind)(**settings)

    def __str__(self):
        return f"{self.kind} {self.note}".strip()


CASES = [
    Case("layers", last_block, {"last": 1}, note="last"),
    Case("head", lambda name: WORDS * D, {"untie": True}),
    Case("bitfit", biases),
    Case("lora", lora(3), {"rank": 3, "alpha": 5.0}),
    Case("lora", lora(3), {"rank": 3, "alpha": 5.0, "rslora": True, "init": "gaussian"}, note="rslora"),
    Case("lora", dora(3), {"rank": 3, "alpha": 5.0, "dora": True}, 1e-5, note="dora"),
    Case("lora", lora(3), {"rank": 3, "alpha": 3.0, "init": "pissa"}, 1e-4, note="pissa"),
    Case("ia3", ia3),
    Case("adapter", adapters(5, 2), {"size": 5}, 1e-3),
    Case("adapter", adapters(5, 1), {"size": 5, "variant": "pfeiffer", "activation": "relu"}, 1e-3, note="pfeiffer"),
    Case("adapter", adapters(5, 1), {"size": 5, "variant": "parallel", "scale": 4.0}, 1e-3, note="parallel"),
    Case("delta_scale", lambda name: LAYERS * len(matrices(name)), {}, None),
    Case("delta_scale", lambda name: LAYERS * len(matrices(name)), {"form": "low_rank", "rank": 3}, None, note="low rank"),
    Case("prompt", lambda name: 4 * D, {"tokens": 4}, None),
    Case("p_tuning", mlp(5, D), {"tokens": 5, "at": [0, 1]}, None),
    Case("p_tuning", lstm(4, 6), {"tokens": 4, "encoder": "lstm", "hidden": 6}, None, note="lstm"),
    Case("prefix", projected(4, 6), {"tokens": 4, "projection": 6}, None),
    Case("prefix", lambda name: 2 * LAYERS * 4 * keys(name), {"tokens": 4, "projection": None}, None, note="plain"),
]  # fmt: skip


def installed(case, lm, name, seed=0):
    """The tuner, put into a model."""
    tuner = case.tuner(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuner.install(lm.model)
    return tuner


def move(lm, seed=1, by=0.05):
    """Moves everything tuned, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned(lm.model).values():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
