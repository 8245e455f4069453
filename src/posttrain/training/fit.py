"""The training loop. Whatever is learned from, and however it came about, it is learned here."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.errors import RunError
from posttrain.models.layout import micro_batches
from posttrain.models.roles import Roles
from posttrain.training.updates import Item, Update, Updates

if TYPE_CHECKING:
    from posttrain.models.lm import LM
    from posttrain.models.scalar import ScalarLM
    from posttrain.objectives import Loss
    from posttrain.training.optim import Optimizer
    from posttrain.training.record import Recorder
    from posttrain.tuners import Tuner


@dataclass
class Stats:
    """Means whose sums and counts are added up first: never a mean of means."""

    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, stats: "Mapping[str, tuple[Any, int]]") -> None:
        for name, (total, count) in stats.items():
            before = self.sums.get(name, (0.0, 0))
            self.sums[name] = (before[0] + float(total), before[1] + count)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items() if count}


@dataclass
class Learner:
    """What moves in a role: its parameters by name, and the optimizer that moves them."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    optim: "Optimizer"

    @classmethod
    def of(cls, parameters: dict[str, nn.Parameter], optim: "Optimizer", tuner: "Tuner | None" = None) -> "Learner":
        """tuner: what decides the learning rate where `optim` names none, and the pace of each parameter."""
        if tuner is not None:
            optim = optim.of_tuner(tuner.learning_rates)
        optimizer = optim.build(parameters, tuner.paces(list(parameters)) if tuner else None)
        if tuner is not None:
            optimizer.register_step_post_hook(lambda *_: tuner.stepped(parameters))
        return cls(parameters, optimizer, optim)

    def moving(self, step: int, steps: int) -> list[nn.Parameter]:
        """What moves in update `step` (from 0) of a run of `steps`. The gradients of what is still held are let go of."""
        found: list[nn.Parameter] = []
        for group in self.optimizer.param_groups:
            if step >= round(group.get("begins", 0.0) * steps):
                found += group["params"]
                continue
            for parameter in group["params"]:
                parameter.grad = None
        return found

    def step(self, step: int, steps: int) -> None:
        """Applies the gradients at the learning rate of update `step` of a run of `steps`, and lets go of them."""
        rate = self.optim.rate(step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass
class Training:
    """A training run as it stands: what learns, from what, and how far it has come. `step` updates have been applied.

    learners: the policy's, and those of further trained roles (a critic); no two of them share the name of a parameter.
    """

    policy: "LM | ScalarLM"
    learners: dict[str, Learner]
    updates: Updates
    steps: int
    roles: Roles = field(default_factory=Roles)
    micro_tokens: int = 8192
    seconds_limit: float | None = None
    step: int = 0
    seconds: float = 0.0
    stopped: str | None = None  # why it ended before its last step

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that moves."""
        return {name: each for learner in self.learners.values() for name, each in learner.parameters.items()}


def fit(run: Training, record: "Recorder") -> None:
    """Applies updates until the run's end. Nothing is pulled before the previous update has been applied."""
    while run.step < run.steps and run.stopped is None:
        began = time.perf_counter()
        update = annotated(next(run.updates), run)  # 1. sample, or read; ask the frozen roles
        units = count_units(update)  # 2. what the whole update's terms are means over
        stats = Stats(dict(update.stats))
        for item in in_pieces(update, run.micro_tokens):  # 3. gradients add up, piece by piece
            loss = item.objective.loss(run.policy, item.batch.to(run.policy.device))
            total = sum(term / max(1, units[id(item.objective), name]) for name, term in loss.terms.items())
            assert isinstance(total, torch.Tensor)
            refuse_nonfinite(total, item, run.step)
            (item.weight * total).backward()
            stats.add({f"{item.name}{name}": each for name, each in (loss.stats | term_stats(loss, item)).items()})
        norms = {role: clip(learner, run.step, run.steps) for role, learner in run.learners.items()}
        for learner in run.learners.values():  # 4. one optimizer step
            learner.step(run.step, run.steps)
        run.step += 1
        run.roles.follow(run.step)
        for item in update.items:
            item.objective.learned(stats.means(), run.roles.controls)
        run.seconds += time.perf_counter() - began
        if run.seconds_limit is not None and run.seconds >= run.seconds_limit:
            run.stopped = f"its {run.seconds_limit:.0f} seconds are over"
        figures = (
            stats.means()
            | run.roles.controls
            | {"grad_norm" if role == "policy" else f"grad_norm/{role}": norms[role] for role in norms}
        )
        record.step(run, update, figures, time.perf_counter() - began)  # 5. log, validate, save
    record.end(run)


def annotated(update: Update, run: Training) -> Update:
    """The update with what its objectives want to know before they learn from it: reference log-probs, batch statistics."""
    with torch.no_grad():
        items = [replace(item, batch=item.objective.annotate(item.batch, run.policy, run.roles)) for item in update.items]
    return replace(update, items=tuple(items))


def count_units(update: Update) -> dict[tuple[int, str], int]:
    """{(id of the objective, term): tokens, sequences or pairs of the whole update}."""
    units: dict[tuple[int, str], int] = {}
    for item in update.items:
        for term, count in item.objective.units(item.batch).items():
            place = id(item.objective), term
            units[place] = units.get(place, 0) + count
    return units


def in_pieces(update: Update, micro_tokens: int) -> Iterator[Item]:
    """The update's rows, at most about `micro_tokens` tokens at a time."""
    for item in update.items:
        for rows in micro_batches(item.batch, micro_tokens):
            yield replace(item, batch=item.batch.select(rows), labels=[item.labels[row] for row in rows])


def term_stats(loss: "Loss", item: Item) -> dict[str, tuple[float, int]]:
    """Each term as a stat `loss/<term>`, in its own units."""
    counts = item.objective.units(item.batch)
    return {f"loss/{name}": (float(term.detach()), counts[name]) for name, term in loss.terms.items()}


def refuse_nonfinite(total: torch.Tensor, item: Item, step: int) -> None:
    if not math.isfinite(float(total.detach())):
        shown = ", ".join(item.labels[:3]) + (", ..." if len(item.labels) > 3 else "")
        raise RunError(
            f"step {step + 1}: the loss is {float(total.detach())} on {shown}; no update was made and the last checkpoint is "
            "from before; look at these rows, or lower optim.learning_rate"
        )


def clip(learner: Learner, step: int, steps: int) -> float:
    """Clips the gradients and returns their norm before. Raises RunError, before any update, where it is not finite."""
    moving = learner.moving(step, steps)
    for parameter in moving:  # an update without signal still follows the optimizer's momentum, everywhere
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.get_total_norm([each.grad for each in moving if each.grad is not None])
    if not math.isfinite(float(norm)):
        name = next(n for n, p in learner.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all()))
        raise RunError(
            f"step {step + 1}: the gradient of {name} is not finite; no update was made and the last checkpoint is from "
            "before; lower optim.learning_rate, or use dtype float32"
        )
    if learner.optim.clip is not None:
        nn.utils.clip_grads_with_norm_(moving, learner.optim.clip, norm)
    return float(norm)
