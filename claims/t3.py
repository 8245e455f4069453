"""T3: LoRA learns less than full fine-tuning and forgets less, and the more so the lower its rank. arXiv 2405.09673.

A tiny Llama learns task A, strings of digits reversed (`402171=171204`), and then task B alone, strings of digits sorted
(`402171>011247`): in full, and by LoRA of several ranks on all linear layers, for equally many updates of the same rows, each at
the learning rate that learned B best in calibration. The losses of both tasks are those of strings that nothing was trained on.
"""

import statistics
import sys
from typing import TYPE_CHECKING, Any

from claims.claim import Claim, Number, exceeds, main, number, shown, spread

if TYPE_CHECKING:
    import numpy as np

MONOTONE = 0.8
"""Spearman's correlation of the rank with each loss is beyond this, in the mean over seeds."""
LOW = 4
"""The ranks up to which full fine-tuning must have learned B better, and whose size ENERGY's rank must exceed WIDER-fold."""
WIDER = 4.0
ENERGY = 0.9
"""The effective rank of a change of weights: how many singular directions hold this share of its squares."""
EFFECTIVE = "effective rank of the full change"

CLAIM = Claim(
    "T3",
    "LoRA learns less and forgets less than full fine-tuning, the more so the lower its rank; the full change has a high rank",
    "arXiv 2405.09673",
    f"by 2 s.e.: the loss of A rises less under every LoRA than in full, and that of B is higher under LoRA of r ≤ {LOW}; both "
    f"monotone in r (Spearman > {MONOTONE:g}); rank that holds {ENERGY:.0%} of the full change > {WIDER:g} r for r ≤ {LOW}",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3], "ranks": [1, 4, 16, 64], "base_steps": 500, "steps": 150, "batch": 64, "rows": 8192, "held_out": 256,
    "rates": {"full": 3e-3, "1": 1e-2, "4": 1e-2, "16": 6e-3, "64": 3e-3}, "base_rate": 3e-3, "looks": 5, "processes": 2,
}  # fmt: skip
QUICK = {
    **SETTINGS, "seeds": [101], "ranks": [1, 4], "base_steps": 60, "steps": 12, "batch": 16, "rows": 256, "held_out": 64,
    "looks": 2, "processes": 1,
}  # fmt: skip
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
DIGITS = 6


def reversal(draw: "np.random.Generator") -> tuple[str, str]:
    string = "".join(map(str, draw.integers(0, 10, DIGITS)))
    return f"{string}=", string[::-1]


def sorting(draw: "np.random.Generator") -> tuple[str, str]:
    string = "".join(map(str, draw.integers(0, 10, DIGITS)))
    return f"{string}>", "".join(sorted(string))


def of_seed(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """{method: [(step, loss of A, loss of B), ...]}, and under `rank` the effective rank of the full change."""
    import torch

    from claims import strings, symbols
    from posttrain.tuners import Full, LoRA, Tuner

    torch.set_num_threads(1)
    held, steps = settings["held_out"], settings["steps"]
    a = symbols.rows(reversal, settings["rows"] + held, seed, "A")
    b = symbols.rows(sorting, settings["rows"] + held, seed, "B")
    base = symbols.write_model(seed, layout="padded", **SHAPE)
    symbols.tune(base, Full(), a[held:], settings["base_steps"], settings["batch"], settings["base_rate"], seed)
    tuners: dict[str, Tuner] = {"full": Full()} | {str(rank): LoRA(rank=rank, alpha=2.0 * rank) for rank in settings["ranks"]}
    found: dict[str, Any] = {}
    for name, tuner in tuners.items():
        lm = symbols.twin(base)
        points = [(0, symbols.nll(lm, a[:held]), symbols.nll(lm, b[:held]))]

        def look(run: Any, lm: Any = lm, points: list[Any] = points) -> None:
            points.append((run.step, symbols.nll(lm, a[:held]), symbols.nll(lm, b[:held])))

        watcher = strings.Watcher(steps // settings["looks"], look)
        symbols.tune(lm, tuner, b[held:], steps, settings["batch"], settings["rates"][name], seed, watcher)
        found[name] = points
        if name == "full":
            changes = [one - two for one, two in zip(matrices(lm), matrices(base), strict=True)]
            found["rank"] = statistics.fmean(map(effective_rank, changes))
    return found


def matrices(lm: Any) -> list[Any]:
    """The weights that LoRA stands beside."""
    from posttrain.tuners.places import linears

    head = lm.model.get_output_embeddings()
    return [each.weight.detach() for each in linears(lm.model).values() if each is not head]  # type: ignore[operator]


def effective_rank(change: Any) -> int:
    """How many singular directions hold ENERGY of a matrix's squares."""
    import torch

    energy = torch.linalg.svdvals(change.double()) ** 2
    return 1 + int((energy.cumsum(0) < ENERGY * energy.sum()).sum())


def spearman(ranks: list[int], values: list[float]) -> float:
    """The correlation of the orders of both; the ranks ascend, no two values are equal."""
    order = sorted(range(len(values)), key=values.__getitem__)
    places = [order.index(index) for index in range(len(values))]
    return statistics.correlation([float(index) for index in range(len(ranks))], [float(place) for place in places])


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Over seeds, at the last update: how far A's loss has risen and what B's is, alone and beside full fine-tuning."""
    found = spread(of_seed, [(seed, settings) for seed in settings["seeds"]], settings["processes"])
    methods = ["full", *map(str, settings["ranks"])]
    rise = {name: [each[name][-1][1] - each[name][0][1] for each in found] for name in methods}
    last = {name: [each[name][-1][2] for each in found] for name in methods}
    numbers: dict[str, Number] = {}
    for name in methods:
        title = "full" if name == "full" else f"r = {name}"
        numbers[f"{title}: A forgotten"] = number(rise[name])
        numbers[f"{title}: loss of B"] = number(last[name])
        if name != "full":
            numbers[f"{title}: forgotten less than in full"] = number(
                full - one for full, one in zip(rise["full"], rise[name], strict=True)
            )
            numbers[f"{title}: B learned less than in full"] = number(
                one - full for full, one in zip(last["full"], last[name], strict=True)
            )
    ranks = settings["ranks"]
    for title, values, sign in (("A forgotten", rise, 1), ("B learned", last, -1)):
        numbers[f"Spearman of r and {title}"] = number(
            spearman(ranks, [sign * values[str(rank)][place] for rank in ranks]) for place in range(len(found))
        )
    numbers[EFFECTIVE] = number(each["rank"] for each in found)
    curves = {name: mean_points([each[name] for each in found]) for name in methods}
    return {"numbers": numbers, "curves": {"ranks": ranks, **curves}}


def mean_points(runs: list[list[tuple[int, float, float]]]) -> list[list[float]]:
    """[step, loss of A, loss of B], means over seeds."""
    return [[statistics.fmean(each) for each in zip(*points, strict=True)] for points in zip(*runs, strict=True)]


def ranks_of(numbers: dict[str, Number]) -> list[int]:
    return [int(name.split()[2].rstrip(":")) for name in numbers if name.startswith("r = ") and name.endswith("loss of B")]


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    ranks = ranks_of(numbers)
    return {
        "every LoRA forgets less than full fine-tuning": all(
            exceeds(numbers[f"r = {rank}: forgotten less than in full"]) for rank in ranks
        ),
        f"full fine-tuning learns more than LoRA of r up to {LOW}": all(
            exceeds(numbers[f"r = {rank}: B learned less than in full"]) for rank in ranks if rank <= LOW
        ),
        "what is forgotten grows with r": numbers["Spearman of r and A forgotten"]["value"] > MONOTONE,
        "what is learned grows with r": numbers["Spearman of r and B learned"]["value"] > MONOTONE,
        **{
            f"the full change has more than {WIDER:g} r directions for r = {rank}": numbers[EFFECTIVE]["value"] > WIDER * rank
            for rank in ranks
            if rank <= LOW
        },
    }


def say(numbers: dict[str, Number]) -> str:
    parts = [
        f"{title} {shown(numbers[f'{title}: loss of B'])} / {shown(numbers[f'{title}: A forgotten'], 2)}"
        for title in (*(f"r = {rank}" for rank in ranks_of(numbers)), "full")
    ]
    forgotten, learned = (shown(numbers[f"Spearman of r and {what}"], 2) for what in ("A forgotten", "B learned"))
    return (
        f"loss of B / rise of A's loss, nats a token: {'; '.join(parts)}; Spearman of r and what is forgotten {forgotten}, "
        f"learned {learned}; effective rank of the full change {shown(numbers[EFFECTIVE], 1)} of 64"
    )


COLOURS = {"1": "#56B4E9", "4": "#0072B2", "16": "#E69F00", "64": "#D55E00", "full": "0.25"}


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(8.4, 3.2)
    left, right = figure.subplots(1, 2)
    curves = found["curves"]
    for name in (*map(str, curves["ranks"]), "full"):
        steps, a, b = zip(*curves[name], strict=True)
        label = "full" if name == "full" else f"LoRA, r = {name}"
        left.plot(b, a, color=COLOURS[name], marker="o", markersize=3, label=label)
        right.plot(steps, b, color=COLOURS[name], marker="o", markersize=3, label=label)
    left.set(xscale="log", xlabel="loss of B (sorting), nats a token", ylabel="loss of A (reversing), nats a token")
    left.invert_xaxis()
    left.legend(frameon=False)
    right.set(yscale="log", xlabel="update on B", ylabel="loss of B, nats a token")


if __name__ == "__main__":
    main(sys.modules[__name__])
