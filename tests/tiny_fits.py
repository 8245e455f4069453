"""Tiny fits: the real training loop on tiny models, with an optimizer that can be asked what it was given."""

from types import SimpleNamespace

import torch
from example_batches import only
from tiny_models import make
from torch import nn

from posttrain.data.stream import Stream
from posttrain.objectives import Objective
from posttrain.training.fit import Training, fit
from posttrain.training.updates import Item, Update
from posttrain.tuners import Tuner, tuned

TUNERS = {"full": {}, "lora": {"rank": 3, "alpha": 5.0}}


def build(name, dtype, tuner, moved=True):
    """A model with a tuner in it; `moved`: as if trained, so that no part of the tuner is zero."""
    lm = make(name, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Tuner.lookup(tuner)(**TUNERS[tuner]).install(lm.model)
        for key, parameter in tuned(lm.model).items():
            if moved and tuner != "full" and "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
    return lm


def objective_of(example):
    return Objective.lookup(example.kind)(**example.settings)


def update_of(example, batch):
    return Update((Item(objective_of(example), batch, [f"row {row}" for row in range(batch.count)]),))


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


def fitted(lm, update, micro_tokens):
    """(gradients, metrics) of one update by the training loop itself, nothing applied."""
    parameters, record = tuned(lm.model), Watcher()
    optimizer = Capture(list(parameters.values()), lr=1.0)
    plan = SimpleNamespace(clip=None, rate=lambda _step, _steps: 1.0)
    fit(Training(lm, parameters, optimizer, plan, Fixed(update), steps=1, micro_tokens=micro_tokens), record)
    return torch.cat([grad.flatten() for grad in optimizer.seen]), record.metrics[0]
