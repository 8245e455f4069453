"""Reward against divergence: what each method reaches at what distance from where it started."""

import json
from dataclasses import dataclass

from posttrain.evaluation import Figure
from posttrain.pipeline.table import Ran, Run, dig, figure_text, known, plural, section

NEAR = 10.0  # nats an answer: up to here two models are compared


@dataclass(frozen=True)
class Point:
    """An evaluation that measured both."""

    label: str
    series: str
    score: Figure
    kl: Figure


@dataclass(frozen=True)
class Frontier:
    """Evaluations on the same problems, by the method that made their models. `start`: of the model they are measured from."""

    points: tuple[Point, ...]
    start: Point | None
    stages: tuple[Ran, ...]

    @property
    def series(self) -> dict[str, list[Point]]:
        """The points of each method, from the nearest to the farthest."""
        found: dict[str, list[Point]] = {}
        for point in sorted(self.points, key=lambda each: each.kl.value):
            found.setdefault(point.series, []).append(point)
        return found

    def verdict(self) -> str:
        """The best that each method reaches within NEAR nats, beside the start."""
        if self.start is None:
            return ""
        told: dict[str, list[str]] = {}
        for name, points in self.series.items():
            near = [point for point in points if point.kl.value <= NEAR]
            if name == self.start.series or not near:
                continue
            best = max(near, key=lambda each: each.score.value)
            apart, above = touch(best.score, self.start.score) is False, best.score.value > self.start.score.value
            word = "not apart from it" if not apart else "above it" if above else "below it"
            said = f"{best.label} {figure_text('score', best.score)} at a KL of {best.kl.value:.1f}"
            told.setdefault(word, []).append(said)
        count = f"On {plural(self.start.score.count, 'problem')}, " if self.start.score.count else ""
        text = f"{count}{self.start.label} scores {figure_text('score', self.start.score)}. "
        found = "; ".join(f"{word}: {', '.join(said)}" for word, said in told.items())
        return f"{text}The best of each method within {NEAR:g} nats: {found}." if told else ""


def touch(one: Figure, other: Figure) -> bool | None:
    """Do the intervals touch? None where one of them is not known."""
    if not all(map(known, (one.low, one.high, other.low, other.high))):
        return None
    return one.low <= other.high and other.low <= one.high


def frontiers(run: Run) -> list[Frontier]:
    """Each group of at least three evaluations of score and KL that asked the same problems, and measured the KL to the same."""
    groups: dict[str, list[Ran]] = {}
    for stage in run.evaluations():
        if {"score", "kl"} <= stage.figures.keys() and all(known(stage.figures[name].value) for name in ("score", "kl")):
            marks = section(stage.about, "facts", "fingerprints")
            asked = [marks[name] for name in sorted(marks) if str(name).startswith("task ")] or stage.settings.get("task")
            groups.setdefault(json.dumps([asked, stage.settings.get("kl_to")], sort_keys=True, default=str), []).append(stage)
    return [_frontier(run, group) for group in groups.values() if len(group) >= 3]


def _frontier(run: Run, group: list[Ran]) -> Frontier:
    names = {id(stage): _series(stage, group) for stage in group}
    points = {
        id(stage): Point(_label(run, stage), names[id(stage)], stage.figures["score"], stage.figures["kl"]) for stage in group
    }
    own = [
        stage for stage in group
        if stage.settings.get("model") == stage.settings.get("kl_to") and not dig(stage.settings, "evaluation", "best_of")
    ]  # fmt: skip
    return Frontier(tuple(points.values()), points[id(own[0])] if own else None, tuple(group))


def _label(run: Run, stage: Ran) -> str:
    return stage.name if dig(stage.settings, "evaluation", "best_of") else run.label(stage)


def _series(stage: Ran, group: list[Ran]) -> str:
    """`dpo` of dpo_test-0.1, dpo_test-0.3, ...: what stands before the value that varies; alone, the stage's own name."""
    before, _, _ = stage.name.rpartition("-")
    alike = [each for each in group if before and each.name.rpartition("-")[0] == before]
    return (before if len(alike) > 1 else stage.name).removesuffix("_test")
