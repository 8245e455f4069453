"""What a training starts with: the model under its tuner. Also for the process that samples for it, which makes the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain import draws
from posttrain.data.dataset import Loaded as LoadedRows
from posttrain.data.render import Template
from posttrain.models.classifier import LoadedClassifier
from posttrain.models.heads import head_parameters
from posttrain.models.lm import LM
from posttrain.models.load import Loaded, LoadedScalar
from posttrain.models.quantized import quantized
from posttrain.models.roles import Roles
from posttrain.objectives import Classify, OnPolicy
from posttrain.rl import Drawer
from posttrain.text import Problem
from posttrain.training.beginning import begin_from_rows
from posttrain.training.roles import new_head
from posttrain.training.settings import TrainSettings
from posttrain.tuners.load import load, load_classifier, load_scalar
from posttrain.tuners.tuner import refuse_quantized

CLASS_HEAD = 0.02  # deviation of a classifier's new head: all classes are about equally likely at the start


def starting_policy(
    settings: TrainSettings, folder: Path, seed: int, rows: LoadedRows | None = None, needs_chat: bool = False
) -> tuple[Any, Template]:
    """The loaded model with its tuner installed, and the template of its tokenizer."""
    loaded = starting_model(settings, seed)
    template = Template(loaded.tokenizer, settings.task is not None or settings.validation.task is not None or needs_chat)
    if quantized(loaded.lm.model):
        refuse_quantized(settings.tuner, str(settings.model.path))
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(seed, "tuner") % 2**63)
        settings.tuner.install(loaded.lm.model)
    if settings.tuner.reads_rows:
        begin_from_rows(settings, folder, seed, loaded.lm, template, rows)
    for parameter in head_parameters(loaded.lm.model).values():
        parameter.requires_grad_(True)  # under every tuner
    return loaded, template


def starting_model(settings: TrainSettings, seed: int) -> Loaded | LoadedScalar | LoadedClassifier:
    """A model of the sort that the objective trains; its head, where it has none, is drawn."""
    objective = settings.objective
    if isinstance(objective, Classify):
        return load_classifier(settings.model, new_head(seed, CLASS_HEAD), objective.classes, objective.new_head)
    return load_scalar(settings.model, new_head(seed)) if objective.scores else load(settings.model)


def drawer_of(
    settings: TrainSettings, policy: LM, template: Template, roles: Roles, problems: Sequence[Problem], seed: int
) -> Drawer:
    """What draws the stage's rollouts from a policy."""
    assert isinstance(settings.objective, OnPolicy)
    assert settings.task is not None
    return Drawer(
        settings.objective, problems, settings.task.grader, settings.sampler, settings.rollout, policy, template, roles, seed,
        settings.task.environment,
    )  # fmt: skip
