"""The report of a run: one HTML file that needs no network and no script, and that a doubting reader can check.

Everything in it comes from the run's folder. Texts of models and data are untrusted: they reach the page only through the
template's escaping.
"""

import shlex
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from posttrain.evaluation.evaluate import RIGHT
from posttrain.pipeline.frontier import frontiers
from posttrain.pipeline.table import (
    HEADS,
    UNITS,
    Ran,
    Run,
    dig,
    interval_text,
    main_metric,
    metric_columns,
    number,
    plain,
    plural,
    read_run,
    seconds_text,
    section,
    value_text,
)  # fmt: skip
from posttrain.pipeline.tuning import panels
from posttrain.pipeline.verdict import cautions, comparable, listed, verdict

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN_ANSWERS = 12
SHOWN_STEPS, SHOWN_PER_STEP = 6, 2  # samples of a training
LONGEST = 3000  # characters of a text
YEAR_9999 = 2.5e11  # seconds; later ones are no times
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # would show a text in another order than it has
SIGNS = CONTROL | dict.fromkeys([*BIDI, *range(0xD800, 0xE000)], 0xFFFD)  # and halves of characters, which no file can hold


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run's folder. Raises InputError where the folder holds no run."""
    import jinja2

    run = read_run(Path(folder))
    trainings, notes = training_sections(run)
    groups = comparable(run)
    environment = jinja2.Environment(
        autoescape=True, finalize=visible, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
    )  # fmt: skip
    environment.filters["clip"] = clip
    page = environment.get_template(TEMPLATE.name).render(
        title=run.recipe.get("title") or run.name, name=run.name, verdict=verdict(run, groups),
        cautions=[*cautions(run), *run.notes, *notes], frontiers=frontier_plots(run), tuners=tuner_plots(run, groups),
        tables=[evaluation_table(run, group) for group in groups],
        pipeline=[stage_row(stage) for stage in run.stages.values()], trainings=trainings,
        answers=[answers for group in groups if (answers := side_by_side(run, group))], **provenance(run),
    )  # fmt: skip
    target = run.folder / "report.html"
    staged = target.with_name(target.name + ".tmp")
    staged.write_text(page, encoding="utf-8")
    staged.replace(target)
    return target


def frontier_plots(run: Run) -> list[Any]:
    """A picture for each set of evaluations that measured a score and a divergence."""
    from markupsafe import Markup

    from posttrain.pipeline.plots import frontier_svg

    return [Markup(frontier_svg(each, f"frontier {place}")) for place, each in enumerate(frontiers(run))]


def tuner_plots(run: Run, groups: Sequence[Sequence[Ran]]) -> list[Any]:
    """A picture for each figure of stages that differ in their tuner."""
    from markupsafe import Markup

    from posttrain.pipeline.plots import tuners_svg

    return [Markup(tuners_svg(each, f"tuners {place}")) for place, each in enumerate(panels(run, groups))]


def visible(value: Any) -> Any:
    """Every text on its way to the page: what would not be seen, or would change how other text is seen, becomes a sign."""
    return value.translate(SIGNS) if type(value) is str else value


def clip(text: Any) -> str:
    """A text of unknown length, its middle left out where it is very long."""
    text = "" if text is None else str(text)
    if len(text) <= LONGEST:
        return text.strip("\n")
    head, tail = text[: LONGEST * 2 // 3], text[-LONGEST // 3 :]
    return f"{head}\n[... {len(text) - len(head) - len(tail):,} characters left out ...]\n{tail}"


def evaluation_table(run: Run, group: Sequence[Ran]) -> dict[str, Any]:
    """The group's figures as texts, and the plot of the one that decides."""
    from markupsafe import Markup

    from posttrain.pipeline.plots import intervals_svg

    columns, metric = metric_columns(group), main_metric(group)
    having = [each for each in group if metric in each.figures]
    plan = group[0].settings.get("evaluation")
    samples, temperature = number(dig(plan, "samples")), number(dig(plan, "sampling", "temperature"))
    how = plural(int(samples), "sample") + " of each problem" if samples else ""
    how += f" at temperature {temperature:g}" if samples and temperature is not None else ""
    rows = []
    for stage in group:
        found = [(name, stage.figures.get(name)) for name in columns]
        cells = [("–", "") if each is None else (value_text(name, each.value), interval_text(name, each)) for name, each in found]
        rows.append({
            "name": stage.name, "model": source_text(stage.settings.get("model")), "cells": cells,
            "finished": stage.done is not None, "seconds": seconds_text(dig(stage.done, "seconds")),
        })  # fmt: skip
    names, drawn = [visible(run.label(each))[:30] for each in having], [each.figures[metric] for each in having if metric]
    plot = intervals_svg(names, drawn, visible(metric), group[0].name) if drawn else ""
    counts = sorted({each.count for each in drawn})
    against = {source_text(each.settings.get("kl_to")) for each in group if each.settings.get("kl_to")}
    return {
        "columns": [HEADS.get(name, name) for name in columns], "rows": rows, "plot": Markup(plot), "how": how,
        "problems": ", ".join(map(str, counts)), "units": UNITS[group[0].kind] + "s",
        "task": _asked(group[0]),
        "kl_to": listed(sorted(against)) if against else "",
    }  # fmt: skip


def stage_row(stage: Ran) -> dict[str, Any]:
    """What a stage used, what it did, and what that took."""
    done, settings = stage.done or {}, stage.settings
    row: dict[str, Any] = {
        "name": stage.name, "kind": stage.kind, "finished": stage.done is not None, "model": source_text(settings.get("model")),
        "cost": list(_cost(done)), "on": [], "how": [],
    }  # fmt: skip
    parameters = number(done.get("parameters"))
    if stage.kind == "train":
        trained = f" ({parameters:,.0f} parameters)" if parameters else ""
        row["what"] = f"{kind_text(settings.get('objective'))}; tuner {kind_text(settings.get('tuner'))}{trained}"
        row["on"], row["how"] = list(_learned_from(settings, done)), list(_how_long(stage))
    elif stage.kind in {"evaluate_pairs", "pairs"}:
        row["what"] = "scores of pairs" if stage.kind == "evaluate_pairs" else _made_pairs(settings, done)
        row["on"] = [_asked(stage)]
    elif stage.kind == "evaluate":
        row["what"] = "evaluation" + (f", KL to {source_text(settings['kl_to'])}" if settings.get("kl_to") else "")
        row["on"] = [task_text(settings.get("task"))]
    elif stage.kind in {"delta", "merge"}:
        row["what"] = "one bit a weight on its base" if stage.kind == "delta" else "adapters folded in"
        row["on"] = [_sources(settings["data"])] if settings.get("data") else []
    elif stage.kind in {"quantize", "prune"}:
        row["what"] = _made_smaller(stage.kind, settings, done)
        row["on"] = [_sources(settings["data"])] if settings.get("data") else []
    else:
        row["what"] = f"new model, {parameters:,.0f} parameters" if parameters else stage.kind
        row["on"] = [_sources(settings.get("data"))] if settings.get("data") else []
    return row


def _asked(stage: Ran) -> str:
    """What an evaluation is about: a task, or pairs of answers."""
    return task_text(stage.settings["task"]) if stage.settings.get("task") else _sources(stage.settings.get("data"))


def _made_pairs(settings: dict[str, Any], done: dict[str, Any]) -> str:
    pairs, agreement = number(done.get("pairs")), number(done.get("agreement"))
    made = f"{pairs:,.0f} pairs" if pairs is not None else "pairs"
    how = f" by {dig(settings, 'choice')}, grader {dig(settings, 'task', 'grader', 'kind')}"
    return made + how + (f"; the winner has the higher score in {agreement:.0%}" if agreement is not None else "")


def _made_smaller(kind: str, settings: dict[str, Any], done: dict[str, Any]) -> str:
    before, after = (number(dig(done, "bytes", each)) for each in ("before", "after"))
    kl = number(dig(done, "metrics", "kl", "value"))
    size = f"; {after / before:.0%} of its 16-bit size" if before and after is not None else ""
    return f"{kind}, method {kind_text(settings.get('method'))}{size}" + ("" if kl is None else f", KL {kl:.2g} nats a token")


def _cost(done: dict[str, Any]) -> Iterator[str]:
    seconds, wall, memory = (number(done.get(name)) for name in ("seconds", "wall_seconds", "peak_memory_mb"))
    if seconds is not None:
        yield seconds_text(seconds)
    if wall is not None and wall > 1.05 * (seconds or 0.0):
        yield f"{seconds_text(wall)} with loading, validation and saving"
    if memory is not None:
        yield "peak " + (f"{memory:,.0f} MB" if memory < 10_000 else f"{memory / 1024:,.1f} GB")


def _learned_from(settings: dict[str, Any], done: dict[str, Any]) -> Iterator[str]:
    if settings.get("data"):
        yield _sources(settings["data"])
        names = (("rows", "rows"), ("tokens", "tokens"), ("trained_tokens", "of them trained"))
        counts = [(number(dig(done, "data", name)), word) for name, word in names]
        if any(count is not None for count, _ in counts):
            yield ", ".join(f"{count:,.0f} {word}" for count, word in counts if count is not None)
    if settings.get("task"):
        problems, rollout = number(done.get("problems")), settings.get("rollout")
        yield task_text(settings["task"]) + (f": {problems:,.0f} problems" if problems is not None else "")
        yield f"rollouts of {dig(rollout, 'problems')} problems × {dig(rollout, 'per_problem')} samples"


def _how_long(stage: Ran) -> Iterator[str]:
    rows, _ = stage.lines("metrics.jsonl")
    steps = number(dig(stage.done, "steps"))
    tokens = sum(number(row.get("tokens")) or 0.0 for row in rows)
    settings, best = stage.settings, dig(stage.done, "best")
    seconds = settings.get("seconds")
    epochs, limit = number(settings.get("epochs")), number(dig(seconds, "of"))
    planned = f"{epochs:g} epochs" if epochs else f"{limit:g} s" if limit else ""
    planned = f"as long as stage {dig(seconds, 'stage')}" if dig(seconds, "stage") else planned
    count = plural(int(steps if steps is not None else len(rows)), "update")
    yield count + (f" ({planned})" if planned else "") + (f", {tokens:,.0f} tokens" if tokens else "")
    optim = settings.get("optim")
    rate = number(dig(stage.done, "learning_rate")) or number(dig(optim, "learning_rate"))
    if rate is not None:
        yield f"learning rate {plain(rate)}, {dig(optim, 'schedule')}"
    step, value = number(dig(best, "step")), number(dig(best, "value"))
    if step is not None:
        name = str(dig(settings, "validation", "best"))
        yield f"kept the weights of update {step:.0f}" + (f": {name} {value_text(name, value)}" if value is not None else "")
    if dig(stage.done, "stopped"):
        yield f"stopped: {dig(stage.done, 'stopped')}"


def kind_text(section: Any) -> str:
    """`lora, rank 16, alpha 32`: a component's kind and its settings; switches only where they are on."""
    if not isinstance(section, dict):
        return str(section or "–")
    given = {key: value for key, value in section.items() if key != "kind" and value not in (None, False)}
    return ", ".join([str(section.get("kind", "")), *(f"{key} {value}" for key, value in given.items())])


def source_text(model: Any) -> str:
    if not isinstance(model, dict):
        return str(model or "–")
    return f"stage {model['stage']}" if model.get("stage") else str(model.get("path") or "–")


def task_text(task: Any) -> str:
    limit = number(dig(task, "limit"))
    source = dig(task, "source")
    where = f": {_source(source)}" if source else ""
    return f"{dig(task, 'kind') or 'task'}{where}" + (f", the first {limit:,.0f}" if limit else "")


def _sources(data: Any) -> str:
    sources = dig(data, "sources")
    return " + ".join(map(_source, sources)) if isinstance(sources, list) else str(data)


def _source(source: Any) -> str:
    named = [str(dig(source, key)) for key in ("path", "name", "kind") if dig(source, key)]
    where = named[0] if named else str(source)
    return where.removeprefix("posttrain:data/") + (f" rows {source['rows']}" if dig(source, "rows") else "")


def training_sections(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """(curves and samples of each training, notes about lines that could not be read)."""
    from markupsafe import Markup

    from posttrain.pipeline.plots import curve_svg, curves

    sections, notes = [], []
    for stage in run.stages.values():
        rows, damaged = stage.lines("metrics.jsonl")
        samples, more = stage.lines("samples.jsonl")
        notes += damaged + more
        if not rows and not samples:
            continue
        drawn, constant = curves(rows)
        best = number(dig(stage.done, "best", "step"))
        plots = [
            {"title": each.title, "span": each.span, "svg": Markup(curve_svg(each, int(best) if best else None, stage.name))}
            for each in drawn
        ]
        sections.append({
            "name": stage.name, "plots": plots, "constant": constant, "best": best and int(best), "updates": f"{len(rows):,}",
            "noisy": any(each.noisy for each in drawn), "bands": any(each.bands for each in drawn),
            "samples": samples_over_time(samples),
        })  # fmt: skip
    return sections, notes


def samples_over_time(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few samples from the beginning to the end of a training, the first of their updates: not chosen by how good they are."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is not None:
            steps.setdefault(int(step), []).append(row)
    kept = sorted(steps)
    if len(kept) > SHOWN_STEPS:
        kept = [kept[round(place * (len(kept) - 1) / (SHOWN_STEPS - 1))] for place in range(SHOWN_STEPS)]
    return [
        {
            "step": step, "id": row.get("id"), "text": row.get("text"),
            **judged(row.get("score"), open_scale(rows), row.get("failure")),
        }
        for step in kept
        for row in steps[step][:SHOWN_PER_STEP]
    ]


def open_scale(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether scores are on a scale of their own, on which no answer is simply right."""
    return any(not 0 <= value <= 1 for row in rows if (value := number(row.get("score"))) is not None)


def judged(score: Any, open_scale: bool = False, failure: Any = None) -> dict[str, str]:
    """How an answer was judged: a mark, a word, and a class for its colour."""
    value = number(score)
    if value is None:
        return {"mark": "?", "word": f"not graded: {failure}" if failure else "not graded", "judged": "ungraded"}
    if open_scale:
        return {"mark": f"{value:.2f}", "word": "", "judged": "ungraded"}
    if value >= RIGHT:
        return {"mark": "✓", "word": "right", "judged": "right"}
    return {"mark": "✗", "word": "wrong" if value == 0 else f"wrong, score {value:.3g}", "judged": "wrong"}


def side_by_side(run: Run, group: Sequence[Ran]) -> dict[str, Any] | None:
    """What the evaluations of a group answered to the same problems; first, each kind in turn, what is judged differently."""
    answered = []
    for stage in group:
        first: dict[str, dict[str, Any]] = {}
        for row in stage.lines("answers.jsonl")[0]:
            first.setdefault(str(row.get("id")), row)
        if first:
            answered.append((stage, first))
    shared = [name for name in answered[0][1] if all(name in rows for _, rows in answered)] if answered else []
    if not shared:
        return None
    kinds: dict[tuple[str, ...], list[str]] = {}
    wide = open_scale(rows[name] for _, rows in answered for name in shared)
    for name in shared if not wide else ():
        kinds.setdefault(tuple(judged(rows[name].get("score"))["mark"] for _, rows in answered), []).append(name)
    order = sorted(kinds, key=lambda marks: (len(set(marks)) == 1, -len(kinds[marks])))
    unlike = [kinds[marks] for marks in order if len(set(marks)) > 1]
    alike = [kinds[marks] for marks in order if len(set(marks)) == 1]
    chosen = [name for part in (unlike, alike) for turn in zip_longest(*part) for name in turn if name is not None]
    chosen = shared if wide else chosen
    problems = []
    for name in chosen[:SHOWN_ANSWERS]:
        about = answered[0][1][name]
        given = [(run.label(stage), rows[name]) for stage, rows in answered]
        texts = [
            {"stage": label, "text": row.get("text"), "stop": row.get("stop"), **judged(row.get("score"), wide)}
            for label, row in given
        ]
        problems.append({"id": name, "prompt": about.get("prompt"), "answer": about.get("answer"), "texts": texts})
    greedy = dig(group[0].settings, "evaluation", "greedy") is not False
    return {
        "stages": [run.label(stage) for stage, _ in answered], "shared": len(shared), "unlike": sum(map(len, unlike)),
        "kinds": [(marks, len(kinds[marks])) for marks in order][:16], "greedy": greedy, "open": wide,
        "problems": problems,
    }  # fmt: skip


def provenance(run: Run) -> dict[str, Any]:
    """Where it all comes from, and how to have it again."""
    import yaml

    stages = list(run.stages.values())
    recipe = {key: value for key, value in run.recipe.items() if value is not None}
    versions: dict[str, list[str]] = {}
    marks: dict[str, str] = {}
    for stage in stages:
        for library, found in section(stage.about, "versions").items():
            if str(found) not in versions.setdefault(library, []):
                versions[library].append(str(found))
        found = section(stage.about, "facts", "fingerprints")
        marks |= {f"{name} (stage {stage.name})": str(mark) for name, mark in found.items()}
    said = Counter(str(dig(stage.about, "git")) for stage in stages if dig(stage.about, "git"))
    code = Counter(str(dig(stage.about, "facts", "code")) for stage in stages if dig(stage.about, "facts", "code"))
    logged = [number(dig(row, "time", "at")) for stage in stages for row in stage.lines("metrics.jsonl")[0]]
    times = [at for at in logged if at is not None and 0 <= at < YEAR_9999]
    return {
        "seed": run.recipe.get("seed"), "git": list(said), "code": list(code), "versions": versions, "fingerprints": marks,
        "keys": {stage.name: (str(stage.about.get("key", "–")), stage.folder.name) for stage in stages},
        "when": [time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at)) for at in (min(times), max(times))] if times else [],
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120),
        "command": f"posttrain run {shlex.quote(run.name + '.yaml')}",
    }  # fmt: skip
