"""What the evaluations of a run show, in plain words, and what must be known before they are believed."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from posttrain.evaluation import Figure
from posttrain.pipeline.frontier import frontiers, touch
from posttrain.pipeline.table import (
    LOWER_IS_BETTER,
    UNITS,
    Ran,
    Run,
    dig,
    figure_text,
    interval_text,
    known,
    main_metric,
    number,
    plural,
    section,
    value_text,
)  # fmt: skip

TOUCH = {True: "the intervals touch", False: "the intervals do not touch", None: "without intervals"}


def comparable(run: Run) -> list[list[Ran]]:
    """The evaluations in groups that answered the same problems in the same way. Only within a group are figures compared."""
    groups: dict[str, list[Ran]] = {}
    for stage in run.evaluations():
        marks = section(stage.about, "facts", "fingerprints")
        asked: Any = [marks[name] for name in sorted(marks) if str(name).startswith(("task ", "data "))]
        asked = asked or stage.settings.get("task") or stage.settings.get("data")
        groups.setdefault(json.dumps([asked, stage.settings.get("evaluation")], sort_keys=True, default=str), []).append(stage)
    return list(groups.values())


def verdict(run: Run, groups: Sequence[Sequence[Ran]]) -> list[str]:
    """In plain words what the evaluations show, and no more than they show: a paragraph for each comparable group."""
    drawn = frontiers(run)
    shown = {id(each) for frontier in drawn for each in frontier.stages}
    told = [text for frontier in drawn if (text := frontier.verdict())]
    for group in groups:
        measured = [each for each in group if each.figures]
        if not measured or not all(id(each) in shown for each in measured):
            told += [text] if (text := _verdict(run, measured)) else []
    if told:
        return told
    if any(groups):
        return ["No evaluation of this run has given a figure yet, so nothing here says how good its models are."]
    return ["This run evaluates nothing: the curves below show how the training went, not how good the model is."]


def _verdict(run: Run, group: Sequence[Ran]) -> str:
    metric = main_metric(group)
    having = [each for each in group if metric in each.figures and known(each.figures[metric].value)]
    if metric is None or not having:
        return ""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    ranked = sorted(having, key=lambda each: sign * each.figures[metric].value)
    top, rest = ranked[0], ranked[1:]
    best = top.figures[metric]
    verbs = {
        "pass@1": "gets {} of its sampled answers right", "greedy": "gets {} of its likeliest answers right",
        "accuracy": "prefers the better answer in {}", "score": "scores {}", "nll": "needs {} nats a token",
    }  # fmt: skip
    verb = "labels {} of them rightly" if top.kind == "evaluate_classes" and metric == "accuracy" else verbs.get(metric)
    count = f"On {plural(best.count, UNITS[top.kind])}, " if best.count else ""
    text = f"{count}{run.label(top)} {(verb or metric + ' is {}').format(_with_interval(metric, best))}"
    if "longer_wins" in top.figures:
        baseline = top.figures["longer_wins"]
        words = TOUCH[touch(best, baseline)]
        text += f"; the better answer is merely the longer one in {figure_text('longer_wins', baseline)}: {words}"
        if not rest:
            return f"{text}."
    if not rest:
        return f"{text}. It is the only evaluation of its kind here: it does not show that training made the model better."
    told: dict[bool | None, list[str]] = {}
    for each in rest:
        other = each.figures[metric]
        told.setdefault(touch(best, other), []).append(f"{run.label(each)} {figure_text(metric, other)}")
    said = []
    if False in told:
        said.append(f"{listed(told[False])}: the intervals do not touch")
    if True in told:
        said.append(f"{listed(told[True])}: the intervals touch, so these figures do not show which of them is better")
    if None in told:
        said.append(f"{listed(told[None])}: without intervals, so nothing says whether the difference is chance")
    return f"{text}; {'; '.join(said)}.{_likeliest(run, top, group) if metric != 'greedy' else ''}"


def _likeliest(run: Run, top: Ran, group: Sequence[Ran]) -> str:
    """The greedy accuracy of the best model beside that of the model it was trained from: sampling can improve without it."""
    parents = [stage.name for stage in run.lineage(top)[1:]]
    before = next((each for name in parents for each in group if each.parent == name), None)
    if before is None or "greedy" not in top.figures or "greedy" not in before.figures:
        return ""
    now, then = top.figures["greedy"], before.figures["greedy"]
    words = TOUCH[touch(now, then)]
    figures = f"{run.label(top)} {figure_text('greedy', now)}, {run.label(before)} {figure_text('greedy', then)}"
    return f" By the likeliest answer instead of samples, {figures}: {words}."


def _with_interval(metric: str, each: Figure) -> str:
    interval = interval_text(metric, each)
    return value_text(metric, each.value) + (f" (95% interval {interval})" if interval else "")


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def cautions(run: Run) -> Iterator[str]:
    """What a reader must know before believing the figures."""
    for stage in run.stages.values():
        if stage.done is None:
            rows, _ = stage.lines("metrics.jsonl")
            yield f"{stage.name} has not finished" + (f": {plural(len(rows), 'update')} so far." if rows else ".")
        failures = number(dig(stage.done, "failures"))
        if failures:
            yield f"{stage.name}: {plural(int(failures), 'answer')} could not be graded and are in no accuracy."
    seen: dict[tuple[str, str], list[str]] = {}
    for group in comparable(run):
        for stage in group:
            yield from _worse(run, stage, group)
            for use in _seen(run, stage):
                seen.setdefault(use, []).append(stage.name)
    for (name, words), evaluations in seen.items():
        those = listed(evaluations)
        verb = "evaluates" if len(evaluations) == 1 else "evaluate"
        yield f"{name} {words} rows that {those} {verb} on: the figures of {those} may be too good."


def _worse(run: Run, stage: Ran, group: Sequence[Ran]) -> Iterator[str]:
    metric = main_metric(group)
    parents = [step.name for step in run.lineage(stage)[1:]]
    for before in group if stage.kind == "evaluate" else ():
        if metric in stage.figures and metric in before.figures and before.parent in parents:
            now, then = stage.figures[metric], before.figures[metric]
            if now.value < then.value and touch(now, then) is False:
                pair = f"{run.label(stage)} is worse than {run.label(before)}, from which it was trained"
                yield f"{pair} ({metric}: the intervals do not touch)."


def _seen(run: Run, stage: Ran) -> Iterator[tuple[str, str]]:
    """(stage, what it did) of those that were trained on what the evaluation asks, or chose their best weights by it. By file and
    rows, not by content."""
    asked = list(_slices({"task": stage.settings.get("task")}))
    for step in run.lineage(stage):
        validation = step.settings.get("validation")
        uses: list[tuple[str, Any]] = [("was trained on", {name: step.settings.get(name) for name in ("data", "task")})]
        uses += [("chose its best weights by", validation)] if dig(validation, "best") else []
        for words, part in uses:
            if any(one[0] == other[0] and one[1] < other[2] and other[1] < one[2] for one in asked for other in _slices(part)):
                yield step.name, words


def _slices(around: Any) -> Iterator[tuple[str, float, float]]:
    """(what is read, first row, end) of each source of rows in `around`'s data and of problems in its task."""
    for part in (dig(around, "data"), dig(around, "task")):
        sources = dig(part, "sources") or [dig(part, "source")]
        for source in sources if isinstance(sources, list) else []:
            if isinstance(source, dict):
                found, limit = re.fullmatch(r"(\d*):(\d*)", str(source.get("rows"))), number(dig(part, "limit"))
                first, last = (float(found[1] or 0), float(found[2] or "inf")) if found else (0.0, math.inf)
                kept = {key: value for key, value in source.items() if key not in {"rows", "weight"}}
                yield json.dumps(kept, sort_keys=True, default=str), first, last if limit is None else min(last, first + limit)
