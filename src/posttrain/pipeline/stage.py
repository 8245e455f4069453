"""A stage of a recipe: something with inputs and a folder, that is run once and then reused."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel

from posttrain.component import Component
from posttrain.data.dataset import Data
from posttrain.data.format import detect
from posttrain.data.source import File, StageRows
from posttrain.errors import RecipeError
from posttrain.models.source import ModelSource
from posttrain.paths import resolve
from posttrain.pipeline.signals import Interrupted as Interrupted
from posttrain.tasks import Grader, Task

Metrics = dict[str, Any]
Section = TypeVar("Section", bound=BaseModel)
ROWS = "rows.jsonl"  # what a stage that makes rows writes


@dataclass
class Context:
    """What a stage is given: its folder, the folders of the stages it uses, and how to talk."""

    name: str
    folder: Path
    key: str
    seed: int
    stages: dict[str, Path]
    records: dict[str, Metrics]
    say: Callable[[str], None] = lambda _line: None
    show: Callable[..., None] = lambda *_: None
    interrupted: Callable[[], str | None] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)

    def resolved(self, settings: Section) -> Section:
        """The settings with what other stages have made put where they name those stages, however deep inside."""
        if isinstance(settings, ModelSource) and settings.stage is not None:
            return settings.model_copy(update={"stage": None, "path": str(self.stages[settings.stage] / "model")})
        if isinstance(settings, StageRows):
            return File(path=str(self.stages[settings.stage] / ROWS), rows=settings.rows, weight=settings.weight)  # type: ignore[return-value]
        if isinstance(settings, Grader):
            settings = settings.model_copy()  # what it loads goes with the stage
        changed = {name: self._within(getattr(settings, name)) for name in type(settings).model_fields}
        changed = {name: value for name, value in changed.items() if value is not getattr(settings, name)}
        return settings.model_copy(update=changed) if changed else settings

    def _within(self, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return self.resolved(value)
        if isinstance(value, dict):
            found = {key: self._within(each) for key, each in value.items()}
            return found if any(found[key] is not value[key] for key in value) else value
        if isinstance(value, list):
            each = [self._within(one) for one in value]
            return each if any(new is not old for new, old in zip(each, value, strict=True)) else value
        return value


class Stage(Component):
    """A step of a pipeline."""

    default_kind = "train"
    makes_model: ClassVar[bool] = False
    """Whether other stages can use its model."""
    makes_rows: ClassVar[bool] = False
    """Whether other stages can learn from its rows."""

    def check(self) -> None:
        """Refuses, before anything heavy is loaded, what can be known from files and settings."""

    def run(self, context: Context) -> Metrics:
        """Does the work and returns the stage's record: `metrics` and whatever the report shows."""
        raise NotImplementedError


def parts(settings: BaseModel) -> Iterator[BaseModel]:
    """The section and every section inside it."""
    yield settings
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for each in value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]:
            if isinstance(each, BaseModel):
                yield from parts(each)


def refuse_other_rows(data: Data, wanted: Collection[str], what: str) -> None:
    """Raises RecipeError where the first row of a source is of a format that makes none of the wanted rows."""
    for source in data.sources:
        first = source.first()
        if first is not None and (data.format or detect(first)).makes.isdisjoint(wanted):
            raise RecipeError(f"{first.where}: {what}")


def references(stage: Stage) -> list[str]:
    """The stages that this one uses, in the order in which it names them."""
    names = [getattr(part, "stage", None) for part in parts(stage)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def fingerprints(stage: Stage) -> dict[str, str]:
    """What lies outside of the recipe and decides the result: models, data, problems."""
    found: dict[str, str] = {}
    for part in parts(stage):
        if isinstance(part, ModelSource) and part.chat_template is not None:
            content = resolve(part.chat_template).read_bytes()
            found[f"chat template {part.chat_template}"] = hashlib.sha256(content).hexdigest()
        if isinstance(part, ModelSource) and part.path is not None:
            found[f"model {part.path}"] = part.fingerprint()
        elif isinstance(part, Data):  # the rows of another stage are known by that stage's key
            files = [source for source in part.sources if not isinstance(source, StageRows)]
            if files:
                known = part.model_copy(update={"sources": files})
                found[f"data {', '.join(source.label() for source in files)}"] = known.fingerprint()
        elif isinstance(part, Task) and not isinstance(part.source, StageRows):
            found[f"task {part.source.label()}"] = part.fingerprint()
    return found
