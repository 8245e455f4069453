"""Signs that a reward is had without what it stands for, in what a run writes down."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

ACCURACY = ("pass@1", "greedy", "score")  # what may be measured, the best sign first
SURE = 2.0  # standard errors


def signs(rows: Sequence[Mapping[str, Any]], every: int) -> list[str]:
    """What the newest validation says of the rewards since the best one: a part that rose while the accuracy fell.

    rows: of metrics.jsonl; every: updates between validations. Accuracy has fallen where its interval lies below the best one's;
    a reward has risen where the mean of its last `every` updates is two standard errors above that of the `every` up to the best.
    """
    measured = [row for row in rows if "validation" in row]
    # A task is measured with its interval; what data give is a bare number, whatever its name.
    name = next((each for each in ACCURACY if measured and isinstance(measured[-1]["validation"].get(each), dict)), None)
    if name is None or len(measured) < 2:
        return []
    best, last = max(measured[:-1], key=lambda row: row["validation"].get(name, {}).get("value") or 0.0), measured[-1]
    before, now = best["validation"].get(name), last["validation"][name]
    if before is None or None in (before["low"], now["high"]) or not now["high"] < before["low"]:
        return []
    found = []
    parts = dict.fromkeys(name for row in rows for name in row if name == "reward" or name.startswith("reward/"))
    for part in parts:
        values = [
            [row[part] for row in rows if end - every < row["step"] <= end and part in row]
            for end in (best["step"], last["step"])
        ]
        if min(map(len, values)) < 2:
            continue
        (was, error), (has, other) = map(mean_and_error, values)
        if has - was > SURE * math.hypot(error, other):
            found.append(
                f"{part} has risen from {was:.3g} to {has:.3g} since step {best['step']}, and {name} has fallen from "
                f"{before['value']:.3g} to {now['value']:.3g}: it may be had without what it stands for; read the samples"
            )
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values, and its standard error."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
