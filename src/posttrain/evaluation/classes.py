"""How well a classifier tells texts apart: the figures of GLUE (arXiv 1804.07461), each with a 95% interval.

Counts and ranks alone; where an interval has no closed form, texts are drawn again with addressed draws (bootstrap, percentiles).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain import draws
from posttrain.evaluation.intervals import Figure, Z, average, share
from posttrain.text import Classes

AGAIN, AT_A_TIME = 1000, 50  # how often texts are drawn again; how many draws are held at a time
Array = Any  # of numpy; R draws of N texts, M patterns of (right labels, said labels), C labels


@dataclass(frozen=True)
class Told:
    """A text's target (see `Classes.numbers`) and the logits that a model gave it."""

    target: tuple[float, ...]
    logits: tuple[float, ...]


def class_figures(classes: Classes, told: Sequence[Told], seed: int = 0) -> dict[str, Figure]:
    """Figures by name, the first the one that decides.

    single: accuracy, f1 (of two classes; the second is the positive one), f1_macro, matthews, loss. multi: accuracy (all labels
    of a text right), f1_micro, f1_macro, loss. regression: pearson, spearman, absolute_error, loss.
    """
    target = np.array([each.target for each in told], dtype=np.float64)
    logits = np.array([each.logits for each in told], dtype=np.float64)
    if classes.problem == "regression":
        error = logits[:, 0] - target[:, 0]
        return {
            "pearson": related(target[:, 0], logits[:, 0]),
            "spearman": related(ranks(target[:, 0]), ranks(logits[:, 0]), by_rank=True),
            "absolute_error": average(np.abs(error).tolist()), "loss": average((error**2).tolist()),
        }  # fmt: skip
    if classes.problem == "multi":
        said = logits > 0
        right, losses = target > 0.5, (np.logaddexp(0, logits) - target * logits).mean(1)
    else:
        each = np.arange(len(classes.labels))
        said, right = each == logits.argmax(1)[:, None], each == target
        losses = np.logaddexp.reduce(logits, axis=1) - (logits * right).sum(1)
    figures = {"accuracy": share((said == right).all(1).astype(float).tolist())}
    if classes.problem == "multi":
        figures["f1_micro"] = redrawn(f1_micro, right, said, seed)
    elif len(classes.labels) == 2:
        figures["f1"] = redrawn(lambda *counts: f1_each(*counts)[:, 1], right, said, seed)
    occurring = (right | said).any(0)
    figures["f1_macro"] = redrawn(lambda *counts: f1_each(*counts)[:, occurring].mean(1), right, said, seed)
    if classes.problem == "single":
        figures["matthews"] = redrawn(matthews, right, said, seed)
    return figures | {"loss": average(losses.tolist())}


def redrawn(statistic: Callable[[Array, Array, Array], Array], right: Array, said: Array, seed: int = 0) -> Figure:
    """statistic(counts [R, M], right [M, C], said [M, C]) -> [R], of the texts and of AGAIN draws of as many texts."""
    patterns, counts = np.unique(np.concatenate([right, said], 1), axis=0, return_counts=True)
    known = patterns[:, : right.shape[1]].astype(float), patterns[:, right.shape[1] :].astype(float)
    value, total = float(statistic(counts[None], *known)[0]), int(counts.sum())
    draw = draws.generator(seed, "bootstrap")
    parts = [draw.multinomial(total, counts / total, size=AT_A_TIME) for _ in range(AGAIN // AT_A_TIME)]
    again = np.concatenate([statistic(part, *known) for part in parts])
    low, high = np.quantile(again, [0.025, 0.975])
    return Figure(value, float(low), float(high), total)


def f1_each(counts: Array, right: Array, said: Array) -> Array:
    """[R, C]: 2 TP / (2 TP + FP + FN) of each label; 0 for one that neither occurs nor is said."""
    hits, either = counts @ (right * said), counts @ (right + said)
    return np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)


def f1_micro(counts: Array, right: Array, said: Array) -> Array:
    """[R]: the same of all labels together."""
    hits, either = counts @ (right * said).sum(1), counts @ (right + said).sum(1)
    return np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)


def matthews(counts: Array, right: Array, said: Array) -> Array:
    """[R]: (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN)) for two classes, and what it becomes for more: the
    correlation of the right class with the said one (R_K, doi 10.1016/j.compbiolchem.2004.09.006); 0 where either is constant."""
    total = counts.sum(1)
    occurs, told, hits = counts @ right, counts @ said, counts @ (right * said).sum(1)
    spread = np.sqrt((total**2 - (occurs**2).sum(1)) * (total**2 - (told**2).sum(1)))
    return np.divide(hits * total - (occurs * told).sum(1), spread, out=np.zeros_like(spread), where=spread > 0)


def ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def related(one: Array, other: Array, by_rank: bool = False) -> Figure:
    """Pearson's correlation, with Fisher's interval; of ranks (Spearman's) with Bonett and Wright's (doi 10.1007/BF02294183).

    NaN where one of the two is constant.
    """
    count = len(one)
    if count < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return Figure(math.nan, math.nan, math.nan, count)
    value = float(np.corrcoef(one, other)[0, 1])
    if count < 4:
        return Figure(value, -1.0, 1.0, count)
    half = Z * math.sqrt((1 + value**2 / 2 if by_rank else 1.0) / (count - 3))
    centre = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12))
    return Figure(value, math.tanh(centre - half), math.tanh(centre + half), count)
