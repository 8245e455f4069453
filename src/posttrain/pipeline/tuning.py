"""Tuners side by side: what each reaches, and what the model forgets, against how many parameters move."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.evaluation import Figure
from posttrain.pipeline.table import Ran, Run, known, main_metric, number

FEWEST = 3  # stages that differ in their tuner, from which on a picture says more than a table


@dataclass(frozen=True)
class Panel:
    """One figure of stages that differ in their tuner: (name, parameters that move, figure). `start`: of what all began from."""

    metric: str
    points: tuple[tuple[str, float, Figure], ...]
    start: Figure | None


def panels(run: Run, groups: Iterable[Sequence[Ran]]) -> list[Panel]:
    """A panel for each group of comparable evaluations of at least three stages that differ in their tuner and began alike."""
    found = [_panel(run, group) for group in groups]
    return [each for each in found if each is not None]


def _panel(run: Run, group: Sequence[Ran]) -> Panel | None:
    metric = main_metric(group)
    trained: list[tuple[Ran, Ran, float]] = []
    for evaluation in group:
        stage = run.stages.get(evaluation.parent or "")
        moved = number(stage.done.get("parameters")) if stage is not None and stage.done else None
        if stage is not None and moved and metric in evaluation.figures and known(evaluation.figures[metric].value):
            trained.append((evaluation, stage, moved))
    starts: list[Any] = [stage.settings.get("model") for _, stage, _ in trained]
    tuners = [repr(stage.settings.get("tuner")) for _, stage, _ in trained]
    if metric is None or len(set(tuners)) < FEWEST or any(start != starts[0] for start in starts):
        return None
    names = _short([stage.name for _, stage, _ in trained])
    points = [(name, moved, each.figures[metric]) for name, (each, _, moved) in zip(names, trained, strict=True)]
    began = [each.figures[metric] for each in group if each.settings.get("model") == starts[0] and metric in each.figures]
    return Panel(metric, tuple(sorted(points, key=lambda point: point[1])), began[0] if began else None)


def _short(names: list[str]) -> list[str]:
    """`lora` of tune-lora, tune-ia3, ...: what stands behind the part that all share."""
    heads = {name.partition("-")[0] for name in names}
    return [name.partition("-")[2] for name in names] if len(heads) == 1 and all("-" in name for name in names) else names
