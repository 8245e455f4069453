"""The optimizer and its learning rate."""

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from posttrain.component import Component

if TYPE_CHECKING:
    import torch
    from torch import nn


class Optimizer(Component):
    """How gradients become updates, and the learning rate over the run."""

    default_kind = "adamw"

    learning_rate: PositiveFloat = 2e-5
    """The peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warm-up: constant; linear or cosine decay; wsd (stable, then linear decay over the last `decay` of the run)."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the run over which the rate rises linearly from 0."""
    final: float = Field(default=0.0, ge=0, le=1)
    """The rate at the end, as a share of the peak (not for constant)."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """wsd: the share of the run that decays."""
    clip: PositiveFloat | None = 1.0
    """Gradients are scaled down to this norm; null never clips."""

    @model_validator(mode="after")
    def _fits(self) -> "Optimizer":
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together exceed the run")
        return self

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of update `step` (from 0) of a run of `steps`."""
        rising = round(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - rising) / max(1, steps - rising)
        if self.schedule == "wsd":
            done = max(0.0, (step - (1 - self.decay) * steps) / max(1.0, self.decay * steps))
        share = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.learning_rate * (self.final + (1 - self.final) * share)

    def build(self, parameters: "dict[str, nn.Parameter]") -> "torch.optim.Optimizer":
        """An optimizer over named parameters."""
        raise NotImplementedError


def is_embedding(name: str) -> bool:
    """Tables that tokens or positions are looked up in (embed_tokens, embed_in, wte, wpe, ...); a vocabulary head is none."""
    table = name.removesuffix(".weight").rpartition(".")[2]
    return table in {"wte", "wpe"} or ("embed" in table and table != "embed_out")


class AdamW(Optimizer, kind="adamw"):
    """Adam with decoupled weight decay (arXiv 1711.05101), fused. Norms, biases and embeddings are not decayed."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the running square."""
    weight_decay: NonNegativeFloat = 0.0
    """Of matrices only."""

    def build(self, parameters: "dict[str, nn.Parameter]") -> "torch.optim.Optimizer":
        import torch

        decayed = {name for name, value in parameters.items() if value.ndim >= 2 and not is_embedding(name)}
        groups = [
            {"params": [value for name, value in parameters.items() if name in decayed], "weight_decay": self.weight_decay},
            {"params": [value for name, value in parameters.items() if name not in decayed], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)
