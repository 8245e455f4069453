"""T9: GRPO raises the accuracy on verifiable arithmetic, without making the best of eight worse. arXiv 2402.03300.

tiny-base learns the form of solutions from a few worked problems, and from there by `grpo` with and without a pull to where it
began. The reward is 1 for the right result and 0.2 for the right form. Measured on the 500 test problems, 8 samples each.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from claims.claim import Claim, Number, main, number, shown, spread

START = (0.2, 0.4)
"""pass@1 after supervised fine-tuning lies in here."""
GAIN = 0.2
"""pass@1 rises by at least this without a pull."""
LOSS = 0.05
"""pass@8 falls by no more than this, at any weight of the pull."""
NEARLY = 0.9
"""A part of the reward counts as learned from the update on at which it is this share of what it is in the end."""

CLAIM = Claim(
    "T9",
    "GRPO raises accuracy on verifiable arithmetic, and the best of eight does not get worse",
    "arXiv 2402.03300",
    f"from pass@1 of {START[0]:.0%} to {START[1]:.0%}: ≥ {GAIN:.0%} more; pass@8 not lower by more than {LOSS:.0%} at any weight "
    "of the KL; a larger weight ends nearer to the start; the form is learned before the result",
)
SETTINGS: dict[str, Any] = {
    "rows": 30, "sft_steps": 55, "steps": 80, "problems": 16, "weights": [0.0, 0.05, 0.5], "limit": None, "seed": 0,
    "processes": 2,
}  # fmt: skip
QUICK = {**SETTINGS, "sft_steps": 3, "steps": 2, "problems": 2, "weights": [0.0], "limit": 4, "processes": 1}
TRAIN = "posttrain:data/arith_train.jsonl.gz"
SHORT = {"max_tokens": 64}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        model, start = fine_tuned(root, settings)
        found = spread(of_weight, [(root, model, weight, settings) for weight in settings["weights"]], settings["processes"])
    numbers: dict[str, Number] = {f"start {name}": number([value]) for name, value in start.items()}
    curves: dict[str, Any] = {}
    for weight, run in zip(settings["weights"], found, strict=True):
        numbers |= {f"kl {weight:g} {name}": number([value]) for name, value in run["figures"].items()}
        for part in ("right", "form"):
            curves[f"{weight:g} {part}"] = run[part]
            numbers[f"kl {weight:g} {part} learned at"] = number([learned_at(run[part])])
    return {"numbers": numbers, "curves": curves}


def learned_at(values: list[float]) -> float:
    """The first update at which the mean of five is nearly what it is at the end."""
    means = [statistics.fmean(values[max(0, place - 4) : place + 1]) for place in range(len(values))]
    return float(next(place + 1 for place, mean in enumerate(means) if mean >= NEARLY * means[-1]))


def fine_tuned(root: str, settings: dict[str, Any]) -> tuple[str, dict[str, float]]:
    import posttrain

    model = posttrain.train(
        root, "sft", model="posttrain:tiny-base", objective="sft", seed=settings["seed"], steps=settings["sft_steps"],
        data={
            "sources": {"path": TRAIN, "rows": f"0:{settings['rows']}"},
            "format": {"kind": "prompt_completion", "fields": {"completion": "solution"}}, "max_tokens": 256,
        },
        optim={"learning_rate": 5e-4, "schedule": "cosine", "warmup": 0.1}, batch={"rows": 10},
    )  # fmt: skip
    return str(model), evaluated(model, None, settings)


def of_weight(root: str, model: str, weight: float, settings: dict[str, Any]) -> dict[str, Any]:
    """What is learned with a weight of the pull: figures on the test problems, and the parts of the reward while it learns."""
    import posttrain

    form = {"kind": "regex", "pattern": r"(\d+ [-+*/] \d+ = \d+\n?)+"}
    parts = {"right": {"grader": "equations"}, "form": {"grader": form, "weight": 0.2}}
    problems = {"kind": "arithmetic", "source": {"path": TRAIN, "rows": "2000:7800"}}
    learned = posttrain.train(
        root, f"grpo-{weight:g}", model=model, objective={"kind": "grpo", "aggregate": "token", "kl": weight},
        task={**problems, "grader": {"kind": "weighted", "parts": parts}}, seed=settings["seed"],
        rollout={"problems": settings["problems"], "per_problem": 8, "sampling": SHORT}, steps=settings["steps"],
        optim={"learning_rate": 3e-4, "schedule": "linear", "warmup": 0.1},
    )  # fmt: skip
    rows = [json.loads(line) for line in (learned.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figures = evaluated(learned, model, settings)
    return {"figures": figures, **{part: [row[f"reward/{part}"] for row in rows] for part in ("right", "form")}}


def evaluated(model: Path, reference: str | None, settings: dict[str, Any]) -> dict[str, float]:
    from posttrain.data.render import Template
    from posttrain.evaluation import Evaluation, evaluate
    from posttrain.models.roles import Frozen
    from posttrain.sampling import Sampling
    from posttrain.tasks import Task
    from posttrain.tuners.load import load

    loaded = load(str(model))
    plan = Evaluation(samples=8, greedy=False, sampling=Sampling(**SHORT), limit=settings["limit"])
    frozen = None if reference is None else Frozen(load(reference).lm)
    task = Task.model_validate("arithmetic")
    report = evaluate(loaded.lm, Template(loaded.tokenizer), task, plan, settings["seed"], reference=frozen)
    return {name: report.figures[name].value for name in ("pass@1", "pass@8", "kl") if name in report.figures}


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    start = {name: numbers[f"start {name}"]["value"] for name in ("pass@1", "pass@8")}
    weights = sorted({float(name.split()[1]) for name in numbers if name.startswith("kl ")})
    free = f"kl {weights[0]:g}"
    away = [numbers[f"kl {weight:g} kl"]["value"] for weight in weights]
    return {
        "it begins where it should": START[0] <= start["pass@1"] <= START[1],
        "pass@1 rises": numbers[f"{free} pass@1"]["value"] >= start["pass@1"] + GAIN,
        "pass@8 does not fall": all(numbers[f"kl {weight:g} pass@8"]["value"] >= start["pass@8"] - LOSS for weight in weights),
        "a larger weight ends nearer to the start": away == sorted(away, reverse=True),
        "the form is learned before the result": (
            numbers[f"{free} form learned at"]["value"] < numbers[f"{free} right learned at"]["value"]
        ),
    }


def say(numbers: dict[str, Number]) -> str:
    weights = sorted({float(name.split()[1]) for name in numbers if name.startswith("kl ")})
    parts = [
        f"weight {weight:g}: {numbers[f'kl {weight:g} pass@1']['value']:.1%} and "
        f"{numbers[f'kl {weight:g} pass@8']['value']:.1%}, {shown(numbers[f'kl {weight:g} kl'], 1)} nats away"
        for weight in weights
    ]
    free = f"kl {weights[0]:g}"
    learned = " and ".join(f"{part} at update {numbers[f'{free} {part} learned at']['value']:.0f}" for part in ("form", "right"))
    return (
        f"pass@1 and pass@8 from {numbers['start pass@1']['value']:.1%} and {numbers['start pass@8']['value']:.1%}; "
        f"{'; '.join(parts)}; learned: {learned}"
    )


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(4.2, 3)
    axis = figure.subplots()
    for weight, colour in zip(found["settings"]["weights"], ("#D55E00", "#E69F00", "#0072B2"), strict=False):
        for part, style in (("right", "-"), ("form", ":")):
            axis.plot(found["curves"][f"{weight:g} {part}"], style, color=colour, label=f"kl {weight:g}, {part}")
    axis.set(xlabel="updates", ylabel="reward part", ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    main(sys.modules[__name__])
