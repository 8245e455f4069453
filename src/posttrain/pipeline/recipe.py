"""A recipe: one stage, or named stages that use each other's results. Everything wrong with it is said with file and line."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from posttrain import yaml
from posttrain.component import Component, Settings, did_you_mean
from posttrain.data.source import StageRows
from posttrain.errors import InputError, RecipeError
from posttrain.models.source import ModelSource
from posttrain.pipeline import classes as classes  # whose stage is registered with it
from posttrain.pipeline.compression import MakeDelta
from posttrain.pipeline.merge import Merge
from posttrain.pipeline.prune import Prune
from posttrain.pipeline.quantize import Quantize
from posttrain.pipeline.stage import Stage, parts, references
from posttrain.pipeline.stages import Create, Evaluate, Train
from posttrain.pipeline.vary import expand

__all__ = ["Create", "Evaluate", "MakeDelta", "Merge", "Prune", "Quantize", "Recipe", "Train"]

GLOBAL = ("name", "seed", "title", "report")


class Recipe(Settings):
    """A pipeline: what is run, in what order, under which seed."""

    name: str = Field(default="", pattern=r"^[\w.-]*$")
    """The name of the run; its results go to runs/<name>. By default the recipe file's name."""
    title: str = ""
    """A line for the report."""
    seed: int = Field(default=0, ge=0)
    """Decides every random draw."""
    stages: dict[str, Stage] = Field(min_length=1)
    """The stages by name. A recipe without this section is one training stage."""

    @field_validator("stages")
    @classmethod
    def _plain_names(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        for name in stages:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"stage name {name!r}: use letters, digits, dots, - and _")
        return stages

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        """Refuses references to stages that do not exist, and circles."""
        for name, stage in self.stages.items():
            for other in references(stage):
                if other not in self.stages:
                    raise ValueError(
                        f"stage {name!r} uses stage {other!r}, which does not exist{did_you_mean(other, self.stages)}"
                    )
        self.order()
        for name, stage in self.stages.items():
            for part in parts(stage):
                if isinstance(part, ModelSource) and part.stage is not None and not self.stages[part.stage].makes_model:
                    other = self.stages[part.stage].kind
                    raise ValueError(
                        f"stage {name!r} wants the model of stage {part.stage!r}, but a stage of kind {other} makes none"
                    )
                if isinstance(part, StageRows) and not self.stages[part.stage].makes_rows:
                    other = self.stages[part.stage].kind
                    raise ValueError(
                        f"stage {name!r} wants the rows of stage {part.stage!r}, but a stage of kind {other} makes none"
                    )
        return self

    def order(self) -> list[str]:
        """The stages' names such that each comes after those that it uses, else as written."""
        done: list[str] = []

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise ValueError(f"the stages {' -> '.join((*path[path.index(name) :], name))} use each other in a circle")
            if name not in done:
                for other in references(self.stages[name]):
                    visit(other, (*path, name))
                done.append(name)

        for name in self.stages:
            visit(name, ())
        return done

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a recipe file and applies `key=value` overrides. Raises RecipeError with a line for everything that is wrong.

        The recipe's folder is searched for modules, so that `kind: my_file:MyClass` finds the file beside it.
        """
        find_modules(Path(path).resolve().parent)
        return cls.of(yaml.load(path), overrides, Path(path).stem)

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), name: str = "recipe") -> Self:
        """A recipe from YAML text."""
        return cls.of(yaml.parse(text, name), overrides, name)

    @classmethod
    def of(cls, document: yaml.Document, overrides: Sequence[str], name: str) -> Self:
        for setting in overrides:
            yaml.override(document, setting)
        expand(document)
        value, single = document.value, "stages" not in document.value
        if single:  # one stage, written without the section
            stage = {key: each for key, each in value.items() if key not in GLOBAL}
            kind = stage.get("kind", "train")
            kind = kind if isinstance(kind, str) and kind.isidentifier() else "train"
            value = {**{key: each for key, each in value.items() if key in GLOBAL}, "stages": {kind: stage}}
        recipe = built(cls, value, document, single)
        return recipe if recipe.name else recipe.model_copy(update={"name": name})

    def check(self) -> None:
        """Refuses what can be known from files, before anything heavy is imported. Raises InputError with the stage's name."""
        for name, stage in self.stages.items():
            try:
                stage.check()
            except InputError as error:
                raise type(error)(f"stage {name}: {error}") from None


Section = TypeVar("Section", bound=Settings)


def built(section: type[Section], value: dict[str, Any], document: yaml.Document, single: bool = False) -> Section:
    """A section from plain values. Raises RecipeError with a line for everything that is wrong."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        lines = [explain(each, document, value, single, section) for each in error.errors(include_url=False)]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def explain(error: ErrorDetails, document: yaml.Document, value: dict[str, Any], single: bool, root: type[Settings]) -> str:
    """One line for people: where, which setting, what is wrong, and what to do."""
    loc = tuple(part for part in error["loc"])
    shown = loc[2:] if single and loc[:1] == ("stages",) else loc
    where, path = document.where(shown), ".".join(map(str, shown)) or "recipe"
    if error["type"] == "extra_forbidden":
        section = section_at(root, value, loc[:-1])
        known = [*section.model_fields, *(["kind"] if issubclass(section, Component) else [])] if section else []
        return f"{where}: {path}: no such setting{did_you_mean(str(loc[-1]), known)}"
    if error["type"] == "missing":
        return f"{where}: {path}: is missing; this setting must be given"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] not in {"value_error", "missing"}:
        message = f"{message[0].lower()}{message[1:]}, found {error['input']!r}"
    return f"{where}: {path}: {message}"


def section_at(section: Any, value: Any, loc: tuple[int | str, ...]) -> type[Settings] | None:
    """The class of the section at `loc`, with kinds resolved by what the recipe says there."""
    if isinstance(section, type) and issubclass(section, Component) and section.is_family():
        kind = value.get("kind", section.default_kind) if isinstance(value, dict) else value
        try:
            section = section.lookup(kind)
        except ValueError:
            return None
    if isinstance(section, type) and issubclass(section, Settings):
        if not loc:
            return section
        field = section.model_fields.get(str(loc[0]))
        return None if field is None else section_at(field.annotation, inside(value, loc[0]), loc[1:])
    options = [option for option in getattr(section, "__args__", ()) if option not in (str, type(None))]
    if getattr(section, "__origin__", None) not in (list, dict):  # ... | None
        return next((found for option in options if (found := section_at(option, value, loc))), None)
    return section_at(options[-1], inside(value, loc[0]), loc[1:]) if loc else None


def inside(value: Any, part: int | str) -> Any:
    """What a recipe says at a key or index; an empty section where it says nothing."""
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return {}


def find_modules(folder: Path) -> None:
    """Lets modules of the user's own, which a recipe names, be found in a folder."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
