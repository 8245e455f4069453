"""T21: packed rows compute the same loss as padded ones, and are faster by what padding wastes.

posttrain's two layouts of one model, on the same rows of GSM8K in the order of the file: `tree`, which lays sequences end to end
(these share no prefix long enough to lay once), and `padded`. Loss and gradient of every micro-batch are compared; then both
layouts do the same forwards and backwards in turn, several rounds, on one thread. Seconds are the processor's own, so that what
else runs on the machine counts less.
"""

import sys
import time
from statistics import median
from typing import Any

from claims.claim import Claim, Number, exact, main, number

SAME_LOSS = 1e-5
"""The relative difference of the two losses of a micro-batch is at most this (float32)."""
SAME_GRADIENT = 1e-4
"""The relative difference of the two whole gradients of a micro-batch is at most this (float32)."""
AROUND = 0.2
"""Tokens a second, packed over padded, times the padding efficiency (real tokens over cells) is within this of 1, in the median
over rounds, for every number of rows at a time."""

CLAIM = Claim(
    "T21",
    "Packing changes no loss, and is faster by what padding wastes",
    "arXiv 2107.02027",
    f"loss equal to {SAME_LOSS:g}, gradient to {SAME_GRADIENT:g}; speed ratio times padding efficiency within 1 ± {AROUND:g}",
)
SETTINGS: dict[str, Any] = {"rounds": 3, "at_a_time": [4, 8, 16, 32], "first": 1000, "rows": 64, "compared": 64}
QUICK = {"rounds": 1, "at_a_time": [2], "first": 0, "rows": 4, "compared": 4}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from posttrain.batch import Sequences
    from posttrain.models.lm import LM
    from posttrain.models.load import load

    torch.set_num_threads(1)
    loaded = load("posttrain:tiny-base")
    layouts = {"packed": LM(loaded.lm.model, "tree"), "padded": LM(loaded.lm.model, "padded")}
    rows = rendered_rows(loaded.tokenizer, settings["first"], settings["rows"])
    numbers: dict[str, Number] = {}
    losses, gradients = [], []
    for start in range(0, settings["compared"], 8):
        part = Sequences.of(rows[start : start + 8])
        (one, slope), (other, padded_slope) = (step(lm, part) for lm in layouts.values())
        losses.append(abs(one - other) / abs(other))
        gradients.append(float((slope - padded_slope).norm() / padded_slope.norm()))
    numbers["largest difference of a loss"] = exact(max(losses))
    numbers["largest difference of a gradient"] = exact(max(gradients))
    curves: dict[str, Any] = {"lengths": [len(tokens) for tokens, _ in rows]}
    for size in settings["at_a_time"]:
        parts = [Sequences.of(rows[start : start + size]) for start in range(0, len(rows), size)]
        cells = sum(part.count * int(part.lengths.max()) for part in parts)
        tokens = sum(len(part.tokens) for part in parts)
        speeds: dict[str, list[float]] = {name: [] for name in layouts}
        for turn in range(settings["rounds"] + 1):
            for name, lm in layouts.items():
                began = time.process_time()
                for part in parts:
                    step(lm, part)
                if turn:  # the first round warms up
                    speeds[name].append(tokens / (time.process_time() - began))
        ratios = [one / other for one, other in zip(speeds["packed"], speeds["padded"], strict=True)]
        numbers[f"{size} rows: padding efficiency"] = exact(tokens / cells)
        numbers[f"{size} rows: packed tokens/s"] = number(speeds["packed"])
        numbers[f"{size} rows: padded tokens/s"] = number(speeds["padded"])
        numbers[f"{size} rows: ratio"] = number(ratios)
        numbers[f"{size} rows: ratio times efficiency, median"] = exact(median(ratios) * tokens / cells)
    return {"numbers": numbers, "curves": curves}


def rendered_rows(tokenizer: Any, first: int, count: int) -> list[Any]:
    """(tokens, marks) of some rows of GSM8K as chats."""
    from posttrain.data.render import Template
    from posttrain.tasks.task import Gsm8kTask
    from posttrain.text import Conversation, Message

    template = Template(tokenizer)
    problems = Gsm8kTask(limit=first + count).problems()[first:]
    answers = [Message("assistant", problem.facts["solution"]) for problem in problems]
    return [
        template.conversation(Conversation((*problem.prompt, answer))) for problem, answer in zip(problems, answers, strict=True)
    ]


def step(lm: Any, rows: Any) -> tuple[float, Any]:
    """(loss, gradient) of the negative log-likelihood."""
    import torch

    weight = torch.full((rows.trained,), -1.0 / rows.trained)
    total, _ = lm.weighted_sum(rows, weight)
    gradient = torch.autograd.grad(total, [each for each in lm.model.parameters() if each.requires_grad])
    return float(total.detach()), torch.cat([each.flatten() for each in gradient])


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    products = [each["value"] for name, each in numbers.items() if name.endswith("ratio times efficiency, median")]
    return {
        "the same loss": numbers["largest difference of a loss"]["value"] <= SAME_LOSS,
        "the same gradient": numbers["largest difference of a gradient"]["value"] <= SAME_GRADIENT,
        "speed is one over the padding efficiency": all(abs(each - 1) <= AROUND for each in products),
    }


def sizes_of(numbers: dict[str, Number]) -> list[int]:
    return [int(name.split()[0]) for name in numbers if name.endswith("rows: ratio")]


def say(numbers: dict[str, Number]) -> str:
    parts = [
        f"{size}: {numbers[f'{size} rows: ratio']['value']:.2f} at {numbers[f'{size} rows: padding efficiency']['value']:.0%}"
        for size in sizes_of(numbers)
    ]
    return (
        f"losses differ by at most {numbers['largest difference of a loss']['value']:.0e}, gradients by "
        f"{numbers['largest difference of a gradient']['value']:.0e}; packed over padded tokens/s, by rows at a time, at their "
        f"padding efficiency: {'; '.join(parts)}"
    )


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(7.2, 3)
    left, right = figure.subplots(1, 2)
    left.hist(found["curves"]["lengths"], bins=16, color="#0072B2", label="rows of GSM8K")
    left.set(xlabel="tokens of a row", ylabel="rows")
    left.legend(frameon=False)
    numbers = found["numbers"]
    sizes = sizes_of(numbers)
    wasted = [1 / numbers[f"{size} rows: padding efficiency"]["value"] for size in sizes]
    ratios = [numbers[f"{size} rows: ratio"] for size in sizes]
    values, errors = [each["value"] for each in ratios], [2 * each["se"] for each in ratios]
    right.errorbar(sizes, values, errors, color="#0072B2", marker="o", capsize=3, label="measured, ± 2 s.e.")
    right.plot(sizes, wasted, color="0.25", label="1 / padding efficiency")
    low, high = ([each * (1 + sign * AROUND) for each in wasted] for sign in (-1, 1))
    right.fill_between(sizes, low, high, color="0.85", label=f"± {AROUND:.0%}")
    right.set(xscale="log", xlabel="rows at a time", ylabel="tokens/s, packed over padded", ylim=(0, None))
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.minorticks_off()
    right.legend(frameon=False)


if __name__ == "__main__":
    main(sys.modules[__name__])
