"""Figures with their uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

Z = 1.959963984540054  # 95%


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its 95% interval, from `count` independent units (problems, mostly)."""

    value: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def share(values: Sequence[float]) -> Figure:
    """The mean of values in [0, 1], one per independent unit, with a Wilson interval.

    Where the values are means themselves (the share of right samples of each problem) the spread between units decides how many
    yes/no trials they are worth, so that samples of one problem are not taken for independent ones.
    """
    count = len(values)
    if count == 0:
        return Figure(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    trials = float(count)
    if count > 1 and 0 < mean < 1:
        variance = sum((value - mean) ** 2 for value in values) / (count - 1) / count
        trials = max(trials, mean * (1 - mean) / variance) if variance > 0 else trials
    centre = (mean + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z * math.sqrt(mean * (1 - mean) / trials + Z**2 / (4 * trials**2)) / (1 + Z**2 / trials)
    return Figure(mean, max(0.0, centre - half), min(1.0, centre + half), count)


def average(values: Sequence[float]) -> Figure:
    """The mean of any values, one per independent unit, with a normal interval."""
    count = len(values)
    if count == 0:
        return Figure(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Figure(mean, -math.inf, math.inf, 1)
    half = Z * math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Figure(mean, mean - half, mean + half, count)


def ratio(totals: Sequence[float], counts: Sequence[int]) -> Figure:
    """sum(totals) / sum(counts) over independent units of unequal size, such as the nats and tokens of texts; with a normal
    interval from how far each unit is from its share."""
    if not counts or sum(counts) == 0:
        return Figure(math.nan, math.nan, math.nan, 0)
    whole = math.fsum(counts)
    value = math.fsum(totals) / whole
    if len(counts) == 1:
        return Figure(value, -math.inf, math.inf, 1)
    squares = math.fsum((total - value * size) ** 2 for total, size in zip(totals, counts, strict=True))
    half = Z * math.sqrt(squares * len(counts) / (len(counts) - 1)) / whole
    return Figure(value, value - half, value + half, len(counts))


def pass_at(k: int, right: int, samples: int) -> float:
    """The probability that one of k samples is right, estimated without bias from `samples` >= k. arXiv 2107.03374 eq. 1."""
    if samples < k:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
