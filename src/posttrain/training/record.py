"""What a run writes down as it goes: metrics, samples, validations, checkpoints. And how it is taken up again."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.watch import signs

if TYPE_CHECKING:
    from posttrain.training.fit import Training
    from posttrain.training.settings import Checkpoints, Validation
    from posttrain.training.updates import Update

LOWER_IS_BETTER = {"nll", "loss", "absolute_error"}
SHOWN_SAMPLES = 4

Show = Callable[["Training", dict[str, float]], None]


class Lines:
    """A JSONL file that only grows, and can be cut back to the step that a resumed run begins from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_after(self, step: int) -> None:
        """Keeps the lines of the first `step` updates."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().split(b"\n"):  # only this ends a line: texts may hold separators of their own
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                break  # the end, or the line that a kill cut short
        for stale in self.path.parent.glob(f"{self.path.name}.tmp-*"):
            stale.unlink()  # of a process that was killed right here
        staged = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        staged.write_bytes(b"".join(line + b"\n" for line in kept))
        staged.replace(self.path)

    def read(self) -> list[dict[str, Any]]:
        """Every line; nothing where there is no file."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines()] if self.path.exists() else []

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


@dataclass
class Recorder:
    """Writes into a stage's folder. `validate` gives {metric: value} of the policy as it is."""

    folder: Path
    owner: str
    checkpoints: "Checkpoints"
    validation: "Validation | None" = None
    validate: "Callable[[Training], dict[str, Any]]" = lambda _: {}
    show: Show = lambda _run, _metrics: None
    interrupted: Callable[[], str | None] = lambda: None
    say: Callable[[str], None] = lambda _line: None
    best: dict[str, Any] | None = None  # {"step", "value"} of the best validation
    since_best: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.metrics = Lines(self.folder / "metrics.jsonl")
        self.samples = Lines(self.folder / "samples.jsonl")
        self.parent = self.folder / "checkpoints"

    def step(self, run: "Training", update: "Update", metrics: dict[str, float], seconds: float) -> None:
        """After each update: log; validate and save when due."""
        tokens = sum(len(seqs.tokens) for item in update.items for seqs in item.batch.sequences)
        row: dict[str, Any] = {
            "step": run.step,
            "lr": run.learners["policy"].optim.rate(run.step - 1, run.steps),
            **metrics,
            "tokens": tokens,
        }
        last = run.step == run.steps or run.stopped is not None
        due = self.validation is not None and (run.step % self.validation.every == 0 or last)
        if due:
            row["validation"] = self._validate(run)
        self.metrics.add({**row, "time": {"seconds": round(seconds, 4), "at": round(time.time(), 3)}})
        for one, grade in update.samples[:SHOWN_SAMPLES]:
            asked = {"id": one.problem.id, "prompt": one.problem.prompt[-1].content, "answer": one.problem.answer}
            said = {"step": run.step, **asked, "index": one.index, "text": one.shown, "score": grade.score}
            self.samples.add(said if grade.failure is None else {**said, "failure": grade.failure})
        if due:
            for sign in signs(self.metrics.read(), self.validation.every if self.validation else 1):
                self.say(sign)
        self.show(run, {**metrics, "tokens": tokens, "seconds": seconds})
        why = self.interrupted()
        if run.step % self.checkpoints.every == 0 or run.step == run.steps or (why or run.stopped) is not None:
            self.save(run)  # with the run's own reason to stop: a signal is no part of its state
        run.stopped = why or run.stopped

    def _validate(self, run: "Training") -> dict[str, Any]:
        found = self.validate(run)
        assert self.validation is not None
        name = self.validation.best
        if name is not None:
            figure = found[name]
            value = figure["value"] if isinstance(figure, dict) else figure
            sign = -1 if name in LOWER_IS_BETTER else 1
            if value is not None and (self.best is None or sign * value > sign * self.best["value"]):
                self.best, self.since_best = {"step": run.step, "value": value}, 0
                weights: dict[str, dict[str, torch.Tensor]] = {"weights": dict(run.parameters)}
                checkpoint.save(self.parent, Checkpoint(run.step, weights, {"value": value}), self.owner, "best")
            else:
                self.since_best += 1
            if self.validation.patience is not None and self.since_best >= self.validation.patience:
                since = f"on step {self.best['step']} " if self.best else ""
                run.stopped = f"{name} has not improved {since}for {self.since_best} validations"
        return found

    def save(self, run: "Training") -> None:
        """Everything that the run needs to go on as if it had never stopped."""
        plain, waiting = run.updates.state()
        state = {
            "updates": plain, "seconds": run.seconds, "best": self.best, "since_best": self.since_best, "stopped": run.stopped,
            "controls": run.roles.controls,
        }  # fmt: skip
        weights: dict[str, torch.Tensor] = dict(run.parameters)
        tensors = {"weights": weights, "optimizer": optimizer_tensors(run), "waiting": waiting, **run.roles.tensors()}
        checkpoint.save(self.parent, Checkpoint(run.step, tensors, state), self.owner)
        checkpoint.rotate(self.parent, self.checkpoints.keep)
        for step in checkpoint.steps(self.parent, "best"):
            if self.best is None or step != self.best["step"]:
                checkpoint.discard(checkpoint.folder_of(self.parent, step, "best"))

    def resume(self, run: "Training") -> bool:
        """Takes the run up from its newest whole checkpoint. False where there is none."""
        checkpoint.remove_stale(self.parent)
        found, skipped = checkpoint.load_latest(self.parent, self.owner)
        self.notes += skipped
        self.metrics.cut_after(found.step if found else 0)
        self.samples.cut_after(found.step if found else 0)
        if found is None:
            return False
        restore_weights(run, found)
        restore_optimizer(run, dict(found.tensors["optimizer"]))
        run.updates.load(found.state["updates"], dict(found.tensors["waiting"]))
        run.roles.load(found.state["controls"], found.tensors)
        run.step, run.seconds = found.step, found.state["seconds"]
        self.best, self.since_best = found.state["best"], found.state["since_best"]
        run.stopped = found.state["stopped"]
        return True

    def end(self, run: "Training") -> None:
        """The best weights become the policy's, where a metric was named."""
        if self.best is not None and run.stopped not in INTERRUPTIONS:
            folder = checkpoint.folder_of(self.parent, self.best["step"], "best")
            restore_weights(run, checkpoint.load(folder, self.owner))


INTERRUPTIONS = {"SIGINT", "SIGTERM"}


def restore_weights(run: "Training", found: Checkpoint) -> None:
    with torch.no_grad():
        for name, value in found.tensors["weights"].items():
            run.parameters[name].copy_(value)


def optimizer_tensors(run: "Training") -> dict[str, torch.Tensor]:
    """The optimizers' state as flat tensors: `<parameter>|<what>`, or `<parameter>|<what>|number` for a plain number."""
    found = {}
    for learner in run.learners.values():
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in learner.parameters.items()}
        for parameter, state in learner.optimizer.state.items():
            for what, value in state.items():
                key = f"{names[parameter]}|{what}"
                if isinstance(value, torch.Tensor):
                    found[key] = value
                else:
                    found[f"{key}|number"] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return found


def restore_optimizer(run: "Training", tensors: dict[str, torch.Tensor]) -> None:
    owners = {name: learner for learner in run.learners.values() for name in learner.parameters}
    for learner in run.learners.values():
        learner.optimizer.state.clear()
    for key, value in tensors.items():
        name, what, *number = key.split("|")
        learner = owners[name]
        parameter, optimizer = learner.parameters[name], learner.optimizer
        optimizer.state[parameter][what] = value.item() if number else learner.optim.place(optimizer, parameter, value)
