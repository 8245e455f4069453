"""T17: rounding to 4 bits costs little, to 3 bits more; GPTQ costs less than the nearest point, NF4 less than equal steps.

tiny-base on stories, arXiv 2210.17323: every linear layer of the blocks, one grid a row, asymmetric; GPTQ and AWQ calibrated on
12,288 tokens of other stories. Nats a token are compared seed by seed, a seed being which stories are read. NF4 (arXiv
2305.14314) and symmetric 4-bit integers, both in blocks of 64, on normal draws and on tiny-base's own matrices.
"""

import math
import sys
from typing import Any

from claims import stories
from claims.claim import Claim, Number, exact, exceeds, main, number, shown, spread

ERRORS = {"nf4": 0.0084, "int4": 0.0117}
"""Mean squared error of normal draws, over their variance; the measured ones are within WITHIN of these."""
WITHIN = 0.02

CLAIM = Claim(
    "T17",
    "Perplexity: full ≤ GPTQ at 4 bits ≤ nearest at 4 bits, and 3 bits widen the gap; NF4 loses less of normal weights than int4",
    "arXiv 2210.17323, 2305.14314",
    "each difference in nats a token, paired by seed, above 0 by more than 2 s.e.: GPTQ 4 − full, nearest 4 − GPTQ 4, and "
    f"(nearest − GPTQ) at 3 − at 4 bits; relative squared error NF4 {ERRORS['nf4']}, int4 {ERRORS['int4']} within "
    f"{WITHIN:.0%} on normal draws, and NF4's the smaller on tiny-base's matrices",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3, 4, 5], "bits": [4, 3], "methods": ["rtn", "gptq", "awq"], "calibrate": 48, "measure": 64, "draws": 1 << 22,
    "processes": 2,
}  # fmt: skip
QUICK = {**SETTINGS, "seeds": [0], "methods": ["rtn", "gptq"], "calibrate": 2, "measure": 2, "draws": 1 << 17, "processes": 1}
GRID = {"group": "channel", "symmetric": False}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    rows = spread(of_seed, [(seed, settings) for seed in settings["seeds"]], settings["processes"])
    numbers: dict[str, Number] = {"full nll": number(row["full"] for row in rows)}
    for name in rows[0]:
        if name != "full":
            numbers[f"{name} cost"] = number(row[name] - row["full"] for row in rows)
    for bits in settings["bits"]:
        numbers[f"nearest minus gptq {bits}"] = number(row[f"rtn {bits}"] - row[f"gptq {bits}"] for row in rows)
    gaps = [numbers[f"nearest minus gptq {bits}"]["seeds"] for bits in settings["bits"]]
    numbers["gap at 3 minus gap at 4"] = number(low - high for high, low in zip(*gaps, strict=True))
    numbers |= {name: exact(value) for name, value in of_weights(settings["draws"]).items()}
    return {"numbers": numbers, "curves": {}}


def of_seed(seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Nats a token: of the model as it is, and rounded in each way."""
    import copy

    from posttrain.compress.blocks import blocks_of
    from posttrain.compress.distance import distance
    from posttrain.compress.rounders import Rounder
    from posttrain.models.lm import LM

    base = stories.loaded()
    calibrate, measured = stories.pieces(base.tokenizer, seed, settings["calibrate"], settings["measure"])
    found: dict[str, float] = {}
    for bits in settings["bits"]:
        for method in settings["methods"]:
            lm = LM(copy.deepcopy(base.lm.model), base.lm.layout)
            rounder = Rounder.model_validate(method)
            rounder.quantize(lm, blocks_of(lm.model), calibrate if rounder.reads else None, {"bits": bits, **GRID})
            figures = distance(base.lm, lm, measured)
            found[f"{method} {bits}"], found["full"] = figures["nll"].value, figures["nll_before"].value
    return found


def of_weights(count: int) -> dict[str, float]:
    """Relative squared errors of 4 bits in blocks of 64: on normal draws, and over all matrices of tiny-base's blocks."""
    import torch

    from posttrain import draws
    from posttrain.compress.blocks import blocks_of
    from posttrain.compress.rounding import nearest
    from posttrain.models import nf4
    from posttrain.models.linears import matrix_of

    def error(kind: str, weight: Any) -> float:
        rounded = nf4.dequantize(*nf4.quantize(weight), weight.shape) if kind == "nf4" else nearest(weight, 4, 64).dense()
        return float((rounded - weight).double().square().sum())

    normal = torch.from_numpy(draws.generator(1, "T17").standard_normal((count // 1024, 1024))).float()
    matrices = [matrix_of(layer) for block in blocks_of(stories.loaded().lm.model) for layer in block.layers.values()]
    found = {}
    for kind in ERRORS:
        found[f"{kind} on normal draws"] = error(kind, normal) / float(normal.double().square().sum())
        found[f"{kind} on tiny-base"] = sum(error(kind, each) for each in matrices) / sum(
            float(each.double().square().sum()) for each in matrices
        )
    return found


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    return {
        "full at most GPTQ at 4 bits": exceeds(numbers["gptq 4 cost"]),
        "GPTQ at most the nearest at 4 bits": exceeds(numbers["nearest minus gptq 4"]),
        "the gap at 3 bits is larger": exceeds(numbers["gap at 3 minus gap at 4"]),
        "NF4 and int4 lose what is computed for normal weights": all(
            abs(numbers[f"{kind} on normal draws"]["value"] / goal - 1) <= WITHIN for kind, goal in ERRORS.items()
        ),
        "NF4 loses less than int4 of tiny-base's weights": (
            numbers["nf4 on tiny-base"]["value"] < numbers["int4 on tiny-base"]["value"]
        ),
    }


def costs(numbers: dict[str, Number]) -> dict[str, Number]:
    return {name.removesuffix(" cost"): each for name, each in numbers.items() if name.endswith(" cost")}


def say(numbers: dict[str, Number]) -> str:
    full = numbers["full nll"]["value"]
    parts = [
        f"{name} bits {math.exp(full + each['value']):.2f} (+{shown(each, 4)} nats)" for name, each in costs(numbers).items()
    ]
    errors = "; ".join(
        f"{where}: NF4 {numbers[f'nf4 on {where}']['value']:.4f}, int4 {numbers[f'int4 on {where}']['value']:.4f}"
        for where in ("normal draws", "tiny-base")
    )
    return f"perplexity: full {math.exp(full):.2f}; {'; '.join(parts)}. Relative squared error, {errors}"


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(6, 3.2)
    axes = figure.subplots()
    colours = {"rtn": "#D55E00", "gptq": "#0072B2", "awq": "#009E73"}
    costing = costs(found["numbers"])
    for method, colour in colours.items():
        bits = [int(name.split()[1]) for name in costing if name.startswith(method)]
        if not bits:
            continue
        values = [costing[f"{method} {each}"] for each in bits]
        axes.errorbar(
            bits, [each["value"] for each in values], [2 * each["se"] for each in values], marker="o", capsize=3, color=colour,
            label=method,
        )  # fmt: skip
    axes.set(xlabel="bits a weight", ylabel="cost, nats a token", yscale="log")
    axes.set_xticks(found["settings"]["bits"])
    axes.minorticks_off()
    axes.legend(frameon=False)


if __name__ == "__main__":
    main(sys.modules[__name__])
