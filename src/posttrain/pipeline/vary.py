"""`vary`: a stage once for each of several values of a setting, and with it every stage that uses it."""

import copy
import json
from typing import Any

from posttrain import yaml
from posttrain.errors import RecipeError
from posttrain.yaml import Document, Path_


def expand(document: Document) -> None:
    """Puts `dpo-0.1`, `dpo-0.3`, ... in the place of a stage `dpo` with `vary: {objective.beta: [0.1, 0.3, ...]}`.

    A stage that uses `dpo` becomes as many, each using its own. Raises RecipeError where `vary` is not understood.
    """
    stages = document.value.get("stages")
    if not isinstance(stages, dict):
        return
    marks: dict[str, list[str]] = {}  # stage: the endings of its copies
    for name in in_order(stages):
        varied = [other for other in used(stages[name]) if other in marks]
        own = stages[name].pop("vary", None) if isinstance(stages[name], dict) else None
        where = document.where(("stages", name, "vary"))
        if (own is not None and varied) or len({tuple(marks[other]) for other in varied}) > 1:
            raise RecipeError(
                f"{where}: stages.{name}: uses what varies already ({', '.join(varied)}); vary one setting at a time"
            )
        if own is not None:
            setting, values = _named_values(own, f"{where}: stages.{name}.vary")
            marks[name] = list(values)
            copies = {f"{name}-{mark}": _with(document, name, setting, value) for mark, value in values.items()}
        elif varied:
            marks[name] = marks[varied[0]]
            copies = {f"{name}-{mark}": _using(document, name, varied, mark) for mark in marks[name]}
        else:
            continue
        _replace(document, name, copies)


def in_order(stages: dict[str, Any]) -> list[str]:
    """The stages' names, those that are used before those that use them; circles are told elsewhere."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in done or name in path:
            return
        for other in used(stages[name]):
            if other in stages:
                visit(other, (*path, name))
        done.append(name)

    for name in stages:
        visit(name, ())
    return done


def used(value: Any) -> list[str]:
    """The names of stages that plain settings speak of."""
    if isinstance(value, dict):
        own = [value["stage"]] if isinstance(value.get("stage"), str) else []
        return own + [name for each in value.values() for name in used(each)]
    return [name for each in value for name in used(each)] if isinstance(value, list) else []


def _named_values(value: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The setting, and {ending of the copy's name: its value}: the value itself, or the kind of a component, or a name given."""
    if isinstance(value, dict) and len(value) == 1:
        ((setting, values),) = value.items()
        listed = values if isinstance(values, list) else []
        pairs = list(values.items()) if isinstance(values, dict) else [(each, each) for each in listed]
        named = {_ending(name): each for name, each in pairs}
        if len(named) == len(pairs) > 0 and "" not in named:
            return str(setting), named
    raise RecipeError(
        f"{where}: give one setting and a list of different plain values or kinds, such as {{objective.beta: [0.1, 0.3]}}, or"
        " names with values, such as {tuner: {small: {kind: lora, rank: 4}, large: {kind: lora, rank: 64}}}"
    )


def _ending(value: Any) -> str:
    """A plain value, or the kind of a component, as a part of a name; empty for anything else."""
    if isinstance(value, dict):
        value = value.get("kind", "")
    if not isinstance(value, str | int | float):
        return ""
    return "".join(sign if sign.isalnum() or sign in ".-_" else "_" for sign in str(value))


def _part(document: Document, name: str) -> Document:
    """A stage as a document of its own."""
    places = {path[2:]: place for path, place in document.places.items() if path[:2] == ("stages", name)}
    return Document(copy.deepcopy(document.value["stages"][name]), document.file, places)


def _with(document: Document, name: str, setting: str, value: Any) -> Document:
    part, place = _part(document, name), document.where(("stages", name, "vary"))
    before = dict(part.places)
    try:
        yaml.override(part, f"{setting}={json.dumps(value)}")
    except RecipeError as error:
        raise RecipeError(f"{place}: stages.{name}.vary: {error}") from None
    places = {path: there if before.get(path) == there else place for path, there in part.places.items()}
    return Document(part.value, part.file, places)


def _using(document: Document, name: str, varied: list[str], mark: str) -> Document:
    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            found = {key: renamed(each) for key, each in value.items()}
            return {**found, "stage": f"{found['stage']}-{mark}"} if found.get("stage") in varied else found
        return [renamed(each) for each in value] if isinstance(value, list) else value

    part = _part(document, name)
    return Document(renamed(part.value), part.file, part.places)


def _replace(document: Document, name: str, copies: dict[str, Document]) -> None:
    """The copies take the stage's place, in the order of the recipe."""
    stages: dict[str, Any] = {}
    for other, value in document.value["stages"].items():
        if other != name:
            stages[other] = value
            continue
        for new, part in copies.items():
            if new in document.value["stages"]:
                raise RecipeError(
                    f"{document.where(('stages', name))}: stages.{name}: there is a stage {new!r} already; rename one"
                )
            stages[new] = part.value
            moved: dict[Path_, str] = {("stages", new, *path): place for path, place in part.places.items()}
            document.places.update(moved)
    document.value["stages"] = stages
