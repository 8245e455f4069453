"""The models beside the policy: the reference, and the critic that is trained with it."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain import draws
from posttrain.batch import Sequences
from posttrain.models.actor_critic import ActorCritic, ValueHead
from posttrain.models.classifier import LoadedClassifier
from posttrain.models.lm import LM
from posttrain.models.load import Loaded, LoadedScalar, refuse_other_tokenizer
from posttrain.models.quantized import quantized
from posttrain.models.roles import Earlier, Frozen, Roles
from posttrain.models.source import ModelSource
from posttrain.text import RenderedRow
from posttrain.training.fit import Learner
from posttrain.training.settings import Critic, TrainSettings
from posttrain.tuners import tuned
from posttrain.tuners.load import load, load_scalar
from posttrain.tuners.tuner import refuse_quantized

AT_ONCE = 512  # rows that the reference is asked about at a time


def new_head(seed: int, deviation: float | None = None) -> Callable[[Tensor], Any]:
    """Fills the weights [C, D] of a new head, one after another, with draws of a deviation; by default 1 / sqrt(D + 1), for
    scores (arXiv 1909.08593)."""
    draw = draws.generator(seed, "score head")

    def fill(weight: Tensor) -> None:
        drawn = draw.standard_normal(weight.shape)
        weight.copy_(torch.from_numpy(drawn / (weight.shape[1] + 1) ** 0.5 if deviation is None else drawn * deviation))

    return fill


def frozen_roles(
    settings: TrainSettings,
    loaded: Loaded | LoadedScalar | LoadedClassifier,
    parameters: Mapping[str, nn.Parameter],
    say: Callable[[str], None] = lambda _line: None,
) -> Roles:
    """The reference is the model that the stage starts from: the policy with its tuner off, or its weights as they were; or
    another model, where the recipe names one."""
    lm, plan = loaded.lm, settings.reference
    micro_tokens = settings.batch.at_a_time(lm.device.type)
    roles = Roles(controls=settings.objective.controls(), micro_tokens=micro_tokens)
    if settings.teacher is not None:
        refuse_other_tokenizer("teacher", settings.teacher, loaded.tokenizer)
        roles.teacher = Frozen(load(settings.teacher).lm.requires_grad_(False), micro_tokens=micro_tokens)
    if "reference" not in settings.objective.needs or plan.cache:
        return roles
    assert isinstance(lm, LM)
    if plan.model is not None and not plan.model.same_weights(settings.model):
        roles.reference = Frozen(other_reference(plan.model, settings, loaded.tokenizer, say), micro_tokens=micro_tokens)
    elif plan.refresh is None and settings.tuner.reversible:
        roles.reference = Frozen(lm, lambda: settings.tuner.switched_off(lm.model), micro_tokens)
    else:
        if plan.refresh is None:
            roles.earlier = Earlier(parameters, rounded=lm.read_in_bfloat16())
        else:
            roles.earlier = Earlier(parameters, plan.refresh.every, plan.refresh.mix)
        roles.reference = Frozen(lm, roles.earlier.in_place, micro_tokens)
    return roles


def other_reference(source: ModelSource, settings: TrainSettings, tokenizer: Any, say: Callable[[str], None]) -> LM:
    """A reference that is not the stage's start, with a word about it. Raises ModelError where it reads other tokens."""
    refuse_other_tokenizer("reference", source, tokenizer)
    say(f"the reference is {source.path}, not the model that this stage starts from, {settings.model.path}")
    lm = load(source).lm
    lm.requires_grad_(False)
    return lm


def actor_critic(settings: TrainSettings, plan: Critic, lm: LM, tokenizer: Any, seed: int) -> tuple[ActorCritic, Learner]:
    """The policy with its critic, and what moves in the critic."""
    if plan.shared:
        head = ValueHead(lm)
        optim = plan.optim.of_tuner(plan.tuner.learning_rates)
        return ActorCritic(lm, head), Learner.of({f"critic.{name}": each for name, each in head.named_parameters()}, optim)
    source = plan.model or settings.model
    refuse_other_tokenizer("critic", source, tokenizer)
    critic = load_scalar(source, nn.init.zeros_).lm
    if quantized(critic.model):
        refuse_quantized(plan.tuner, f"the critic, {source.path}")
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(seed, "critic's tuner") % 2**63)
        plan.tuner.install(critic.model)
    critic.head.requires_grad_(True)
    parameters = {f"critic.{name}": each for name, each in tuned(critic.model).items()}
    return ActorCritic(lm, critic), Learner.of(parameters, plan.optim, plan.tuner)


def cached_references(
    settings: TrainSettings, folder: Path, lm: LM, tokenizer: Any, table: list[list[RenderedRow]], say: Callable[[str], None]
) -> list[Tensor]:
    """For each source [rows, columns], float64: what the reference says of each row's sequences, summed over each answer.

    Kept in `folder` under a name made from the reference's weights and the tokens: computed once for all stages that share
    both. Called before anything was trained.
    """
    from safetensors.torch import load_file, save_file

    source = settings.reference.model or settings.model
    digest = hashlib.sha256(f"{source.fingerprint()} {source.dtype}".encode())
    for index, rows in enumerate(table):
        for row in rows:
            digest.update(f"{index} {row.sequences}".encode())
    path = folder / f"reference-{digest.hexdigest()[:20]}.safetensors"
    if not path.is_file():
        other = not source.same_weights(settings.model)
        judge = other_reference(source, settings, tokenizer, say) if other else lm
        tuner = settings.tuner
        off = (lambda: tuner.switched_off(lm.model)) if tuner.reversible and not other else nullcontext
        reference = Frozen(judge, off, settings.batch.at_a_time(lm.device.type))
        found = {str(index): reference_sums(reference, rows) for index, rows in enumerate(table)}
        folder.mkdir(parents=True, exist_ok=True)
        staged = Path(f"{path}.tmp")
        save_file(found, staged)
        staged.replace(path)
    known = load_file(path)
    return [known[str(index)] for index in range(len(table))]


def reference_sums(reference: Frozen, rows: list[RenderedRow]) -> Tensor:
    """[rows, sequences of a row]: log p of each answer."""
    found = []
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        sides = [Sequences.of([row.sequences[side] for row in part]) for side in range(len(part[0].sequences))]
        found.append(torch.stack(reference.sums(*sides), dim=1))
    return torch.cat(found)
