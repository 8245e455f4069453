"""T19: three estimators of the KL divergence from samples: bias, spread, and what their gradients are. J. Schulman, 2020.

Draws from pi = N(0, 1), reference N(mu, 1), by `posttrain.losses.kl_k1`, `kl_k2`, `kl_k3`. Draws are stratified (one in each of
equally likely intervals), so that a bias of a quarter of a percent can be told from none.
"""

import math
import sys
from typing import Any

from claims.claim import Claim, Number, exact, main, number

WITHIN = 0.03
"""Spread over KL and bias over KL differ from their exact values by no more than this share of them (a bias that is exactly
zero: by no more than this share of the KL), and from the table's printed values by no more than that and their last digit."""
GRADIENT = 1e-6
"""The expected gradients on the two-point example differ from their exact values by no more than this."""
TABLE = {
    0.1: {"k1": (20.0, 0.0), "k2": (1.42, 0.002), "k3": (1.42, 0.0)},
    1.0: {"k1": (2.00, 0.0), "k2": (1.73, 0.25), "k3": (1.70, 0.0)},
}
"""{mu: {estimator: (standard deviation / KL, bias / KL)}} as the source prints them (its 0.2% is 0.25%, cut off)."""
LAST_DIGIT = (0.005, 0.0006)
GRADIENTS = {"k1": 0.0, "k2": 0.1779326, "k3": 0.2, "k3 weighted by the ratio": 0.1779326}
"""d/dlogit of E[k] at pi = (0.7, 0.3), reference (0.5, 0.5): nothing, reverse KL, forward KL, reverse KL."""

CLAIM = Claim(
    "T19",
    "k1 is unbiased and noisy, k2 biased and quiet, k3 unbiased and quiet; as a loss k1 teaches nothing, k2 the reverse KL, "
    "k3 the forward KL",
    "Schulman 2020",
    f"standard deviation and bias over KL within {WITHIN:.0%} of the exact values; gradients within {GRADIENT:g}",
)
SETTINGS: dict[str, Any] = {"seeds": [1, 2, 3, 4, 5], "draws": 4_000_000}
QUICK = {"seeds": [101, 102], "draws": 1_000_000}


def exact_values(mu: float) -> dict[str, tuple[float, float]]:
    """{estimator: (standard deviation / KL, bias / KL)}; the log-ratio is normal with mean mu^2 / 2 and variance mu^2."""
    square, kl = mu**2, mu**2 / 2
    return {
        "k1": (mu / kl, 0.0),
        "k2": (math.sqrt(2 + square), kl / 2),
        "k3": (math.sqrt(math.expm1(square) - square) / kl, 0.0),
    }


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Mean and deviation of each estimator for each mu, the expected gradients, and histograms for the figure."""
    import torch

    from posttrain import draws, losses

    numbers: dict[str, Number] = {}
    curves: dict[str, Any] = {}
    found: dict[str, list[float]] = {}
    for seed in settings["seeds"]:
        count = settings["draws"]
        places = (torch.arange(count, dtype=torch.float64) + torch.from_numpy(draws.generator(seed, "T19").random(count))) / count
        x = torch.special.ndtri(places)
        for mu in TABLE:
            logp, ref_logp = -0.5 * x**2, -0.5 * (x - mu) ** 2
            for name, estimator in (("k1", losses.kl_k1), ("k2", losses.kl_k2), ("k3", losses.kl_k3)):
                values = estimator(logp, ref_logp)
                kl = mu**2 / 2
                found.setdefault(f"mu {mu:g} {name} deviation", []).append(float(values.std()) / kl)
                found.setdefault(f"mu {mu:g} {name} bias", []).append(float(values.mean()) / kl - 1)
                if seed == settings["seeds"][0] and mu == 1.0:
                    shares = torch.histc(values / kl, 120, -4, 8) / count / 0.1
                    curves[name] = shares.tolist()
    numbers |= {name: number(values) for name, values in found.items()}
    for mu in TABLE:
        for name, (deviation, bias) in exact_values(mu).items():
            numbers[f"exact mu {mu:g} {name} deviation"] = exact(deviation)
            numbers[f"exact mu {mu:g} {name} bias"] = exact(bias)
    numbers |= {f"gradient {name}": exact(value) for name, value in gradients().items()}
    return {"numbers": numbers, "curves": curves}


def gradients() -> dict[str, float]:
    """The expectation, over both points, of each estimator's gradient by the logit; what is drawn is no function of it."""
    import torch

    from posttrain import losses

    ref = torch.full((2,), 0.5, dtype=torch.float64).log()

    def expected(estimator: Any, weighted: bool = False) -> float:
        logit = torch.tensor(math.log(0.7 / 0.3), dtype=torch.float64, requires_grad=True)
        logp = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)
        ratio = (logp - logp.detach()).exp() if weighted else 1.0
        (slope,) = torch.autograd.grad((logp.detach().exp() * ratio * estimator(logp, ref)).sum(), logit)
        return float(slope)

    return {
        "k1": expected(losses.kl_k1), "k2": expected(losses.kl_k2), "k3": expected(losses.kl_k3),
        "k3 weighted by the ratio": expected(losses.kl_k3, weighted=True),
    }  # fmt: skip


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    near, printed = {"deviation": True, "bias": True}, True
    for mu, table in TABLE.items():
        for name, expected in table.items():
            for place, what in enumerate(("deviation", "bias")):
                key = f"mu {mu:g} {name} {what}"
                goal = numbers[f"exact {key}"]["value"]
                for value in numbers[key]["seeds"]:
                    near[what] &= abs(value - goal) <= WITHIN * (abs(goal) or 1.0)
                    printed &= abs(value - expected[place]) <= WITHIN * abs(expected[place]) + LAST_DIGIT[place]
    return {
        "deviations are the exact ones": near["deviation"],
        "biases are the exact ones": near["bias"],
        "the printed table is right to its last digit": printed,
        "gradients are those of nothing, reverse KL, forward KL": all(
            abs(numbers[f"gradient {name}"]["value"] - goal) < GRADIENT for name, goal in GRADIENTS.items()
        ),
    }


def percent(value: float) -> str:
    """+0.25%; no sign at zero."""
    return "0" if abs(value) < 5e-5 else f"{value:+.2%}"


def say(numbers: dict[str, Number]) -> str:
    parts = []
    for mu in TABLE:
        deviations = " / ".join(f"{numbers[f'mu {mu:g} {name} deviation']['value']:.2f}" for name in ("k1", "k2", "k3"))
        biases = " / ".join(percent(numbers[f"mu {mu:g} {name} bias"]["value"]) for name in ("k1", "k2", "k3"))
        parts.append(f"N({mu:g}, 1): deviation {deviations}, bias {biases}")
    slopes = " / ".join(f"{numbers[f'gradient {name}']['value'] + 0.0:.4f}" for name in ("k1", "k2", "k3"))
    return f"k1 / k2 / k3 over KL, reference {'; '.join(parts)}; gradients {slopes}"


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(7.2, 3)
    left, right = figure.subplots(1, 2)
    colours = {"k1": "#D55E00", "k2": "#E69F00", "k3": "#0072B2"}
    edges = [-4 + 0.1 * (place + 0.5) for place in range(120)]
    for name, shares in found["curves"].items():
        left.plot(edges, shares, color=colours[name], label=name)
    left.axvline(1, color="0.6", linestyle=":", linewidth=1, label="KL")
    left.set(xlabel="one draw's estimate / KL", ylabel="density", ylim=(0, 1.5), title="reference N(1, 1)")
    left.legend(frameon=False)
    numbers, places = found["numbers"], [(mu, name) for mu in TABLE for name in ("k1", "k2", "k3")]
    for row, (mu, name) in enumerate(places):
        value = numbers[f"mu {mu:g} {name} deviation"]["value"]
        right.barh(row, value, color=colours[name])
        bias = percent(numbers[f"mu {mu:g} {name} bias"]["value"])
        right.text(value * 1.1, row, f"{value:.2f}, bias {bias}", va="center", fontsize=8)
    right.set_yticks(range(len(places)), [f"{name}, N({mu:g}, 1)" for mu, name in places])
    right.invert_yaxis()
    right.set(xlabel="standard deviation / KL", xscale="log", xlim=(1, 300))


if __name__ == "__main__":
    main(sys.modules[__name__])
