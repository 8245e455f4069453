"""Differences between two models' predictions, token by token. Legend: n tokens, V vocabulary."""

from jaxtyping import Float
from torch import Tensor


def logit_gap(logits: Float[Tensor, "n V"], wanted: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """mean over the vocabulary of (wanted - logits)^2; arXiv 2402.10193 eq. 5, whose norm is a mean in the published code.

    Adding one number to all logits of a token changes no probability, and does change this.
    """
    return (wanted - logits).square().mean(-1)


def vocabulary_kl(logits: Float[Tensor, "n V"], other: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """KL(p || q) in nats, sum over the vocabulary of p (log p - log q): p from `logits`, q from `other`."""
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - other.log_softmax(-1))).sum(-1)
