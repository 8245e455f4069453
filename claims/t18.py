"""T18: what a weight is multiplied with decides whether it can be left out. arXiv 2306.11695, 2301.00774.

tiny-base on stories, with outlier features put in that change nothing of what it computes: in each block some inputs of every
layer that a norm or a gate stands before are 20 times as large, and the weights that read them a 20th. Half of the blocks'
weights are left out, or 2 of every 4, by magnitude (within each layer), by Wanda and by SparseGPT, which look at 12,288
tokens of other stories. A seed decides which features and which stories.
"""

import math
import sys
from typing import Any

from claims import stories
from claims.claim import Claim, Number, exceeds, main, number, shown, spread

UNCHANGED = 1e-3
"""With the outlier features the model's log-probabilities are what they were, to this many nats."""

CLAIM = Claim(
    "T18",
    "With outlier features SparseGPT ≤ Wanda < magnitude at 50%, and 2:4 is worse than 50% anywhere",
    "arXiv 2306.11695, 2301.00774",
    "each difference in nats a token, paired by seed, above 0 by more than 2 s.e.: Wanda − SparseGPT, magnitude − Wanda, and 2:4 "
    f"− 50% for each method; log-probabilities with the features within {UNCHANGED:g} nats of those without",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3, 4], "methods": ["magnitude", "wanda", "sparsegpt"], "features": 3, "times": 20.0, "calibrate": 48,
    "measure": 64, "processes": 2,
}  # fmt: skip
QUICK = {**SETTINGS, "seeds": [0], "calibrate": 2, "measure": 2, "processes": 1}
PATTERNS = {"50%": None, "2:4": (2, 4)}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    rows = spread(of_seed, [(seed, settings) for seed in settings["seeds"]], settings["processes"])
    numbers: dict[str, Number] = {
        "full nll": number(row["full"] for row in rows), "largest change by the features": number(row["moved"] for row in rows),
    }  # fmt: skip
    for method in settings["methods"]:
        for pattern in PATTERNS:
            name = f"{method} {pattern}"
            numbers[f"{name} cost"] = number(row[name] - row["full"] for row in rows)
            if f"{name} without features" in rows[0]:
                numbers[f"{name} cost without features"] = number(row[f"{name} without features"] - row["full"] for row in rows)
        numbers[f"{method} 2:4 minus 50%"] = number(row[f"{method} 2:4"] - row[f"{method} 50%"] for row in rows)
    for pattern in PATTERNS:
        for worse, better in (("wanda", "sparsegpt"), ("magnitude", "wanda")):
            gaps = (row[f"{worse} {pattern}"] - row[f"{better} {pattern}"] for row in rows)
            numbers[f"{worse} minus {better} {pattern}"] = number(gaps)
    return {"numbers": numbers, "curves": {}}


def of_seed(seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Nats a token: of the model as it is, and pruned in each way; magnitude also without the features."""
    import copy

    from posttrain.compress.blocks import blocks_of
    from posttrain.compress.distance import distance
    from posttrain.compress.pruners import Pruner
    from posttrain.models.lm import LM

    base = stories.loaded()
    calibrate, measured = stories.pieces(base.tokenizer, seed, settings["calibrate"], settings["measure"])
    featured = LM(copy.deepcopy(base.lm.model), base.lm.layout)
    put_features(featured, calibrate.select([0]), seed, settings["features"], settings["times"])
    gaps = [float((lm_logp(featured, rows) - lm_logp(base.lm, rows)).abs().max()) for rows in (calibrate, measured)]
    found: dict[str, float] = {"moved": max(gaps)}
    for method in settings["methods"]:
        pruner = Pruner.model_validate(method)
        for name, pattern in PATTERNS.items():
            starts = {"": featured} | ({" without features": base.lm} if method == "magnitude" else {})
            for words, start in starts.items():
                lm = LM(copy.deepcopy(start.model), start.layout)
                pruner.prune(lm, blocks_of(lm.model), calibrate if pruner.reads else None, 0.5, pattern)
                figures = distance(base.lm, lm, measured)
                found[f"{method} {name}{words}"], found["full"] = figures["nll"].value, figures["nll_before"].value
    return found


def put_features(lm: Any, rows: Any, seed: int, features: int, times: float) -> None:
    """In every block, some inputs of the layers that a fold stands before become `times` as large."""
    import torch

    from posttrain import draws
    from posttrain.compress.blocks import blocks_of
    from posttrain.compress.folding import folds_of
    from posttrain.models.linears import matrix_of

    stream = draws.generator(seed, "T18")
    for block in blocks_of(lm.model):
        for fold in folds_of(lm, block, rows):
            inputs = matrix_of(next(iter(fold.readers.values()))).shape[1]
            scale = torch.ones(inputs)
            scale[torch.from_numpy(stream.permutation(inputs)[:features])] = 1 / times
            fold.fold(scale)


def lm_logp(lm: Any, rows: Any) -> Any:
    import torch

    with torch.no_grad():
        return lm.logprobs_of_many(rows, 4096)


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    return {
        "the features change nothing": max(numbers["largest change by the features"]["seeds"]) < UNCHANGED,
        "SparseGPT at most Wanda": exceeds(numbers["wanda minus sparsegpt 50%"]),
        "Wanda below magnitude": exceeds(numbers["magnitude minus wanda 50%"]),
        "2:4 is worse": all(exceeds(each) for name, each in numbers.items() if name.endswith("2:4 minus 50%")),
    }


def say(numbers: dict[str, Number]) -> str:
    full = numbers["full nll"]["value"]
    parts = [
        f"{name.replace(' cost', '')} {math.exp(full + each['value']):.2f} (+{shown(each)} nats)"
        for name, each in numbers.items()
        if " cost" in name
    ]
    return f"perplexity: full {math.exp(full):.2f}; {'; '.join(parts)}"


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(6, 3.2)
    axes = figure.subplots()
    numbers, methods = found["numbers"], found["settings"]["methods"]
    for place, (pattern, colour) in enumerate(zip(PATTERNS, ("#0072B2", "#D55E00"), strict=True)):
        values = [numbers[f"{method} {pattern} cost"] for method in methods]
        at = [each + 0.3 * place - 0.15 for each in range(len(methods))]
        heights, errors = [each["value"] for each in values], [2 * each["se"] for each in values]
        axes.bar(at, heights, 0.28, yerr=errors, color=colour, label=pattern, capsize=3)
        plain = numbers.get(f"magnitude {pattern} cost without features")
        if plain is not None:
            label = None if place else "without features"
            axes.plot([at[0] - 0.14, at[0] + 0.14], [plain["value"]] * 2, color="black", label=label)
    axes.set_xticks(range(len(methods)), methods)
    axes.set(ylabel="cost, nats a token")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main(sys.modules[__name__])
