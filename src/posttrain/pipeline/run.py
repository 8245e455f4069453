"""Running a recipe: each stage once, reused where nothing that decides it has changed, resumed where it was interrupted."""

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import InputError, RunError
from posttrain.pipeline import provenance
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.signals import Interrupted, signals
from posttrain.pipeline.stage import Context, references

DONE, RECORD = "done.json", "stage.json"
SHORT = 10  # letters of a key in a folder's name


@dataclass(frozen=True)
class Planned:
    """What will happen to a stage, and why."""

    name: str
    action: Literal["reuse", "resume", "run"]
    why: str
    folder: Path
    key: str
    facts: dict[str, Any]


def plan(recipe: Recipe, root: Path = Path("runs")) -> list[Planned]:
    """The stages in the order in which they run, each with its folder and what is to be done. Reads, writes nothing."""
    recipe.check()
    folder = root / recipe.name
    planned: dict[str, Planned] = {}
    for name in recipe.order():
        stage = recipe.stages[name]
        inputs = {other: planned[other].key for other in references(stage)}
        facts = provenance.identity(stage, recipe.seed, inputs)
        key = provenance.key_of(facts)
        place = folder / f"{name}-{key[:SHORT]}"
        action, why = _action(folder, name, place, facts)
        planned[name] = Planned(name, action, why, place, key, facts)
    return list(planned.values())


def _action(folder: Path, name: str, place: Path, facts: dict[str, Any]) -> tuple[Literal["reuse", "resume", "run"], str]:
    if (place / DONE).is_file():
        return "reuse", "nothing that decides it has changed"
    if place.is_dir():
        return "resume", "was interrupted"
    earlier = [each for each in folder.glob(f"{name}-{'?' * SHORT}") if (each / RECORD).is_file()]
    if not earlier:
        return "run", "has not been run"
    newest = max(earlier, key=lambda each: (each / RECORD).stat().st_mtime)
    return "run", provenance.difference(read_json(newest / RECORD)["facts"], facts)


@dataclass(frozen=True)
class Result:
    """A finished run: the record of each stage by name, and where everything lies."""

    name: str
    folder: Path
    stages: dict[str, dict[str, Any]]
    folders: dict[str, Path]

    def model(self, stage: str) -> Path:
        """The folder of the model that a stage made."""
        return self.folders[stage] / "model"


@dataclass
class Listener:
    """Whom a run tells what happens; every method may be replaced."""

    stage: Callable[[Planned], None] = lambda _planned: None
    say: Callable[[str], None] = lambda _line: None
    show: Callable[..., None] = lambda *_: None
    done: Callable[[Planned, dict[str, Any]], None] = lambda _planned, _record: None


def run(recipe: Recipe, root: Path | str = Path("runs"), listener: Listener | None = None) -> Result:
    """Runs a recipe. Raises InputError before anything is loaded, RunError for a run that fails, Interrupted on a signal."""
    root, listener = Path(root), listener or Listener()
    planned = plan(recipe, root)
    folder = root / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[str, Any]] = {}
    places = {each.name: each.folder for each in planned}
    about = {"recipe": recipe.model_dump(mode="json"), "folders": {name: place.name for name, place in places.items()}}
    with locked(folder), signals() as interrupted:
        write_json(folder / "recipe.json", about)
        for each in planned:
            if (signal_name := interrupted()) is not None:
                raise Interrupted(signal_name)
            listener.stage(each)
            if each.action == "reuse":
                records[each.name] = read_json(each.folder / DONE)
            else:
                context = Context(
                    each.name, each.folder, each.key, recipe.seed, places, records, listener.say, listener.show, interrupted
                )  # fmt: skip
                records[each.name] = _run_stage(recipe, each, context)
            listener.done(each, records[each.name])
        summary = {"recipe": recipe.name, "stages": {name: _summary(record) for name, record in records.items()}}
        write_json(folder / "summary.json", summary)
        write_json(folder / "recipe.json", about)
    return Result(recipe.name, folder, records, places)


def _run_stage(recipe: Recipe, each: Planned, context: Context) -> dict[str, Any]:
    each.folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "name": each.name, "recipe": recipe.name, "key": each.key, "facts": each.facts,
        "versions": provenance.versions(), "git": provenance.git_revision(),
    }  # fmt: skip
    if (each.folder / RECORD).is_file():
        before = read_json(each.folder / RECORD)["versions"]
        for library, now in about["versions"].items():
            if before.get(library) != now:
                context.say(f"{library} is {now}, the stage was begun with {before.get(library)}")
    write_json(each.folder / RECORD, about)
    began = time.perf_counter()
    reset_peak_memory()
    try:
        record = recipe.stages[each.name].run(context)
    except OSError as error:
        where = error.filename or each.folder
        raise RunError(f"{error.strerror or error}: {where}; mend this, then run the same command again to resume") from error
    record = {"seconds": 0.0, **record}
    record["wall_seconds"] = round(time.perf_counter() - began, 2)
    record["seconds"] = round(record["seconds"] or record["wall_seconds"], 2)
    record["peak_memory_mb"] = peak_memory_mb()
    write_json(each.folder / DONE, record)
    return record


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    """What a program wants of a stage."""
    wanted = ("metrics", "sizes", "bytes", "seconds", "peak_memory_mb", "steps", "best")
    return {"metrics": {}, **{key: record[key] for key in wanted if key in record}}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one run at a time in a folder. The lock goes with its process, also with a killed one."""
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InputError(
                f"{folder}: another run is working here (process {lock.read().strip() or 'unknown'}); wait for it"
            ) from None
        import os

        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def reset_peak_memory() -> None:
    """From here on the kernel counts this process's peak anew (Linux; elsewhere the peak of the whole process is given)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mb() -> float:
    try:
        status = Path("/proc/self/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError, ValueError):
        import resource

        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: is damaged ({error}); remove the folder {path.parent} to run this stage anew") from None


def write_json(path: Path, value: Any) -> None:
    """A file that is there whole or not at all."""
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    staged.replace(path)
