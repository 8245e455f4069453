"""The few lines that put a training together: model, tuner, data or samples, optimizer; and take them up where they were."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain import draws
from posttrain.batch import Sequences
from posttrain.data.dataset import Loaded, Rendered
from posttrain.data.render import Template
from posttrain.errors import DataError
from posttrain.evaluation import evaluate
from posttrain.models.lm import LM
from posttrain.models.load import load, save
from posttrain.models.roles import Frozen, Roles
from posttrain.objectives import OnPolicy
from posttrain.rl import OnPolicyStream
from posttrain.training.fit import Training, fit
from posttrain.training.record import INTERRUPTIONS, Recorder, Show
from posttrain.training.settings import TrainSettings
from posttrain.training.updates import RowUpdates, SampledUpdates, Updates
from posttrain.tuners import tuned

UNBOUNDED = 10**9  # steps of a run whose end is a time


@dataclass
class Session:
    """What a training needs from outside: where to write, who owns it, what stops it, whom to tell."""

    folder: Path
    owner: str
    seed: int = 0
    seconds: float | None = None
    show: Show = lambda _run, _metrics: None
    say: Callable[[str], None] = lambda _line: None
    interrupted: Callable[[], str | None] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)


def train(settings: TrainSettings, session: Session) -> dict[str, Any]:
    """Trains, and writes the model to `<folder>/model` (and an adapter to `<folder>/adapter`).

    Returns what the run's record keeps. A run that was interrupted returns {"interrupted": signal}, its state saved.
    """
    session.folder.mkdir(parents=True, exist_ok=True)
    loaded = load(settings.model)
    rows = [data.read() for data in (settings.data, settings.validation.data) if data is not None]
    chat = settings.task is not None or settings.validation.task is not None or any(each.needs_chat for each in rows)
    template = Template(loaded.tokenizer, chat)
    roles = frozen_roles(settings, loaded.lm)
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(session.seed, "tuner") % 2**63)
        settings.tuner.install(loaded.lm.model)
    parameters = tuned(loaded.lm.model)
    updates, steps = make_updates(settings, session, loaded.lm, template, roles, rows)
    micro_tokens = settings.batch.at_a_time(loaded.lm.device.type)
    run = Training(
        loaded.lm, parameters, settings.optim.build(parameters), settings.optim, updates, steps, micro_tokens, session.seconds
    )
    record = Recorder(
        session.folder, session.owner, settings.checkpoint, settings.validation if measures(settings) else None,
        validator(settings, session, template, rows), session.show, session.interrupted,
    )  # fmt: skip
    if record.resume(run):
        session.say(f"resumed from step {run.step}")
    for note in record.notes:
        session.say(f"skipped a damaged checkpoint: {note}")
    fit(run, record)
    if run.stopped in INTERRUPTIONS:
        return {"interrupted": run.stopped}
    if run.stopped:
        session.say(f"stopped at step {run.step}: {run.stopped}")
    export(settings, session, loaded.lm, template)
    trained = sum(parameter.numel() for parameter in parameters.values())
    return {
        "steps": run.step,
        "seconds": run.seconds,
        "stopped": run.stopped,
        "best": record.best,
        "parameters": trained,
        **session.facts,
    }


def frozen_roles(settings: TrainSettings, lm: LM) -> Roles:
    """The reference is the model that the stage starts from: the policy with its tuner off, or a frozen copy of it."""
    if "reference" not in settings.objective.needs:
        return Roles()
    if settings.tuner.reversible:
        return Roles(Frozen(lm, lambda: settings.tuner.switched_off(lm.model), settings.batch.at_a_time(lm.device.type)))
    twin = LM(copy.deepcopy(lm.model).requires_grad_(False), lm.layout, lm.mixed)
    return Roles(Frozen(twin, micro_tokens=settings.batch.at_a_time(lm.device.type)))


def make_updates(
    settings: TrainSettings, session: Session, lm: LM, template: Template, roles: Roles, rows: Sequence[Loaded]
) -> tuple[Updates, int]:
    """Where updates come from, and how many there will be."""
    objective = settings.objective
    if isinstance(objective, OnPolicy):
        assert settings.task is not None
        problems = settings.task.problems()
        session.facts["problems"] = len(problems)
        stream = OnPolicyStream(
            objective, problems, settings.task.grader, settings.sampler, settings.rollout, lm, template, roles, session.seed
        )
        return SampledUpdates(stream), settings.steps or UNBOUNDED
    assert settings.data is not None
    rendered = settings.data.render(rows[0], template)
    if lm.context is not None and rendered.longest > lm.context:
        raise DataError(
            f"the longest row has {rendered.longest} tokens, but the model's context is {lm.context}; "
            f"set data.max_tokens: {lm.context} (longer rows are then dropped and counted)"
        )
    for line in rendered.summary():
        session.say(line)
    session.facts["data"] = {"rows": rendered.usable, "tokens": rendered.tokens, "trained_tokens": rendered.trained}
    count = sum(map(len, rendered.rows))
    sources = zip(settings.data.sources, rendered.rows, strict=True)
    weights = [len(each) if source.weight is None else source.weight for source, each in sources]
    steps = settings.steps or (-int(-count * settings.epochs // settings.batch.rows) if settings.epochs else UNBOUNDED)
    return RowUpdates(objective, rendered, weights, settings.batch.rows, session.seed), steps


def measures(settings: TrainSettings) -> bool:
    return settings.validation.task is not None or settings.validation.data is not None


def validator(
    settings: TrainSettings, session: Session, template: Template, rows: Sequence[Loaded]
) -> Callable[[Training], dict[str, Any]]:
    """{metric: value, or a figure with its interval} of the policy as it is. The same draws at every validation."""
    plan = settings.validation
    rendered = plan.data.render(rows[-1], template) if plan.data is not None else None

    def validate(run: Training) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if plan.task is not None:
            report = evaluate(
                run.policy, template, plan.task, plan.evaluation, session.seed, settings.sampler, address=("validation",)
            )
            found |= report.as_dict()
        if rendered is not None:
            found["nll"] = held_out_nll(run.policy, rendered, run.micro_tokens)
        return found

    return validate


def held_out_nll(policy: LM, rendered: Rendered, micro_tokens: int) -> float:
    """-log p per trained token, over all rows."""
    rows = Sequences.of([row for source in rendered.rows for row in source])
    with torch.no_grad():
        return -float(policy.logprobs_of_many(rows, micro_tokens).double().sum()) / max(1, rows.trained)


def export(settings: TrainSettings, session: Session, lm: LM, template: Template) -> None:
    """The adapter alone, where the tuner has one; then the whole model, merged, as an ordinary transformers folder."""
    settings.tuner.save_adapter(lm.model, session.folder / "adapter", settings.model.path or "")
    settings.tuner.merge(lm.model)
    if lm.model.generation_config is not None:  # those who generate with the folder stop where our sampler stops
        lm.model.generation_config.eos_token_id = sorted(template.stop_ids)
    save(lm.model, template.tokenizer, session.folder / "model")
