"""Models beside the policy that only look on, and what controllers have come to."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posttrain.batch import Sequences
from posttrain.losses.aggregate import sequence_sums
from posttrain.models.lm import LM


@dataclass(frozen=True)
class Frozen:
    """A model that only looks on: the policy with its tuner switched off or its earlier weights in place, or one of its own."""

    lm: LM
    switch: Callable[[], AbstractContextManager[None]] = nullcontext
    micro_tokens: int = 8192

    @contextmanager
    def looking_on(self) -> Iterator[None]:
        """Within it the model is this one, and nothing is learned from it."""
        with torch.no_grad(), self.switch():
            yield

    def logprobs(self, seqs: Sequences, temperature: float = 1.0) -> Float[Tensor, " N"]:
        """log p of each trained token, without gradient, at most about `micro_tokens` tokens at a time."""
        with self.looking_on():
            return self.lm.logprobs_of_many(seqs, self.micro_tokens, temperature)

    def hidden(self, seqs: Sequences) -> Float[Tensor, "N D"]:
        """The state that each trained token is predicted from, without gradient; all sequences at once."""
        with self.looking_on():
            return self.lm.hidden(seqs)

    def logits_of(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Its logits at some of these states."""
        with self.looking_on():
            return self.lm.project(hidden)

    def sums(self, *seqs: Sequences) -> list[Float[Tensor, " B"]]:
        """log p of the trained tokens of each sequence, summed, float64; prefixes are shared across all that is given."""
        together = Sequences.joined(seqs)
        logp = self.logprobs(together).double()
        sums = sequence_sums(logp, together.owner.to(logp.device), together.count)
        return list(sums.cpu().split([each.count for each in seqs]))


@dataclass
class Earlier:
    """The trained weights as they were: a reference that costs one copy of what moves, and nothing else.

    every: updates after which the copy moves towards the policy: copy <- mix * policy + (1 - mix) * copy (TR-DPO, arXiv
    2404.09656; mix 1 replaces it). None: it stays.
    rounded: weights of `parameters` whose copy is kept in bfloat16, because they are read in no other way.
    """

    parameters: Mapping[str, nn.Parameter]
    every: int | None = None
    mix: float = 1.0
    rounded: Collection[nn.Parameter] = frozenset()

    def __post_init__(self) -> None:
        self.copies: dict[str, Tensor] = {name: self._copy(each) for name, each in self.parameters.items()}

    def _copy(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().to(torch.bfloat16 if parameter in self.rounded else parameter.dtype, copy=True)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the policy has these weights. No graph that reads the weights may be waiting for its backward."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.copies[name] = self.copies[name], parameter.data

    def follow(self, step: int) -> None:
        """Called after each update with the number of updates so far."""
        if self.every is not None and step % self.every == 0:
            with torch.no_grad():
                for name, copy in self.copies.items():
                    copy.lerp_(self.parameters[name].detach(), self.mix)


@dataclass
class Roles:
    """What an objective may ask beside the policy; None where it needs none. `controls` are part of a run's state."""

    reference: Frozen | None = None
    earlier: Earlier | None = None
    teacher: Frozen | None = None
    controls: dict[str, float] = field(default_factory=dict)
    micro_tokens: int = 8192

    def follow(self, step: int) -> None:
        if self.earlier is not None:
            self.earlier.follow(step)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must hold: a reference that has moved."""
        moves = self.earlier is not None and self.earlier.every is not None
        return {"reference": dict(self.earlier.copies)} if moves and self.earlier is not None else {}

    def load(self, controls: Mapping[str, float], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.controls.update(controls)
        if self.earlier is not None:
            for name, value in tensors.get("reference", {}).items():
                self.earlier.copies[name].copy_(value)
