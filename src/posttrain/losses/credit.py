"""Who gets the credit: from scores of whole samples, or rewards and values of tokens, to advantages."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

EQUAL = 1e-8  # a deviation below this is rounding, not signal


def group_advantages(
    scores: Float[Tensor, " B"],
    groups: Int[Tensor, " B"],
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    leave_one_out: bool = False,
) -> Float[Tensor, " B"]:
    """(score - mean of its group) / (standard deviation + eps). arXiv 2402.03300 section 4.1.

    groups: the group of each sample, numbered from 0. scale: divide by the group's own deviation, by the deviation of the
    whole batch (arXiv 2508.08221), or not at all (arXiv 2503.20783). Deviations are Bessel-corrected. A group whose scores are
    all equal gets exactly zero, and so does a group of one. leave_one_out: the mean is that of the group's others, which makes
    the policy gradient unbiased where nothing is divided by (arXiv 2402.14740).
    """
    scores, dtype = scores.double(), scores.dtype  # so that equal scores such as 1/3 leave nothing behind
    sizes = torch.bincount(groups)
    sums = torch.zeros(len(sizes), dtype=scores.dtype, device=scores.device).index_add(0, groups, scores)
    centred = scores - (sums / sizes.clamp(min=1))[groups]
    squares = torch.zeros_like(sums).index_add(0, groups, centred**2)
    deviation = (squares / (sizes - 1).clamp(min=1)).sqrt()[groups]
    centred = torch.where(deviation < EQUAL, torch.zeros_like(centred), centred)
    if leave_one_out:
        centred = centred * (sizes / (sizes - 1).clamp(min=1))[groups]
    if scale == "none":
        return centred.to(dtype)
    if scale == "group":
        return (centred / (deviation + eps)).to(dtype)
    spread = scores.std() if len(scores) > 1 else torch.zeros((), dtype=scores.dtype, device=scores.device)
    return (centred / (spread + eps)).to(dtype)


def step_advantages(
    rewards: Float[Tensor, " S"],
    ends: Int[Tensor, " S"],
    owner: Int[Tensor, " N"],
    groups: Int[Tensor, " B"],
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    leave_one_out: bool = False,
) -> Float[Tensor, " N"]:
    """Of each token: the sum of the normalised rewards of the steps that end with it or after it. arXiv 2402.03300 section 4.1.3.

    rewards[s] is earned by the step whose last token is ends[s] (counted over all N); owner: the sequence of each token,
    ascending; groups: the group of each sequence. A reward is compared with those of all steps of its group.
    """
    good = group_advantages(rewards, groups[owner[ends]], scale, eps, leave_one_out)
    return to_go(torch.zeros(len(owner), dtype=rewards.dtype, device=rewards.device).index_add(0, ends, good), owner)


def return_advantages(
    rewards: Float[Tensor, " S"],
    ends: Int[Tensor, " S"],
    owner: Int[Tensor, " N"],
    groups: Int[Tensor, " B"],
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    leave_one_out: bool = False,
) -> Float[Tensor, " N"]:
    """Of each token: what its sequence still earns from its step on, compared with what the others of its group earn from their
    step of the same number on. Arguments as of `step_advantages`, the steps of a sequence in order; a token behind the last
    step has 0.
    """
    sequence = owner[ends]
    first = torch.cat([sequence.new_ones(1, dtype=torch.bool), sequence.diff() != 0]) if len(sequence) else sequence.bool()
    number = torch.arange(len(sequence), device=sequence.device)
    number = number - torch.where(first, number, 0).cummax(0).values if len(sequence) else number
    remaining = to_go(rewards, sequence) if len(sequence) else rewards
    _, alike = torch.stack([groups[sequence], number]).unique(dim=1, return_inverse=True)
    good = group_advantages(remaining, alike, scale, eps, leave_one_out)
    place = torch.searchsorted(ends, torch.arange(len(owner), device=owner.device))  # the step that a token is of
    found = torch.cat([good, good.new_zeros(1)])[place]
    mine = torch.cat([sequence, sequence.new_full((1,), -1)])[place] == owner
    return torch.where(mine, found, torch.zeros_like(found))


def gae(
    reward: Float[Tensor, " N"], value: Float[Tensor, " N"], gamma: float, lam: float, starts: Int[Tensor, " edges"] | None = None
) -> Float[Tensor, " N"]:
    """A[t] = d[t] + gamma lam A[t + 1] with d[t] = reward[t] + gamma value[t + 1] - value[t]. arXiv 1506.02438 eq. 16.

    Sequence b is tokens starts[b] to starts[b + 1] - 1 of the N trained ones (one sequence if None); its value after the last is
    0. The returns that a critic learns are advantage + value, taken before any whitening. No gradient flows.
    """
    reward, value = reward.detach(), value.detach()
    edges = torch.tensor([0, len(value)], device=value.device) if starts is None else starts
    lengths = edges.diff()
    owner = torch.arange(len(lengths), device=value.device).repeat_interleave(lengths)
    step = torch.arange(len(value), device=value.device) - edges[:-1][owner]
    last = step == lengths[owner] - 1
    surprise = reward + gamma * torch.where(last, torch.zeros_like(value), value.roll(-1)) - value
    longest = int(lengths.max()) if len(value) else 0
    advantage = torch.zeros(longest, len(lengths), dtype=value.dtype, device=value.device)
    advantage[step, owner] = surprise
    for now in range(longest - 2, -1, -1):  # all sequences at once; after a sequence's end there are zeros
        advantage[now] += gamma * lam * advantage[now + 1]
    return advantage[step, owner]


def to_go(reward: Float[Tensor, " N"], owner: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The sum of the rewards of a token's sequence from the token on. owner: the sequence of each token, ascending."""
    exact = reward.double().flip(0)
    running = exact.cumsum(0).flip(0)
    ends = torch.bincount(owner, minlength=int(owner.max()) + 1 if len(owner) else 0).cumsum(0)  # where each sequence ends
    after = torch.cat([running, running.new_zeros(1)])[ends[owner]]
    return (running - after).to(reward.dtype)


def whiten(values: Float[Tensor, " N"], shift_mean: bool = True, unbiased: bool = True) -> Float[Tensor, " N"]:
    """(x - mean) / sqrt(variance + 1e-8), with the mean put back unless `shift_mean`. arXiv 2403.17031.

    The variance is Bessel-corrected (as in TRL's PPO) if `unbiased`, else that of the population (as in the code of 2403.17031).
    A constant and a single value have no spread: exactly zero, or the mean.
    """
    if not len(values):
        return values
    exact, dtype = values.double(), values.dtype
    centred = (exact - exact.mean()).masked_fill(values.max() == values.min(), 0.0)
    variance = (centred**2).sum() / max(1, len(values) - unbiased)
    white = centred * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + exact.mean()).to(dtype)
