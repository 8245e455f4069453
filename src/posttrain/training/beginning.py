"""Tuners that begin from rows: they look at some of the stage's own, once, and what they found is kept beside the run."""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from posttrain import draws
from posttrain.batch import Sequences
from posttrain.data.dataset import Loaded
from posttrain.data.render import Template
from posttrain.data.stream import Stream
from posttrain.errors import DataError
from posttrain.models.backbone import Backbone
from posttrain.objectives import OnPolicy
from posttrain.text import Row
from posttrain.training.settings import TrainSettings

ROWS = 512  # that a tuner looks at
FILE = "beginning.safetensors"


def begin_from_rows(
    settings: TrainSettings, folder: Path, seed: int, lm: Backbone, template: Template, loaded: Loaded | None
) -> None:
    """Lets the tuner look at rows, unless the run has done so before it was interrupted, and begin from what it found."""
    path = folder / FILE
    if not path.is_file():
        found = settings.tuner.observe(lm, some_rows(settings, seed, lm, template, loaded))
        staged = path.with_name(f"{FILE}.tmp")
        save_file({name: each.contiguous() for name, each in found.items()}, staged)
        staged.replace(path)
    settings.tuner.begin(lm.model, load_file(path))


def some_rows(settings: TrainSettings, seed: int, lm: Backbone, template: Template, loaded: Loaded | None) -> Sequences:
    """Rows of the stage's data, from its sources as they are mixed; the prompts of its problems where it samples the answers.

    Raises DataError where none of them can be used.
    """
    if isinstance(settings.objective, OnPolicy):
        assert settings.task is not None
        problems = settings.task.problems()
        chosen = Stream([len(problems)], None, draws.key(seed, "tuner's rows")).take(min(ROWS, len(problems)))
        prompts = [template.prompt(problems[index].prompt) for _, index in chosen]
        return Sequences.of([(prompt, [False] * len(prompt)) for prompt in prompts])
    assert settings.data is not None
    assert loaded is not None
    weights = [source.weight for source in settings.data.sources if source.weight is not None]
    stream = Stream([len(each) for each in loaded.rows], weights or None, draws.key(seed, "tuner's rows"))
    drawn: list[list[Row]] = [[] for _ in loaded.rows]
    for source, index in stream.take(min(ROWS, loaded.usable)):
        drawn[source].append(loaded.rows[source][index])
    rendered = settings.data.render(replace(loaded, rows=drawn), template)
    if not rendered.sequences:
        raise DataError(f"none of {sum(map(len, drawn))} rows drawn of the data can be used: {'; '.join(rendered.dropped)}")
    rendered.refuse_beyond(lm.context)
    return Sequences.of(rendered.sequences)
