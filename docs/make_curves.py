"""Draws the curves of the docs pages from runs: python docs/make_curves.py runs/quickstart (and runs/tiny_base)."""

import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

CURVES = Path(__file__).parent / "curves"
PANELS = {"sft": ["nll", "pass@1"], "grpo": ["reward", "pass@1", "entropy"], "pretrain": ["nll"]}
NAMES = {"nll": "loss (nats a token)", "pass@1": "validation pass@1", "reward": "reward", "entropy": "entropy (nats a token)"}


def rows_of(run: Path, stage: str) -> list[dict]:
    folders = json.loads((run / "recipe.json").read_text())["folders"]
    return [json.loads(line) for line in (run / folders[stage] / "metrics.jsonl").read_text().splitlines()]


def draw(objective: str, rows: list[dict]) -> None:
    figure, axes = pyplot.subplots(1, len(PANELS[objective]), figsize=(3.6 * len(PANELS[objective]), 2.6), squeeze=False)
    for axis, name in zip(axes[0], PANELS[objective], strict=True):
        if name == "pass@1":
            points = [(row["step"], row["validation"][name]) for row in rows if name in row.get("validation", {})]
            axis.plot([step for step, _ in points], [each["value"] for _, each in points], marker="o", color="#0072B2")
            low, high = [each["low"] for _, each in points], [each["high"] for _, each in points]
            axis.fill_between([step for step, _ in points], low, high, alpha=0.2, color="#0072B2")
            axis.set_ylim(0, 1)
        else:
            points = [(row["step"], row[name]) for row in rows if name in row]
            values = [value for _, value in points]
            axis.plot([step for step, _ in points], values, color="#0072B2", alpha=0.25, linewidth=0.8)
            width = max(1, len(values) // 40)
            means = [fmean(values[max(0, at - width) : at + width + 1]) for at in range(len(values))]
            axis.plot([step for step, _ in points], means, color="#0072B2")
        axis.set_title(NAMES[name], fontsize=9)
        axis.set_xlabel("updates", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    CURVES.mkdir(exist_ok=True)
    figure.savefig(CURVES / f"{objective}.svg", metadata={"Date": None})


for run in map(Path, sys.argv[1:]):
    stages = json.loads((run / "recipe.json").read_text())["recipe"]["stages"]
    for stage, settings in stages.items():
        if settings["kind"] == "train" and settings["objective"]["kind"] in PANELS and stage != "more":
            draw(settings["objective"]["kind"], rows_of(run, stage))
