"""What a run's folder says, and the table of its evaluations. Unfinished stages and damaged files are said, not fatal."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import InputError
from posttrain.evaluation import Figure

NAN = math.nan
LARGEST = 1e300  # an integer of a damaged file may be larger than any float
UNITS = {  # that evaluations count
    "evaluate": "problem", "evaluate_pairs": "pair", "evaluate_text": "text", "evaluate_classes": "text",
}  # fmt: skip
LOWER_IS_BETTER = {"nll", "perplexity", "loss", "absolute_error"}
SHARES = {"greedy", "ended", "accuracy", "longer_wins", "calibration_error", "f1", "f1_macro", "f1_micro"}
HEADS = {
    "kl": "KL", "longer_wins": "longer wins", "calibration_error": "calibration", "log_length_correlation": "length corr.",
    "f1": "F1", "f1_macro": "macro F1", "f1_micro": "micro F1", "absolute_error": "abs. error",
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """A stage as its folder tells it. `done` is None until the stage has finished."""

    name: str
    folder: Path
    about: dict[str, Any]
    done: dict[str, Any] | None
    settings: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.settings.get("kind", "train"))

    @property
    def parent(self) -> str | None:
        """The stage whose model it starts from, or evaluates."""
        stage = dig(self.settings, "model", "stage")
        return stage if isinstance(stage, str) else None

    @property
    def figures(self) -> dict[str, Figure]:
        found = {name: figure(value) for name, value in section(self.done, "metrics").items()}
        return {name: each for name, each in found.items() if each is not None}

    def lines(self, name: str) -> tuple[list[dict[str, Any]], list[str]]:
        """(rows, notes) of a JSONL file; a line that is damaged is left out with a note, a missing file has no rows."""
        try:
            raw = (self.folder / name).read_bytes()
        except OSError:
            return [], []
        rows, damaged = [], []
        for number, line in enumerate(raw.splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                damaged.append(str(number))
        if not damaged:
            return rows, []
        shown = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        return rows, [f"{self.name}: {name}: {plural(len(damaged), 'damaged line')} left out (line {shown})"]


@dataclass(frozen=True)
class Run:
    """A run's folder: the recipe, its stages in order, and what could not be read."""

    folder: Path
    recipe: dict[str, Any]
    stages: dict[str, Ran]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.name)

    def evaluations(self) -> list[Ran]:
        return [stage for stage in self.stages.values() if stage.kind in UNITS]

    def label(self, evaluation: Ran) -> str:
        """The stage whose model was evaluated, where that is unmistakable; else the evaluation's own name."""
        alike = [each for each in self.evaluations() if each.parent == evaluation.parent]
        return evaluation.parent if evaluation.parent is not None and len(alike) == 1 else evaluation.name

    def lineage(self, stage: Ran) -> list[Ran]:
        """The stages whose models led to this one's, the nearest first."""
        found: list[Ran] = []
        while stage.parent in self.stages and self.stages[stage.parent] not in found:
            stage = self.stages[stage.parent]
            found.append(stage)
        return found


def dig(value: Any, *path: str) -> Any:
    """The value at a path of keys, None where the path ends early."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def section(value: Any, *path: str) -> dict[str, Any]:
    """The mapping at a path of keys, empty where there is none."""
    found = dig(value, *path)
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, else None: NaN, infinities, nulls and texts are no numbers to show."""
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if plain else None


def figure(value: Any) -> Figure | None:
    """A figure from a record: {"value", "low", "high", "count"} or a plain number. Parts that are no number become NaN."""
    if not isinstance(value, dict):
        plain = number(value)
        return None if plain is None else Figure(plain, NAN, NAN, 0)
    parts = [number(value.get(part)) for part in ("value", "low", "high")]
    low_value, low, high = (NAN if part is None else part for part in parts)
    return Figure(low_value, low, high, int(number(value.get("count")) or 0))


def read_run(folder: Path) -> Run:
    """Raises InputError where nothing in the folder is a stage of a run."""
    folder = Path(folder)
    notes: list[str] = []
    index = _json(folder / "recipe.json", notes)
    recipe, places = dig(index, "recipe"), dig(index, "folders")
    if isinstance(recipe, dict) and isinstance(places, dict):
        wanted = {str(name): folder / Path(str(place)).name for name, place in places.items()}
        ended = (folder / "recipe.json").stat().st_mtime
        later = {path.parent for path in folder.glob("*/stage.json") if path.stat().st_mtime > ended} - set(wanted.values())
        notes += [f"{place.name}: was begun after this run had ended and is not in this report." for place in sorted(later)]
    else:  # the run did not come to its end: its stages say what it was
        recipe, wanted = {}, _newest(folder, notes)
    stages: dict[str, Ran] = {}
    for name, place in wanted.items():
        about = _json(place / "stage.json", notes) or {}
        settings = section(about, "facts", "settings") or section(recipe, "stages", name)
        stages[name] = Ran(name, place, about, _json(place / "done.json", notes), settings)
    if not stages:
        raise InputError(f"{folder}: holds no run: no recipe.json and no stage's folder; name a folder such as runs/quickstart")
    if not recipe:
        first = next(iter(stages.values())).about
        recipe = {"name": first.get("recipe"), "seed": dig(first, "facts", "seed")}
        recipe["stages"] = {name: stage.settings for name, stage in stages.items()}
        notes.insert(0, "The run has not come to its end: this report shows the stages that were begun.")
    return Run(folder, recipe, stages, notes)


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except OSError:
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.parent.name}/{path.name}: is damaged and was left out")
        return None
    return value


def _newest(folder: Path, notes: list[str]) -> dict[str, Path]:
    """{stage: its newest folder}, each stage after those that it uses."""
    files = sorted(folder.glob("*/stage.json"), key=lambda path: (path.stat().st_mtime, path.parent.name))
    begun = {str(about["name"]): (path.parent, about) for path in files if (about := _json(path, notes)) and "name" in about}
    ordered: dict[str, Path] = {}

    def visit(name: str, seen: tuple[str, ...]) -> None:
        place, about = begun[name]
        for other in section(about, "facts", "inputs"):
            if other in begun and other not in seen:
                visit(other, (*seen, name))
        ordered.setdefault(name, place)

    for name in begun:
        visit(name, (name,))
    return ordered


def is_share(name: str) -> bool:
    """Is the metric a share, shown in percent?"""
    return name.startswith("pass@") or name in SHARES


def known(value: float) -> bool:
    return math.isfinite(value)


def amount(value: float) -> str:
    """A number with as many digits as say something: 0.003, 2.35, 23.9, 1,204."""
    size = round(abs(value), 3)
    text = f"{value:.3f}" if size < 1 else f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def plain(value: float, digits: int = 3) -> str:
    """A setting or a small number: 0.001, 2e-5."""
    return re.sub(r"e([+-])0", r"e\1", f"{value:.{digits}g}")


def value_text(name: str, value: float) -> str:
    if not known(value):
        return "n/a"
    return f"{100 * value:.1f}%" if is_share(name) else amount(value)


def interval_text(name: str, each: Figure) -> str:
    """`59.0 to 63.3`, empty where there is no interval."""
    if not (known(each.value) and known(each.low) and known(each.high)):
        return ""
    return " to ".join(f"{100 * end:.1f}" if is_share(name) else amount(end) for end in (each.low, each.high))


def figure_text(name: str, each: Figure) -> str:
    """`61.2% (59.0 to 63.3)`."""
    interval = interval_text(name, each)
    return value_text(name, each.value) + (f" ({interval})" if interval else "")


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def seconds_text(value: Any) -> str:
    seconds = number(value)
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main_metric(evaluations: Sequence[Ran]) -> str | None:
    """The figure that decides: pass@1, else the score of samples, else greedy, else the first that there is."""
    found = list(dict.fromkeys(name for each in evaluations for name in each.figures))
    return next((name for name in ("pass@1", "score", "greedy", *found) if name in found), None)


def metric_columns(evaluations: Sequence[Ran]) -> list[str]:
    """The metrics that any of them has, in the order of the table. A score that is pass@1 again is left out."""
    found = list(dict.fromkeys(name for each in evaluations for name in each.figures))
    if all(_same(each.figures.get("score"), each.figures.get("pass@1")) for each in evaluations):
        found = [name for name in found if name != "score"]
    deep = sorted((name for name in found if name.startswith("pass@") and name != "pass@1"), key=lambda name: (len(name), name))
    order = ["pass@1", "greedy", *deep, "score", "length", "ended", "kl"]
    return [name for name in order if name in found] + [name for name in found if name not in order]


def _same(score: Figure | None, right: Figure | None) -> bool:
    if score is None or right is None:
        return score is None
    return score.value == right.value or not (known(score.value) or known(right.value))


def summary_table(folder: Path) -> list[dict[str, str]]:
    """The finished evaluations as rows of text, for the terminal. Every row has the same columns: those that any of them has.

    `seconds` are the evaluation's own, `trained` those of the training stage whose model it is.
    """
    run = read_run(folder)
    rows = [stage for stage in run.evaluations() if stage.figures]
    columns = [name for name in metric_columns(rows) if name != "ended"]
    trained = {stage.name: _training_seconds(run, stage) for stage in rows}
    table = []
    for stage in rows:
        row = {"stage": stage.name}
        for name in columns:
            each = stage.figures.get(name)
            shown = figure_text if name in {"pass@1", "greedy"} else lambda name, each: value_text(name, each.value)
            row[HEADS.get(name, name)] = "–" if each is None else shown(name, each)
        row["seconds"] = _seconds(dig(stage.done, "seconds"))
        if any(seconds is not None for seconds in trained.values()):
            row["trained"] = _seconds(trained[stage.name])
        table.append(row)
    return table


def _training_seconds(run: Run, evaluation: Ran) -> float | None:
    stage = run.stages.get(evaluation.parent or "")
    return number(dig(stage.done, "seconds")) if stage is not None and stage.kind == "train" else None


def _seconds(value: Any) -> str:
    seconds = number(value)
    return "–" if seconds is None else f"{seconds:.1f}"
