"""Draws the curves of the pages from runs: python docs/make_curves.py runs/quickstart (or another of FIGURES)."""

import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

CURVES = Path(__file__).parent / "curves"
FIGURES = {  # of a run, by the name of its folder: the figures, and the objectives whose stages each shows
    "quickstart": {"sft": ["sft"], "grpo": ["grpo"]},
    "tiny_base": {"pretrain": ["pretrain"]},
    "rlhf_sentiment": {"preference": ["dpo"], "unpaired": ["kto"], "reward_models": ["bradley_terry"], "ppo": ["ppo"]},
    "online": {"online": ["online_dpo", "xpo"]},
    "classify": {"classify": ["classify"]},
    "delta": {"delta": ["match_logits"]},
}
PANELS = {
    "sft": ["nll", "pass@1"],
    "grpo": ["reward", "pass@1", "entropy"],
    "pretrain": ["nll"],
    "preference": ["margin", "accuracy", "chosen_logp"],
    "unpaired": ["good_ratio", "bad_ratio", "point"],
    "reward_models": ["loss/ranking", "accuracy", "gap"],
    "ppo": ["reward", "kl", "value_error"],
    "online": ["reward", "accuracy", "margin"],
    "classify": ["loss/label", "accuracy"],
    "delta": ["loss/logits"],
}
NAMES = {
    "nll": "loss (nats a token)", "pass@1": "validation pass@1", "entropy": "entropy (nats a token)",
    "margin": "margin (nats)", "chosen_logp": "log p of chosen answers", "good_ratio": "log-ratio of good answers",
    "bad_ratio": "log-ratio of bad answers", "point": "reference point (nats)", "loss/ranking": "loss (nats a pair)",
    "loss/label": "loss (nats a text)",
    "gap": "chosen less rejected score", "kl": "KL to the start (nats an answer)", "value_error": "squared error of the critic",
    "loss/logits": "squared logit difference",
}  # fmt: skip
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]


def rows_of(run: Path, stage: str) -> list[dict]:
    folders = json.loads((run / "recipe.json").read_text())["folders"]
    return [json.loads(line) for line in (run / folders[stage] / "metrics.jsonl").read_text().splitlines()]


def draw(figure_name: str, lines: dict[str, list[dict]]) -> None:
    """A figure with one line in each panel for each stage: lines[stage] is its metrics.jsonl."""
    panels = PANELS[figure_name]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 2.6), squeeze=False)
    for axis, name in zip(axes[0], panels, strict=True):
        for (stage, rows), colour in zip(lines.items(), COLOURS, strict=False):
            if name == "pass@1":
                draw_validation(axis, rows, name, colour)
            else:
                draw_line(axis, rows, name, colour, stage)
        axis.set_title(NAMES.get(name, name), fontsize=9)
        axis.set_xlabel("updates", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    CURVES.mkdir(exist_ok=True)
    figure.savefig(CURVES / f"{figure_name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def draw_line(axis: pyplot.Axes, rows: list[dict], name: str, colour: str, stage: str) -> None:
    """The values, faint, and their running mean."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    values = [value for _, value in points]
    axis.plot([step for step, _ in points], values, color=colour, alpha=0.25, linewidth=0.8)
    width = max(1, len(values) // 40)
    means = [fmean(values[max(0, at - width) : at + width + 1]) for at in range(len(values))]
    axis.plot([step for step, _ in points], means, color=colour, label=stage)


def draw_validation(axis: pyplot.Axes, rows: list[dict], name: str, colour: str) -> None:
    points = [(row["step"], row["validation"][name]) for row in rows if name in row.get("validation", {})]
    axis.plot([step for step, _ in points], [each["value"] for _, each in points], marker="o", color=colour)
    low, high = [each["low"] for _, each in points], [each["high"] for _, each in points]
    axis.fill_between([step for step, _ in points], low, high, alpha=0.2, color=colour)
    axis.set_ylim(0, 1)


def objective_of(settings: dict) -> str | None:
    if settings["kind"] == "delta":
        return "match_logits"
    return settings["objective"]["kind"] if settings["kind"] == "train" else None


def draw_run(run: Path) -> None:
    stages = json.loads((run / "recipe.json").read_text())["recipe"]["stages"]
    for figure_name, kinds in FIGURES[run.name].items():
        shown = [
            stage for stage, settings in stages.items()
            if objective_of(settings) in kinds and stage != "more"
        ]  # fmt: skip
        draw(figure_name, {stage: rows_of(run, stage) for stage in shown})


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        draw_run(run)
