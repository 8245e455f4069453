"""T2: DPO collapses onto one answer where preferences are deterministic, whatever beta; IPO does not. arXiv 2310.12036.

Three answers in a total order, y1 > y2 > y3, all three pairs equally often, a uniform reference; a policy of three logits in
float64, `posttrain.losses` and Adam on minibatches of 90 pairs from 900, shuffled anew every epoch (rate and minibatch are the
paper's; the rate decays over the second half).
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from claims.claim import Claim, Number, exact, main, number

WITHIN = 1e-3
"""IPO's probabilities differ from the least-squares solution (margins of neighbours 1 / (3 tau)) by no more than this."""
COLLAPSED = 0.999
"""DPO's probability of y1 after its 10,000 steps is above this, for each beta."""
SAME_LIMIT = 1e-3
"""DPO's probabilities of y1 for the smallest and the largest beta differ by less than this: the limit knows no beta."""
OTHER_LIMIT = 0.4
"""IPO's probabilities of y1 for the smallest and the largest tau differ by more than this."""

CLAIM = Claim(
    "T2",
    "IPO does not collapse on deterministic preferences, DPO does",
    "arXiv 2310.12036",
    f"IPO within {WITHIN:g} of its closed form; DPO's p(y1) > {COLLAPSED:g} for every beta, equal to {SAME_LIMIT:g} between "
    f"betas; IPO's differs by > {OTHER_LIMIT:g} between taus",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3, 4, 5], "steps": 10_000, "rate": 1e-2, "data": 900, "pairs": 90,
    "betas": [0.1, 0.3, 1.0], "taus": [0.1, 0.3, 1.0],
}  # fmt: skip
QUICK = {**SETTINGS, "seeds": [101, 102], "steps": 1600, "rate": 0.1, "betas": [0.1, 1.0], "taus": [0.1, 1.0]}
PAIRS = ((0, 1), (1, 2), (0, 2))
LOOKS = 50


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """p(y1), p(y2), p(y3) at the end of each training, and p(y1) on the way."""
    from posttrain import losses

    numbers: dict[str, Number] = {}
    curves: dict[str, Any] = {"steps": looks(settings["steps"])}
    for beta in settings["betas"]:
        name = f"dpo beta {beta:g}"
        curves[name] = learned(partial(losses.dpo, beta=beta), settings, numbers, name)
    for tau in settings["taus"]:
        name = f"ipo tau {tau:g}"
        curves[name] = learned(partial(losses.ipo, tau=tau), settings, numbers, name)
        for answer, share in enumerate(closed_form(tau), start=1):
            numbers[f"closed form tau {tau:g} y{answer}"] = exact(share)
    return {"numbers": numbers, "curves": curves}


def learned(loss: Callable[[Any], Any], settings: dict[str, Any], numbers: dict[str, Number], name: str) -> list[float]:
    """Trains one policy for each seed, side by side; the mean p(y1) at each look."""
    import torch

    from posttrain import draws

    streams = [draws.generator(seed, "T2", name) for seed in settings["seeds"]]
    logits = torch.stack([torch.from_numpy(stream.standard_normal(3)) for stream in streams]).requires_grad_()
    ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    optimizer = torch.optim.Adam([logits], lr=settings["rate"])
    winners, losers = torch.tensor(PAIRS).T
    at, curve = set(looks(settings["steps"])), []
    for step in range(settings["steps"]):
        if step in at:
            curve.append(float(logits.detach().softmax(-1)[:, 0].mean()))
        place = step * settings["pairs"] % settings["data"]
        if place == 0:  # an epoch: all pairs equally often, shuffled anew for each seed
            epoch = torch.stack([torch.from_numpy(stream.permutation(settings["data"])) for stream in streams]) % 3
        drawn = epoch[:, place : place + settings["pairs"]]
        ratio = logits.log_softmax(-1) - ref
        margin = ratio.gather(1, winners[drawn]) - ratio.gather(1, losers[drawn])
        optimizer.param_groups[0]["lr"] = settings["rate"] * min(1.0, 2 * (1 - step / settings["steps"]))
        optimizer.zero_grad()
        (loss(margin.flatten()).sum() / settings["pairs"]).backward()  # each seed's mean: Adam keeps them apart
        optimizer.step()
    end = logits.detach().softmax(-1)
    numbers |= {f"{name} y{answer + 1}": number(end[:, answer].tolist()) for answer in range(3)}
    return [*curve, float(end[:, 0].mean())]


def looks(steps: int) -> list[int]:
    """Steps after which p(y1) is noted: evenly on a logarithmic axis."""
    return sorted({round(steps ** (place / LOOKS)) for place in range(LOOKS + 1)})


def closed_form(tau: float) -> list[float]:
    """The policy whose margins are the least-squares solution: those of neighbours are 1 / (3 tau)."""
    import math

    weights = [math.exp((1 - place) / (3 * tau)) for place in range(3)]
    return [each / sum(weights) for each in weights]


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    def first(name: str) -> list[float]:
        return [each["value"] for key, each in numbers.items() if key.startswith(name) and key.endswith(" y1")]

    gaps = [
        abs(seed - numbers[key.replace("ipo", "closed form")]["value"])
        for key in numbers if key.startswith("ipo") for seed in numbers[key]["seeds"]
    ]  # fmt: skip
    dpo = [seed for key in numbers if key.startswith("dpo") and key.endswith(" y1") for seed in numbers[key]["seeds"]]
    return {
        "IPO reaches its closed form": max(gaps) < WITHIN,
        "DPO collapses for every beta": min(dpo) > COLLAPSED,
        "DPO's limit does not depend on beta": max(first("dpo")) - min(first("dpo")) < SAME_LIMIT,
        "IPO's limit depends on tau": max(first("ipo")) - min(first("ipo")) > OTHER_LIMIT,
    }


def say(numbers: dict[str, Number]) -> str:
    parts = [
        f"{key.removesuffix(' y1')}: {each['value']:.5f}" for key, each in numbers.items()
        if key.endswith(" y1") and not key.startswith("closed")
    ]  # fmt: skip
    return f"p(y1) after training: {'; '.join(parts)}"


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(6, 3.4)
    axes = figure.subplots()
    steps, numbers = found["curves"]["steps"], found["numbers"]
    colours = {"dpo": ["#D55E00", "#E69F00", "#CC79A7"], "ipo": ["#0072B2", "#56B4E9", "#003F6B"]}
    for name, curve in found["curves"].items():
        if name == "steps":
            continue
        method, what, value = name.split()
        label = f"{method.upper()}, {'β' if what == 'beta' else 'τ'} = {value}"
        axes.plot(steps, curve, color=colours[method].pop(0), label=label)
    for key, each in numbers.items():
        if key.startswith("closed form") and key.endswith("y1"):
            axes.axhline(each["value"], color="0.6", linestyle=":", linewidth=1, zorder=0)
    axes.plot([], [], color="0.6", linestyle=":", linewidth=1, label="IPO's closed form")
    axes.set(xlabel="step", ylabel="p(y1), mean over seeds", xscale="log", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


if __name__ == "__main__":
    main(sys.modules[__name__])
