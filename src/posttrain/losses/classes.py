"""Losses of classifiers: of the logits of a text's classes, of one logit a label, of a number."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(
    logits: Float[Tensor, "B C"], label: Int[Tensor, " B"], weight: Float[Tensor, " C"] | None = None, smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """-w[y] log softmax(logits)[y], y = `label`. With smoothing e the label has probability 1 - e + e / C, each other e / C
    (arXiv 1512.00567), every term with the weight of its class."""
    return F.cross_entropy(logits, label, weight, reduction="none", label_smoothing=smoothing)


def binary_cross_entropy(
    logits: Float[Tensor, "B C"], target: Float[Tensor, "B C"], weight: Float[Tensor, " C"] | None = None
) -> Float[Tensor, "B C"]:
    """-w (t log sigmoid(logit) + (1 - t) log sigmoid(-logit)): each label is a question of its own."""
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none")


def squared_error(score: Float[Tensor, " B"], target: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """(score - target)^2."""
    return (score - target) ** 2
