"""A policy with a critic beside it: the value of each state that a token is drawn from."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posttrain.batch import Sequences
from posttrain.models import head as vocabulary
from posttrain.models.lm import LM
from posttrain.models.products import wide
from posttrain.models.scalar import ScalarLM


class ValueHead(nn.Module):
    """A critic on the policy's own states: one linear layer in float32 or wider that begins with zero (arXiv 1909.08593)."""

    def __init__(self, like: LM) -> None:
        super().__init__()
        dtype = wide(next(like.model.parameters())).dtype
        size = like.model.config.get_text_config().hidden_size
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=like.device))
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype, device=like.device))

    def forward(self, states: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        return wide(states) @ self.weight + self.bias


class ActorCritic(LM):
    """The policy, which samples and is scored as any LM, and its critic: a model of its own, or a head on the shared states."""

    def __init__(self, actor: LM, critic: ScalarLM | ValueHead) -> None:
        nn.Module.__init__(self)  # LM's own would put the model in eval mode again, which ends gradient checkpointing
        self.model, self.layout, self.mixed, self.shape = actor.model, actor.layout, actor.mixed, actor.shape
        self.critic = critic

    @property
    def context(self) -> int | None:
        """The shorter of both models'."""
        limits = [self.critic.context] if isinstance(self.critic, ScalarLM) else []
        return min((each for each in (super().context, *limits) if each is not None), default=None)

    def values(self, seqs: Sequences) -> Float[Tensor, " N"]:
        """[N]: the value of the state before each trained token."""
        return self.critic(self.hidden(seqs)) if isinstance(self.critic, ValueHead) else self.critic.values(seqs)

    def token_sum_and_values(
        self, seqs: Sequences, fn: vocabulary.TokenLoss, temperature: float = 1.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, " N"]]:
        """`token_sum` and `values`; shared states are computed once."""
        if not isinstance(self.critic, ValueHead):
            return (*self.token_sum(seqs, fn, temperature), self.critic.values(seqs))
        states = self.hidden(seqs)
        return (*self.token_sum_of(states, seqs, fn, temperature), self.critic(states))
