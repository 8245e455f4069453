"""The optimizer and its learning rate."""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from posttrain.component import Component
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain.models.source import ModelSource


class Optimizer(Component):
    """How gradients become updates, and the learning rate over the run."""

    default_kind = "adamw"

    learning_rate: PositiveFloat | Literal["low", "high"] | None = None
    """The peak learning rate; by default the one that is usual for the tuner (full: 2e-5, lora: 2e-4, ...). low and high are the
    ends of what is usual (full: 1e-6 and 3e-4); small models mostly take the high one."""
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
            return self.peak * (step + 1) / rising
        if self.schedule == "constant":
            return self.peak
        done = (step - rising) / max(1, steps - rising)
        if self.schedule == "wsd":
            done = max(0.0, (step - (1 - self.decay) * steps) / max(1.0, self.decay * steps))
        share = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.peak * (self.final + (1 - self.final) * share)

    @property
    def peak(self) -> float:
        assert not isinstance(self.learning_rate, str), "`of_tuner` has not been called"
        return 2e-5 if self.learning_rate is None else self.learning_rate

    def of_tuner(self, rates: tuple[float, float, float]) -> Self:
        """With a number for its learning rate: `rates` are the lowest, the common and the highest that are usual for a tuner."""
        named = {"low": rates[0], None: rates[1], "high": rates[2]}
        rate = self.learning_rate
        return self if isinstance(rate, float) else self.model_copy(update={"learning_rate": named[rate]})

    def build(self, parameters: "dict[str, nn.Parameter]", paces: "Paces | None" = None) -> "torch.optim.Optimizer":
        """An optimizer over named parameters. Each group has a `share` of the learning rate and is still until `begins`."""
        raise NotImplementedError

    def check(self, model: "ModelSource") -> None:
        """Raises RecipeError for what cannot be on this machine, or with this model; before weights are read."""

    def place(self, optimizer: "torch.optim.Optimizer", parameter: "nn.Parameter", value: "torch.Tensor") -> "torch.Tensor":
        """A tensor of a parameter's state, from a checkpoint, where the optimizer reads it."""
        return value.to(parameter.device)  # `step` too, for the fused optimizer


Paces = Mapping[str, tuple[float, float]]  # {parameter: (share of the learning rate, share of the run before it moves)}


def is_embedding(name: str) -> bool:
    """Tables that tokens or positions are looked up in (embed_tokens, embed_in, wte, wpe, ...); a vocabulary head is none."""
    table = name.removesuffix(".weight").rpartition(".")[2]
    return table in {"wte", "wpe"} or ("embed" in table and table != "embed_out")


class AdamW(Optimizer, kind="adamw"):
    """Adam with decoupled weight decay (arXiv 1711.05101), fused. Norms, biases and embeddings are not decayed.

    In 8 bits (arXiv 2110.02861), the state of embeddings, and of tensors of less than 4096 weights, stays float32.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the running square."""
    weight_decay: NonNegativeFloat = 0.0
    """Of matrices only."""
    state: Literal["full", "8bit", "paged", "paged_8bit"] = "full"
    """The running means. full: as precise as the weights. 8bit: a quarter of float32's memory. paged: float32 that moves to host
    memory while the GPU's is short. All but full are of bitsandbytes: `pip install 'posttrain[bitsandbytes]'`."""

    def check(self, model: "ModelSource") -> None:
        if self.state == "full":
            return
        if find_spec("bitsandbytes") is None:
            raise RecipeError(
                f"optim.state: {self.state} needs the package bitsandbytes: pip install 'posttrain[bitsandbytes]', "
                "or set optim.state: full"
            )
        if model.dtype == "float64":
            raise RecipeError(f"optim.state: {self.state} computes in float32, and model.dtype is float64; set optim.state: full")
        if self.paged and model.on_cpu():
            raise RecipeError(
                f"optim.state: {self.state} moves a GPU's memory to the host, and this model runs on the cpu; "
                "set optim.state: full or 8bit"
            )

    @property
    def paged(self) -> bool:
        return self.state.startswith("paged")

    def build(self, parameters: "dict[str, nn.Parameter]", paces: "Paces | None" = None) -> "torch.optim.Optimizer":
        import torch

        found: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
        for name, value in parameters.items():
            plain = value.ndim < 2 or is_embedding(name)
            found.setdefault((plain, *(paces or {}).get(name, (1.0, 0.0))), []).append(value)
        groups = [
            {"params": values, "weight_decay": 0.0 if plain else self.weight_decay, "share": share, "begins": begins}
            for (plain, share, begins), values in sorted(found.items(), key=lambda each: each[0])
        ]
        shared: dict[str, Any] = {"lr": self.peak, "betas": self.betas, "eps": self.eps}
        if self.state == "full":
            return torch.optim.AdamW(groups, **shared, fused=True)
        from bitsandbytes.optim import AdamW as Compact

        optimizer = Compact(groups, **shared, optim_bits=8 if self.state.endswith("8bit") else 32, is_paged=self.paged)
        for name, value in parameters.items():
            if is_embedding(name):  # as bitsandbytes would begin it, but float32; its own overrides outlive the optimizer
                means = {each: optimizer.get_state_buffer(value, dtype=torch.float32) for each in ("state1", "state2")}
                optimizer.state[value] = {"step": 0, **means}
        return optimizer

    def place(self, optimizer: Any, parameter: "nn.Parameter", value: "torch.Tensor") -> "torch.Tensor":
        if self.paged and value.shape == parameter.shape:
            return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
        return super().place(optimizer, parameter, value)
