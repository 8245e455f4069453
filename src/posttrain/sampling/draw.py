"""One token per row, by inverse CDF from addressed uniforms: a row's draw depends on nothing but its own logits and number."""

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.errors import RunError
from posttrain.sampling.settings import Sampling

BLOCK = 64


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits [A, V], uniform [A] in [0, 1) -> (token [A], logp [A] under the very distribution it was drawn from).

    At temperature 0 the token is the likeliest one, and its logp that of the untempered distribution.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    shaped = logits if sampling.temperature == 1 else logits / sampling.temperature
    if sampling.truncates:
        shaped = truncate(shaped.log_softmax(-1), sampling)
    top = shaped.amax(-1, keepdim=True)
    token, total = _inverse((shaped - top).exp_(), uniform)
    return token, (shaped.gather(1, token[:, None]) - top - total.log().to(shaped.dtype))[:, 0]


def _inverse(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(token [A], total [A, 1]): where the running sum of `weight` [A, V] passes `uniform` of its total.

    First the block is found, then the token in it. Sums are float64; a token of weight 0 is never taken.
    """
    rows, size = weight.shape
    if size % BLOCK:
        weight = F.pad(weight, (0, -size % BLOCK))
    blocks = weight.view(rows, -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum_(-1)
    if not bool(ends[:, -1].isfinite().all()):
        raise RunError("the policy's logits are not finite: its weights have diverged; lower optim.learning_rate")
    wanted = uniform[:, None] * ends[:, -1:]
    block = _first_beyond(ends, wanted)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum_(-1)
    return (block * BLOCK + _first_beyond(inside, wanted - before))[:, 0], ends[:, -1:]


def _first_beyond(ends: Tensor, wanted: Tensor) -> Tensor:
    """[A, 1]: where each ascending row first exceeds `wanted`; rounding never leads past the last rise."""
    return torch.minimum(torch.searchsorted(ends, wanted, right=True), torch.searchsorted(ends, ends[:, -1:].contiguous()))


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
