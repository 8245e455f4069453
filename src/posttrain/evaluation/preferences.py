"""How well scores agree with preferences: of a reward model, or the implicit rewards of a policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import correlation, fmean

from posttrain.evaluation.intervals import Figure, average, share

BINS = 10


@dataclass(frozen=True)
class Judged:
    """A pair with a score and a length in tokens for each side. `prefer`: the probability that the first side is the better."""

    chosen: float
    rejected: float
    chosen_length: int
    rejected_length: int
    prefer: float = 1.0


def preference_figures(pairs: Sequence[Judged]) -> dict[str, Figure]:
    """Figures by name; intervals are over pairs.

    accuracy: how often the better side has the higher score (ties count one half); longer_wins: how often it is the longer one,
    which a score must beat; gap: of the scores; loss: cross-entropy of sigmoid(gap) with the labels; calibration_error: mean
    |share that is right - confidence| over ten bins of confidence sigmoid(|gap|); log_length_correlation: of a score with the
    logarithm of the answer's length.
    """
    gaps = [pair.chosen - pair.rejected for pair in pairs]
    figures = {
        "accuracy": share([agrees(gap, pair.prefer) for gap, pair in zip(gaps, pairs, strict=True)]),
        "longer_wins": share([agrees(pair.chosen_length - pair.rejected_length, pair.prefer) for pair in pairs]),
        "gap": average(gaps),
        "loss": average([cross_entropy(gap, pair.prefer) for gap, pair in zip(gaps, pairs, strict=True)]),
    }
    error = calibration_error(gaps, pairs)
    figures["calibration_error"] = Figure(error, math.nan, math.nan, len(pairs))
    related = length_correlation(pairs)
    if related is not None:
        figures["log_length_correlation"] = related
    return figures


def agrees(gap: float, prefer: float) -> float:
    """1 where the sign of the gap is that of the label, 1/2 where there is no gap or no preference."""
    if gap == 0 or prefer == 0.5:
        return 0.5
    return float((gap > 0) == (prefer > 0.5))


def cross_entropy(gap: float, prefer: float) -> float:
    """-p log sigmoid(gap) - (1 - p) log sigmoid(-gap)."""
    softplus = max(0.0, -gap) + math.log1p(math.exp(-abs(gap)))  # -log sigmoid(gap)
    return softplus + (1 - prefer) * gap


def calibration_error(gaps: Sequence[float], pairs: Sequence[Judged]) -> float:
    """The mean distance between how sure the scores are and how often they are right, weighted by the pairs of each bin."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for gap, pair in zip(gaps, pairs, strict=True):
        confidence = 1 / (1 + math.exp(-min(abs(gap), 700.0)))
        place = min(BINS - 1, int((confidence - 0.5) * 2 * BINS))
        bins.setdefault(place, []).append((confidence, agrees(gap, pair.prefer)))
    return sum(
        abs(fmean(right for _, right in each) - fmean(sure for sure, _ in each)) * len(each) for each in bins.values()
    ) / len(pairs)


def length_correlation(pairs: Sequence[Judged]) -> Figure | None:
    """Pearson's, with Fisher's interval; None where scores or lengths do not differ."""
    scores = [score for pair in pairs for score in (pair.chosen, pair.rejected)]
    lengths = [math.log(length) for pair in pairs for length in (pair.chosen_length, pair.rejected_length)]
    if len(pairs) < 3 or max(scores) == min(scores) or max(lengths) == min(lengths):
        return None
    value = correlation(scores, lengths)
    centre, half = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12)), 1.959963984540054 / math.sqrt(len(pairs) - 1.5)
    return Figure(value, math.tanh(centre - half), math.tanh(centre + half), len(pairs))
