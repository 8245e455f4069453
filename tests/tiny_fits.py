"""Tiny fits: the real training loop on tiny models, with an optimizer that can be asked what it was given."""

import copy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import torch
from example_batches import only
from tiny_encoders import make as make_encoder
from tiny_models import fine, make, make_scalar
from torch import nn

from posttrain.data.stream import Stream
from posttrain.models.actor_critic import ActorCritic, ValueHead
from posttrain.models.heads import head_parameters
from posttrain.models.lm import LM
from posttrain.models.roles import Frozen, Roles
from posttrain.training.fit import Learner, Training, annotated, fit
from posttrain.training.updates import Item, Update
from posttrain.tuners import Tuner, tuned

TUNERS = {"full": {}, "lora": {"rank": 3, "alpha": 5.0}}  # everything is tried under these, and something under each of the others
OTHERS = {
    "layers": {"last": 1, "rate_decay": 0.5, "unfreeze": 0.5}, "head": {"untie": True}, "bitfit": {"add": True}, "ia3": {},
    "adapter": {"size": 4, "deviation": 0.05}, "prompt": {"tokens": 3}, "p_tuning": {"tokens": 3, "at": [0, 1]},
    "prefix": {"tokens": 3, "projection": 5}, "delta_scale": {},
}  # fmt: skip


def build(name, dtype, tuner, moved=True, policy="lm"):
    """A model with a tuner in it; `moved`: as if trained, so that no part of the tuner is zero. policy: as `Example.policy`."""
    return copy.deepcopy(_built(name, dtype, tuner, moved, policy))


@cache
def _built(name, dtype, tuner, moved, policy):
    lm = MADE[policy](name, dtype) if policy in MADE else make(name, dtype)
    _install(lm, name, tuner, moved)
    if policy == "critic":
        critic = make_scalar(name, dtype, seed=1)
        _install(critic, name, tuner, moved)
        return ActorCritic(lm, critic)
    if policy == "shared critic":
        head = ValueHead(lm)
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-0.2, 0.3, len(head.weight)))
        return ActorCritic(lm, head)
    return lm


MADE = {  # models that are no language models
    "scalar": make_scalar,
    "classifier": lambda name, dtype="float32": make_scalar(name, dtype, num_labels=3),
    "encoder": lambda _name, dtype="float32": make_encoder("bert", dtype, pad_token_id=None),
}


def _install(lm, name, tuner, moved):
    settings = {"of": str(fine(name))} if tuner == "delta_scale" else (TUNERS | OTHERS)[tuner]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Tuner.lookup(tuner)(**settings).install(lm.model)
        for key, parameter in tuned(lm.model).items():
            if moved and tuner != "full" and "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
    for parameter in head_parameters(lm.model).values():
        parameter.requires_grad_(True)


def built_for(example, name, dtype, tuner):
    return build(name, dtype, tuner, policy=example.policy)


def by_role(lm):
    """{"policy": its parameters that move, "critic": the critic's}."""
    if not isinstance(lm, ActorCritic):
        return {"policy": tuned(lm.model)}
    critic = lm.critic if isinstance(lm.critic, ValueHead) else lm.critic.model
    return {"policy": tuned(lm.model), "critic": {f"critic.{name}": each for name, each in tuned(critic).items()}}


def moving(lm):
    """Everything that moves, by name."""
    return {name: each for parameters in by_role(lm).values() for name, each in parameters.items()}


def learners(lm, optim):
    return {role: Learner.of(parameters, optim) for role, parameters in by_role(lm).items()}


def beside(example, lm):
    """The roles that an objective asks: a reference and a teacher near the policy, and its controllers, which have moved already."""
    objective = example.objective
    reference = Frozen(near(lm), micro_tokens=200) if "reference" in objective.needs else None
    teacher = Frozen(near(lm, seed=12), micro_tokens=200) if "teacher" in objective.needs else None
    return Roles(reference, teacher=teacher, controls={name: value + 0.2 for name, value in objective.controls().items()}, micro_tokens=200)


def near(lm, scale=0.02, seed=11):
    """A model of its own with all weights moved a little."""
    other = LM(copy.deepcopy(lm.model), lm.layout, lm.mixed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_((scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)).to(parameter.dtype))
    return other.requires_grad_(False)


def update_of(example, batch):
    return Update((Item(example.objective, batch, [f"row {row}" for row in range(batch.count)]),))


def ready(lm, update, roles):
    """The update as the loop learns from it, its roles asked."""
    return annotated(update, SimpleNamespace(policy=lm, roles=roles))


class Fixed:
    """The same update, or the same few, for ever."""

    def __init__(self, *updates):
        self.updates, self.given = updates, 0

    def __next__(self):
        self.given += 1
        return self.updates[(self.given - 1) % len(self.updates)]

    def state(self):
        return {"given": self.given}, {}


class Shuffled:
    """Three rows of a batch at a time, in the order of a stream."""

    def __init__(self, example, batch):
        self.example, self.batch, self.stream = example, batch, Stream([batch.count], None, seed=7)

    def __next__(self):
        return update_of(self.example, only(self.batch, [row for _, row in self.stream.take(3)]))

    def state(self):
        return self.stream.state(), {}

    def load(self, plain, _tensors):
        self.stream.load(plain)


class Watcher:
    """Stands where a recorder stands: keeps the metrics."""

    def __init__(self):
        self.metrics = []

    def step(self, _run, _update, metrics, _seconds):
        self.metrics.append(metrics)

    def end(self, _run):
        pass


class Capture(torch.optim.SGD):
    """Keeps the gradient that it is asked to apply, and applies nothing."""

    def step(self):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


def fitted(lm, update, micro_tokens, roles=None):
    """(gradients, metrics) of one update by the training loop itself, nothing applied; `roles` stay as they are."""
    record, plan = Watcher(), SimpleNamespace(clip=None, rate=lambda _step, _steps: 1.0)
    learning = {
        role: Learner(parameters, Capture(list(parameters.values()), lr=1.0), plan) for role, parameters in by_role(lm).items()
    }
    asked = Roles() if roles is None else replace(roles, controls=dict(roles.controls))
    fit(Training(lm, learning, Fixed(update), 1, asked, micro_tokens), record)
    grads = [grad.flatten() for learner in learning.values() for grad in learner.optimizer.seen]
    return torch.cat(grads), record.metrics[0]
