"""One token per row, by inverse CDF from addressed uniforms: a row's draw depends on nothing but its own logits and number."""

import torch
from torch import Tensor

from posttrain.errors import RunError
from posttrain.sampling.settings import Sampling


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits [A, V], uniform [A] in [0, 1) -> (token [A], logp [A] under the very distribution it was drawn from).

    At temperature 0 the token is the likeliest one, and its logp that of the untempered distribution.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    logp = (logits / sampling.temperature).log_softmax(-1)
    if sampling.truncates:
        logp = truncate(logp, sampling).log_softmax(-1)
    cumulative = logp.double().exp_().cumsum_(-1)
    total = cumulative[:, -1:].contiguous()
    if not bool(total.isfinite().all()):
        raise RunError("the policy's logits are not finite: its weights have diverged; lower optim.learning_rate")
    token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    token = torch.minimum(token, torch.searchsorted(cumulative, total))[:, 0]  # rounding never leaves the support
    return token, logp.gather(1, token[:, None])[:, 0]


def truncate(logp: Tensor, sampling: Sampling) -> Tensor:
    """-inf on every token outside of top-k, then min-p, then top-p. The likeliest token always stays."""
    if 0 < sampling.top_k < logp.shape[-1]:
        logp = logp.masked_fill(logp < logp.topk(sampling.top_k, -1).values[:, -1:], float("-inf"))
    if sampling.min_p > 0:
        floor = logp.max(-1, keepdim=True).values + torch.tensor(sampling.min_p, device=logp.device).log()
        logp = logp.masked_fill(logp < floor, float("-inf"))
    if sampling.top_p < 1:
        ordered, index = logp.log_softmax(-1).sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        outside = torch.zeros_like(logp, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        logp = logp.masked_fill(outside, float("-inf"))
    return logp
