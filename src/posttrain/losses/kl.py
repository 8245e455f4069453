"""Estimators of KL(policy || reference) from tokens that the policy drew. J. Schulman, "Approximating KL divergence", 2020.

With logp and ref_logp of one drawn token, each is a per-token value whose mean estimates the divergence. As a *differentiated*
term on on-policy samples they are not interchangeable: k1 has an expected gradient of zero, k2 that of the reverse KL
(policy || reference), k3 that of the forward KL (reference || policy).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def kl_k1(logp: Float[Tensor, " N"], ref_logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """logp - ref_logp: unbiased, may be negative."""
    return logp - ref_logp


def kl_k2(logp: Float[Tensor, " N"], ref_logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """(logp - ref_logp)^2 / 2: biased, never negative."""
    return 0.5 * (logp - ref_logp) ** 2


def kl_k3(logp: Float[Tensor, " N"], ref_logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """exp(d) - 1 - d with d = ref_logp - logp: unbiased and never negative."""
    gap = ref_logp - logp
    return torch.expm1(gap) - gap


def adaptive_kl(beta: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """beta (1 + e samples / horizon) with e = clip(kl / target - 1, -0.2, 0.2): the next update's beta. arXiv 1909.08593.

    kl: the mean over the `samples` sequences of this update; horizon: the larger, the slower beta moves.
    """
    return beta * (1 + min(0.2, max(-0.2, kl / target - 1)) * samples / horizon)
