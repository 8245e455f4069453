"""Frozen models beside the policy: what an objective may ask for."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Sequences
from posttrain.models.lm import LM


@dataclass(frozen=True)
class Frozen:
    """A model that only looks on: the policy with its tuner switched off, or a model of its own."""

    lm: LM
    switch: Callable[[], AbstractContextManager[None]] = nullcontext
    micro_tokens: int = 8192

    def logprobs(self, seqs: Sequences, temperature: float = 1.0) -> Float[Tensor, " N"]:
        """log p of each trained token, without gradient, at most about `micro_tokens` tokens at a time."""
        with torch.no_grad(), self.switch():
            return self.lm.logprobs_of_many(seqs, self.micro_tokens, temperature)


@dataclass(frozen=True)
class Roles:
    """The frozen models of a run; None where the objective needs none."""

    reference: Frozen | None = None
