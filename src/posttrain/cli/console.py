"""What a run says while it runs: rich progress in a terminal, one plain line per event elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, Any

from posttrain.pipeline.run import Listener, Planned

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from posttrain.training.fit import Training

VERBS = {"reuse": "reused", "resume": "goes on", "run": "runs"}
QUIET_SECONDS = 10.0  # between progress lines when nobody watches


def listener() -> Listener:
    view = Terminal() if sys.stdout.isatty() else Plain()
    return Listener(view.stage, view.say, view.show, view.done)


def headline(planned: Planned) -> str:
    return f"{planned.name}: {VERBS[planned.action]} ({planned.why})"


def outcome(planned: Planned, record: dict[str, Any]) -> str:
    """One line about a finished stage: its main figures, time and memory."""
    figures = [
        f"{name} {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
        for name, figure in record.get("metrics", {}).items()
        if name in {"pass@1", "greedy", "nll", "score", "accuracy", "longer_wins", "kl"} and None not in figure.values()
    ]
    if record.get("best"):
        figures.append(f"best {record['best']['value']:.4g} at step {record['best']['step']}")
    if planned.action != "reuse":
        figures += [f"{record['wall_seconds']:.0f} s", f"peak {record['peak_memory_mb']:.0f} MB"]
    return f"{planned.name}: " + ", ".join(figures or ["done"])


TOLD = ("accuracy", "reward", "kl")  # beside the losses


def figures_of(metrics: dict[str, float]) -> str:
    losses = [name for name in metrics if name.startswith("loss/") and name.removeprefix("loss/") not in metrics]
    shown = [(name.removeprefix("loss/"), metrics[name]) for name in ("nll", *losses, *TOLD) if name in metrics][:4]
    speed = metrics["tokens"] / max(metrics["seconds"], 1e-9)
    return ", ".join([*(f"{name} {value:.4f}" for name, value in shown), f"{speed:,.0f} tokens/s"])


class Plain:
    """For logs and programs: a line per event, a progress line every few seconds."""

    def __init__(self) -> None:
        self.spoke = 0.0

    def stage(self, planned: Planned) -> None:
        print(headline(planned), flush=True)

    def say(self, line: str) -> None:
        print(f"  {line}", flush=True)

    def show(self, run: "Training", metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if now - self.spoke >= QUIET_SECONDS or run.step == run.steps:
            self.spoke = now
            print(f"  {progress_of(run)}: {figures_of(metrics)}", flush=True)

    def done(self, planned: Planned, record: dict[str, Any]) -> None:
        print(outcome(planned, record), flush=True)


def progress_of(run: "Training") -> str:
    if run.seconds_limit is not None:
        return f"step {run.step}, {run.seconds:.0f} of {run.seconds_limit:.0f} s"
    return f"step {run.step}/{run.steps}"


class Terminal:
    """For people: a bar with step, loss, speed and the remaining time."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def stage(self, planned: Planned) -> None:
        colour = {"reuse": "dim", "resume": "yellow", "run": "bold"}[planned.action]
        self.console.print(headline(planned), style=colour, markup=False)

    def say(self, line: str) -> None:
        self.console.print(f"  {line}", style="dim", markup=False)

    def show(self, run: "Training", metrics: dict[str, float]) -> None:
        if self.bar is None:
            self.bar = self._new_bar()
            self.bar.start()
            self.task = self.bar.add_task("", total=1.0)
        share = run.step / run.steps if run.seconds_limit is None else min(1.0, run.seconds / run.seconds_limit)
        assert self.task is not None
        self.bar.update(self.task, completed=share, description=f"  {progress_of(run)}: {figures_of(metrics)}")

    def _new_bar(self) -> "Progress":
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(30),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def done(self, planned: Planned, record: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.console.print(outcome(planned, record), style="green", markup=False)
