"""Losses of reward models: of a pair's `margin` = r(chosen) - r(rejected), of a group's rewards, of a labelled score."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(
    margin: Float[Tensor, " P"], prefer: float | Float[Tensor, " P"] = 1.0, at_least: float | Float[Tensor, " P"] = 0.0
) -> Float[Tensor, " P"]:
    """-p log sigmoid(margin - m) - (1 - p) log sigmoid(-margin - m), p = `prefer` the probability that the chosen answer wins.

    m = `at_least` is by how much the winner is to win (arXiv 2307.09288 eq. 2); p below 1 are soft labels (arXiv 2212.08073).
    """
    return -prefer * logsigmoid(margin - at_least) - (1 - prefer) * logsigmoid(-margin - at_least)


def centring(first: Float[Tensor, " P"], second: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """(first + second)^2: pins the mean reward to 0, which comparisons leave open. arXiv 2312.09244."""
    return (first + second) ** 2


def choice(rewards: Float[Tensor, " B"], group: Int[Tensor, " B"], best: Bool[Tensor, " B"]) -> Float[Tensor, " G"]:
    """log sum exp(rewards of the group) - reward of its best: cross-entropy of a choice among K answers. arXiv 1909.08593.

    group: the group of each answer, numbered from 0 without gaps; exactly one answer of each is `best`.
    """
    groups = len(torch.bincount(group))
    assert torch.equal(group[best].sort().values, torch.arange(groups, device=group.device)), "a group without exactly one best"
    highest = torch.full((groups,), -torch.inf, dtype=rewards.dtype, device=rewards.device)
    highest = highest.scatter_reduce(0, group, rewards.detach(), "amax")
    total = torch.zeros_like(highest).index_add(0, group, (rewards - highest[group]).exp())
    return total.log() + highest - torch.zeros_like(highest).index_add(0, group[best], rewards[best])


def labelled(score: Float[Tensor, " P"], probability: float | Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """-p log sigmoid(score) - (1 - p) log sigmoid(-score): for steps that are right or wrong, for thumbs up and down."""
    return bradley_terry(score, probability)
