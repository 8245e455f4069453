"""The few lines that put a training together: model, tuner, data or samples, optimizer; and take them up where they were."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain import batch as batches
from posttrain import draws
from posttrain.batch import Sequences
from posttrain.data.dataset import Data, Loaded, Rendered
from posttrain.data.render import Template
from posttrain.evaluation import evaluate
from posttrain.evaluation.audit import holes_of
from posttrain.models.linears import left_out
from posttrain.models.lm import LM
from posttrain.models.load import save
from posttrain.models.products import bfloat16_is_slow
from posttrain.models.reward import normalise, save_reward_model
from posttrain.models.roles import Roles
from posttrain.models.scalar import ScalarLM
from posttrain.models.source import ModelSource
from posttrain.objectives import Objective, OnPolicy, RewardObjective
from posttrain.rl import OnPolicyStream, Source
from posttrain.rl.behind import Behind
from posttrain.sampling import ProcessSampler
from posttrain.text import Problem, RenderedRow
from posttrain.training.fit import Learner, Stats, Training, annotated, fit, in_pieces, term_stats
from posttrain.training.record import INTERRUPTIONS, Recorder, Show
from posttrain.training.roles import actor_critic, cached_references, frozen_roles
from posttrain.training.settings import TrainSettings
from posttrain.training.starting import drawer_of, starting_policy
from posttrain.training.updates import Item, Mixed, RowUpdates, SampledUpdates, Update, Updates
from posttrain.tuners import Tuner, tuned
from posttrain.tuners.folder import foldable, save_adapter

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

    @property
    def cache(self) -> Path:
        """What the stages of a run share."""
        return self.folder.parent / "cache"


def train(settings: TrainSettings, session: Session) -> dict[str, Any]:
    """Trains, and writes `<folder>/model` (and `<folder>/adapter`, a tuner's part alone; `<folder>/critic`).

    Returns what the run's record keeps. A run that was interrupted returns {"interrupted": signal}, its state saved.
    """
    session.folder.mkdir(parents=True, exist_ok=True)
    rows = Rows.read(settings)
    settings = rows.settled(settings)
    loaded, template = starting_policy(settings, session.folder, session.seed, rows.data, rows.needs_chat)
    dtype = settings.model.dtype
    if dtype in {"mixed", "bfloat16"} and loaded.lm.device.type == "cpu" and bfloat16_is_slow():
        session.say(f"this CPU has no instructions for bfloat16: model.dtype: float32 is many times faster than {dtype}")
    for line in left_out(loaded.lm.model) if settings.model.is_quantized() else ():
        session.say(f"quantised: {line}")
    learners = {"policy": Learner.of(tuned(loaded.lm.model), settings.optim, settings.tuner)}
    policy: Any = loaded.lm
    if settings.critic is not None:
        assert isinstance(loaded.lm, LM)
        policy, learners["critic"] = actor_critic(settings, settings.critic, loaded.lm, loaded.tokenizer, session.seed)
    roles = frozen_roles(settings, loaded, learners["policy"].parameters, session.say)
    held = ExitStack()
    updates, steps = make_updates(settings, session, policy, template, roles, rows, held)
    micro_tokens = settings.batch.at_a_time(loaded.lm.device.type)
    run = Training(policy, learners, updates, steps, roles, micro_tokens, session.seconds)
    record = Recorder(
        session.folder, session.owner, settings.checkpoint, settings.validation if measures(settings) else None,
        validator(settings, session, policy, template, rows, roles), session.show, session.interrupted,
        session.say,
    )  # fmt: skip
    if record.resume(run):
        session.say(f"resumed from step {run.step}")
    for note in record.notes:
        session.say(f"skipped a damaged checkpoint: {note}")
    with held:
        fit(run, record)
    if run.stopped in INTERRUPTIONS:
        return {"interrupted": run.stopped}
    if run.stopped:
        session.say(f"stopped at step {run.step}: {run.stopped}")
    export(settings, session, policy, template, rows)
    trained = sum(parameter.numel() for parameter in run.parameters.values())
    return {
        "steps": run.step,
        "seconds": run.seconds,
        "stopped": run.stopped,
        "best": record.best,
        "parameters": trained,
        "learning_rate": learners["policy"].optim.peak,
        **session.facts,
    }


@dataclass(frozen=True)
class Rows:
    """The rows of each section of a recipe that has some, read and parsed."""

    data: Loaded | None = None
    validation: Loaded | None = None
    mix: Loaded | None = None
    normalise: Loaded | None = None

    @classmethod
    def read(cls, settings: TrainSettings) -> "Rows":
        """Raises DataError for malformed rows."""
        sections = {
            "data": settings.data,
            "validation": settings.validation.data,
            "mix": settings.mix.data if settings.mix else None,
            "normalise": settings.normalise.data if settings.normalise else None,
        }
        return cls(**{name: section.read() for name, section in sections.items() if section is not None})

    def settled(self, settings: TrainSettings) -> TrainSettings:
        """The settings with what the objective finds in its rows. Raises DataError for rows that it cannot learn from."""
        settings = settings if self.data is None else settings.settled(self.data.all)
        for loaded, learning in ((self.data, True), (None if settings.measures_nll else self.validation, False)):
            if loaded is not None:
                settings.objective.check_rows(loaded.all, learning)
        return settings

    @property
    def needs_chat(self) -> bool:
        return any(each.needs_chat for each in (self.data, self.validation, self.mix, self.normalise) if each is not None)


def make_updates(
    settings: TrainSettings, session: Session, policy: LM, template: Template, roles: Roles, rows: Rows,
    held: ExitStack | None = None,
) -> tuple[Updates, int]:  # fmt: skip
    """Where updates come from, and how many there will be. held: lets go of what they hold, when training is over."""
    objective = settings.objective
    if isinstance(objective, OnPolicy):
        assert settings.task is not None
        problems = settings.task.problems()
        session.facts["problems"] = len(problems)
        if not (session.folder / "metrics.jsonl").exists():  # which a run has that is taken up again
            for hole in holes_of(settings.task, problems[: settings.rollout.audit]):
                session.say(hole)
        source = rollouts_of(settings, session, policy, template, roles, problems, held or ExitStack())
        stream = OnPolicyStream(objective, source, settings.rollout, policy, roles, session.seed, session.say)
        updates: Updates = SampledUpdates(stream)
        steps = settings.steps or UNBOUNDED
    else:
        assert settings.data is not None
        assert rows.data is not None
        rendered = settings.data.render(rows.data, template)
        rendered.refuse_beyond(policy.context)
        for line in rendered.summary():
            session.say(line)
        session.facts["data"] = {"rows": rendered.usable, "tokens": rendered.tokens, "trained_tokens": rendered.trained}
        table, places = split(objective, rendered)
        known = None
        if settings.reference.cache:
            known = cached_references(settings, session.cache, policy, template.tokenizer, table, session.say)
        count = sum(map(len, table))
        weights = shares(settings.data, table)
        steps = settings.steps or (-int(-count * settings.epochs // settings.batch.rows) if settings.epochs else UNBOUNDED)
        updates = RowUpdates(objective, table, places, weights, settings.batch.rows, session.seed, known)
    if settings.mix is not None:
        assert rows.mix is not None
        beside = settings.mix.data.render(rows.mix, template)
        beside.refuse_beyond(policy.context)
        table, places = split(settings.mix.objective, beside)
        weights = shares(settings.mix.data, table)
        more = RowUpdates(settings.mix.objective, table, places, weights, settings.mix.rows, draws.key(session.seed, "mix"))
        updates = Mixed(updates, more, settings.mix.weight)
    return updates, steps


def rollouts_of(
    settings: TrainSettings, session: Session, policy: LM, template: Template, roles: Roles, problems: list[Problem],
    held: ExitStack,
) -> Source:  # fmt: skip
    """Where rollouts come from: this process, or one beside it."""
    if not isinstance(settings.sampler, ProcessSampler):
        return drawer_of(settings, policy, template, roles, problems, session.seed)
    threads = torch.get_num_threads()
    theirs = settings.sampler.threads or max(1, threads // 2)
    held.callback(torch.set_num_threads, threads)
    torch.set_num_threads(max(1, threads - theirs))
    dumped = settings.model_dump(mode="json")
    known = {name: dumped[name] for name in TrainSettings.model_fields if name not in {"seconds", "epochs"}}
    task = {"settings": {**known, "steps": 1}, "folder": str(session.folder), "seed": session.seed, "threads": theirs}
    source = Behind("posttrain.training.apart", task, tuned(policy.model), settings.sampler.behind, session.say)
    held.callback(source.close)
    return source


def shares(data: Data, table: list[list[RenderedRow]]) -> list[float]:
    """How much is drawn of each source: its weight, else its number of rows."""
    sources = zip(data.sources, table, strict=True)
    return [len(rows) if source.weight is None else source.weight for source, rows in sources]


def split(objective: Objective, rendered: Rendered) -> tuple[list[list[RenderedRow]], list[list[str]]]:
    """The rendered rows as those of the objective, with the place of each; source by source."""
    rows, places = [], []
    for source, where in zip(rendered.rows, rendered.places, strict=True):
        parts = [(part, place) for row, place in zip(source, where, strict=True) for part in objective.split(row)]
        rows.append([part for part, _ in parts])
        places.append([place for _, place in parts])
    return rows, places


def measures(settings: TrainSettings) -> bool:
    return settings.validation.task is not None or settings.validation.data is not None


def validator(
    settings: TrainSettings, session: Session, policy: Any, template: Template, rows: Rows, roles: Roles
) -> Callable[[Training], dict[str, Any]]:
    """{metric: value, or a figure with its interval} of the policy as it is. The same draws at every validation."""
    plan, objective = settings.validation, settings.objective
    rendered = plan.data.render(rows.validation, template) if plan.data is not None and rows.validation is not None else None
    held_out: Any = None
    if rendered is not None and not settings.measures_nll:
        rendered.refuse_beyond(policy.context)
        table, _ = split(objective, rendered)
        held_out = getattr(batches, objective.reads).from_rows([row for source in table for row in source])
        if settings.reference.cache:
            known = torch.cat(cached_references(settings, session.cache, policy, template.tokenizer, table, session.say))
            held_out = held_out.with_refs(*known.unbind(1))
        elif roles.reference is not None and objective.reference_per_row and settings.reference.refresh is None:
            held_out = held_out.with_refs(*roles.reference.sums(*held_out.sequences))

    def validate(run: Training) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if plan.task is not None:
            assert isinstance(run.policy, LM)
            report = evaluate(
                run.policy, template, plan.task, plan.evaluation, session.seed, settings.sampler, address=("validation",)
            )
            found |= report.as_dict()
        if rendered is not None and settings.measures_nll:
            found["nll"] = held_out_nll(run.policy, rendered, run.micro_tokens)
        elif held_out is not None:
            found |= held_out_figures(run, objective, held_out)
        return found

    return validate


def held_out_nll(policy: Any, rendered: Rendered, micro_tokens: int) -> float:
    """-log p per trained token, over all rows."""
    rows = Sequences.of(rendered.sequences)
    with torch.no_grad():
        return -float(policy.logprobs_of_many(rows, micro_tokens).double().sum()) / max(1, rows.trained)


def held_out_figures(run: Training, objective: Objective, batch: Any) -> dict[str, float]:
    """What the objective says of rows that it does not learn from: `loss`, the sum of its terms, and its own figures."""
    update = annotated(Update((Item(objective, batch, [""] * batch.count),)), run)
    stats = Stats()
    with torch.no_grad():
        for item in in_pieces(update, run.micro_tokens):
            loss = objective.loss(run.policy, item.batch.to(run.policy.device))
            stats.add(loss.stats | term_stats(loss, item))
    means = stats.means()
    terms = [name for name in means if name.startswith("loss/")]
    return {"loss": sum(means[name] for name in terms), **{name: means[name] for name in means if name not in terms}}


def reference_answers(settings: TrainSettings, policy: LM, template: Template, rows: Rows) -> Sequences:
    """The answers whose scores become 0 on average: those named, else the better ones of the training data."""
    assert settings.normalise is not None
    assert isinstance(settings.objective, RewardObjective)
    section, loaded = settings.normalise.data, rows.normalise
    if section is None or loaded is None:
        section, loaded = settings.data, rows.data
    assert section is not None
    assert loaded is not None
    rendered = section.render(loaded, template)
    rendered.refuse_beyond(policy.context)
    return Sequences.of([each for source in rendered.rows for row in source for each in settings.objective.exemplary(row)])


def bring_to_zero(settings: TrainSettings, policy: Any, template: Template, rows: Rows) -> dict[str, float]:
    """Normalises the scores; returns what they were."""
    assert settings.normalise is not None
    answers = reference_answers(settings, policy, template, rows)
    return normalise(policy, answers, settings.normalise.unit_variance, settings.batch.at_a_time(policy.device.type))


def export(settings: TrainSettings, session: Session, policy: Any, template: Template, rows: Rows) -> None:
    """The model, and beside it what the tuner has learned alone; the critic, where it is a model of its own."""
    if settings.normalise is not None:
        session.facts["normalised"] = bring_to_zero(settings, policy, template, rows)
    if isinstance(policy, ScalarLM):
        policy.keep_shift()
    folded = settings.tuner.folds_in and foldable(policy.model, settings.model)
    if folded and settings.tuner.stores:
        save_adapter(settings.tuner, policy.model, session.folder / "adapter", settings.model)
        template.tokenizer.save_pretrained(session.folder / "adapter")  # with the chat template that was learned
    if folded:
        settings.tuner.merge(policy.model)
        if settings.normalise is not None and settings.tuner.reversible:
            bring_to_zero(settings, policy, template, rows)  # again: the merge has rounded weights of few digits
    if isinstance(policy, LM) and policy.model.generation_config is not None:  # others who generate stop where our sampler stops
        policy.model.generation_config.eos_token_id = sorted(template.stop_ids)
    write(policy, settings.tuner, settings.model, folded, template, session.folder / "model")
    if settings.critic is not None and not settings.critic.shared:
        source, tuner = settings.critic.model or settings.model, settings.critic.tuner
        if folded := tuner.folds_in and foldable(policy.critic.model, source):
            tuner.merge(policy.critic.model)
        write(policy.critic, tuner, source, folded, template, session.folder / "critic")


def write(lm: Any, tuner: Tuner, base: ModelSource, folded: bool, template: Template, folder: Path) -> None:
    """An ordinary transformers folder; an adapter folder where the tuner's part, or something below it, cannot be folded in."""
    if isinstance(lm, ScalarLM):
        lm.keep_shift()
    if not folded:
        save_adapter(tuner, lm.model, folder, base)
        template.tokenizer.save_pretrained(folder)
    elif isinstance(lm, ScalarLM):
        save_reward_model(lm, template.tokenizer, template.stop_ids, folder)
    else:
        save(lm.model, template.tokenizer, folder)
