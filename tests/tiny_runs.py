"""Tiny training runs through the real pipeline: a base model made on the spot, recipes of every objective, and what a run leaves.

As a program (`python tests/tiny_runs.py`) it is a nursery: it imports everything once and forks a child for each run that it is
asked for, so that a test can kill dozens of runs at moments of its choice and pay for one import.
"""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import Listener, run

TEXTS = [
    "What is 3 + 4? It is 7. Once upon a time there was a cat who could count to 12 and back again, all day long.",
    "Sam has 18 shells and buys 6 more. How many shells does Sam have now? He has 24 shells.",
]
SHAPE = {"hidden_size": 32, "layers": 2, "heads": 4, "key_value_heads": 2, "feed_forward": 48, "context": 128}
SUMS = [(a, b) for a in range(1, 5) for b in range(1, 4)]
STEPS = 6

PAIRS = {"items": [{"prompt": f"What is {a} + {b}?", "completion": f"It is {a + b}." + " Yes." * a} for a, b in SUMS]}
DATA: dict[str, Any] = {"sources": {"kind": "inline", **PAIRS}}
RAW: dict[str, Any] = {"sources": {"kind": "inline", "items": [{"text": f"{a} + {b} = {a + b}" + " and" * b} for a, b in SUMS]}}
TASK: dict[str, Any] = {
    "kind": "problems",
    "grader": {"kind": "function", "path": "tiny_runs:charm"},
    "source": {"kind": "inline", "items": [{"id": f"p{a}{b}", "prompt": f"What is {a} + {b}?", "answer": "7"} for a, b in SUMS]},
}
ROLLOUT: dict[str, Any] = {"problems": 4, "per_problem": 4, "sampling": {"max_tokens": 8}}


def inline(*items: dict[str, Any]) -> dict[str, Any]:
    return {"sources": {"kind": "inline", "items": list(items)}}


PREFERENCES = inline(
    *({"prompt": f"What is {a} + {b}?", "chosen": f"It is {a + b}." + " Yes." * a, "rejected": "No." * b} for a, b in SUMS)
)
LABELLED = inline(
    *({"prompt": f"What is {a} + {b}?", "completion": f"It is {a + b * (a % 2)}.", "label": bool(a % 2)} for a, b in SUMS)
)
RANKED = inline(
    *({"prompt": f"What is {a} + {b}?", "completions": [f"It is {a + b}.", "Yes." * a, "No"], "scores": [2, 1, 0]} for a, b in SUMS)
)
STEPPED = inline(
    *({"prompt": f"What is {a} + {b}?", "steps": [f"{a} and {b}.", f"It is {a + b}."], "labels": [1, b % 2]} for a, b in SUMS)
)
CLASSIFIED = inline(*({"text": f"What is {a} + {b}?" + " Yes." * b, "label": ["few", "many"][a + b > 4]} for a, b in SUMS))
CLASSIFIED["format"] = "classified"
FEW: dict[str, Any] = {"rows": 5, "micro_tokens": 90}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft", "data": DATA, "batch": {"rows": 5, "micro_tokens": 40}},
    "pretrain": {"objective": "pretrain", "data": RAW, "batch": {"rows": 5, "micro_tokens": 40}},
    "grpo": {"objective": "grpo", "task": TASK, "rollout": ROLLOUT},
}
COMPARED: dict[str, dict[str, Any]] = {  # those that learn from comparisons, labels and rewards, one of each type of batch
    "dpo": {"objective": "dpo", "data": PREFERENCES, "batch": FEW},
    "kto": {"objective": "kto", "data": LABELLED, "batch": FEW},
    "bco": {"objective": "bco", "data": PREFERENCES, "batch": FEW},
    "bradley_terry": {"objective": "bradley_terry", "data": PREFERENCES, "batch": FEW},
    "ranking_reward": {"objective": "ranking_reward", "data": RANKED, "batch": FEW},
    "process_reward": {"objective": "process_reward", "data": STEPPED, "batch": FEW},
    "match_logits": {"objective": "match_logits", "data": RAW, "batch": FEW},
    "ppo": {"objective": "ppo", "task": TASK, "rollout": ROLLOUT, "critic": {"shared": True}},
    "classify": {"objective": "classify", "data": CLASSIFIED, "batch": FEW},
}
TUNERS: dict[str, dict[str, Any]] = {"full": {"tuner": "full"}, "lora": {"tuner": {"kind": "lora", "rank": 4}}}
OTHERS: dict[str, dict[str, Any]] = {
    "layers": {"kind": "layers", "last": 1, "unfreeze": 0.5}, "head": {"kind": "head", "untie": True},
    "bitfit": {"kind": "bitfit", "add": True}, "ia3": {"kind": "ia3"}, "adapter": {"kind": "adapter", "size": 4},
    "prompt": {"kind": "prompt", "tokens": 3}, "p_tuning": {"kind": "p_tuning", "tokens": 3, "at": [0, 1]},
    "prefix": {"kind": "prefix", "tokens": 3, "projection": 8}, "delta_scale": {"kind": "delta_scale"},
}  # fmt: skip
WHOLE_PPO: dict[str, Any] = {  # four updates a rollout, a critic of its own, a KL controller, and rows to learn from beside
    "objective": {"kind": "ppo", "kl_target": 0.5, "kl_horizon": 50, "entropy": 0.01},
    "rollout": {**ROLLOUT, "epochs": 2, "minibatches": 2},
    "critic": {"tuner": {"kind": "lora", "rank": 2}, "optim": {"learning_rate": 3e-2}},
    "mix": {"objective": "pretrain", "data": RAW, "rows": 3, "weight": 0.5},
    "batch": {"micro_tokens": 60},
}
REUSED: dict[str, Any] = {  # four updates a rollout, and a reference
    "objective": {"kind": "grpo", "kl": 0.05, "aggregate": "token"},
    "rollout": {**ROLLOUT, "epochs": 2, "minibatches": 2},
    "batch": {"micro_tokens": 60},
}


def charm(_problem: object, text: str) -> float:
    """A score that differs between samples of a random model, and depends on the text alone."""
    return float(sum(map(ord, text)) % 5)


@cache
def _home() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="tiny-base-")


@cache
def base() -> Path:
    """A Llama-style model of 26,000 weights with tokenizer and chat template, made once a process; the same bits every time."""
    from posttrain.models.create import create

    folder = Path(_home().name) / "base"
    create(TEXTS * 4, 320, SHAPE, 0, folder)
    return folder


@cache
def fine() -> Path:
    """The base as if it had been fine-tuned: all its weights moved a little."""
    import torch

    from posttrain.tuners.load import load

    found, draw = load(base()), torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in found.lm.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))
    folder = base().with_name("fine")
    found.lm.model.save_pretrained(folder)
    found.tokenizer.save_pretrained(folder)
    return folder


def settings(kind: str = "sft", adapter: str = "full", /, **changes: Any) -> dict[str, Any]:
    """A training stage of STEPS updates with a checkpoint after each; `changes` replace whole sections."""
    shared: dict[str, Any] = {
        "model": str(base()), "steps": STEPS, "checkpoint": {"every": 1, "keep": 2}, "optim": {"learning_rate": 1e-2},
    }  # fmt: skip
    found = {**shared, **(OBJECTIVES | COMPARED)[kind], **TUNERS[adapter], **changes}
    if found["objective"] == "match_logits":
        found = {"teacher": str(fine()), **found}
    if found["tuner"] == {"kind": "delta_scale"}:
        found["tuner"] = {"kind": "delta_scale", "of": str(fine())}
    return found


def text(*args: Any, **changes: Any) -> str:
    """The same as the text of a recipe file (JSON is YAML)."""
    return json.dumps(settings(*args, **changes))


def parsed(recipe: str) -> Recipe:
    return Recipe.parse(recipe, name="tiny")


def train(recipe: str, root: Path, stop: dict[int, int] | None = None) -> Path:
    """Runs a recipe of one stage and returns the stage's folder. stop: {step: signal} that the process sends to itself then."""

    def show(training: Any, _metrics: dict[str, float]) -> None:
        if stop and training.step in stop:
            signal.raise_signal(stop[training.step])

    return run(parsed(recipe), root, Listener(show=show)).folders["train"]


def stage_folder(root: Path) -> Path:
    """The folder of the one training stage under `root`, finished or not."""
    (found,) = (each for each in (root / "tiny").iterdir() if each.is_dir() and each.name != "cache")
    return found


def checkpoints(root: Path) -> list[str]:
    """The names of the committed checkpoints, oldest first."""
    return sorted(each.name for each in (stage_folder(root) / "checkpoints").iterdir())


def marks(folder: Path) -> dict[str, str]:
    """The digest of a finished stage: {what: sha256} of final weights, last checkpoint, metrics without time, samples, record."""
    found: dict[str, bytes] = {}
    for file in [*folder.glob("model/*"), *folder.glob("adapter/*"), *folder.glob("critic/*")]:
        found[f"{file.parent.name}/{file.name}"] = file.read_bytes()
    last = sorted(folder.glob("checkpoints/step-*"))[-1]
    for file in last.glob("*.safetensors"):
        found[f"{last.name}/{file.name}"] = file.read_bytes()
    state = json.loads((last / "state.json").read_bytes())
    reason = None if state["stopped"] in ("SIGINT", "SIGTERM") else state["stopped"]
    found[f"{last.name}/state"] = json.dumps({**state, "seconds": None, "stopped": reason}, sort_keys=True).encode()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = json.dumps([{**row, "time": None} for row in rows]).encode()
    if (folder / "samples.jsonl").exists():
        found["samples.jsonl"] = (folder / "samples.jsonl").read_bytes()
    record = json.loads((folder / "done.json").read_text())
    found["record"] = json.dumps({key: record[key] for key in ("steps", "stopped", "best")}).encode()
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in found.items()}


# ---- the nursery


class Nursery:
    """Runs recipes in forked children of one warmed-up process without threads."""

    def __enter__(self) -> Self:
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(base())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **quiet},
        )  # fmt: skip
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def run(self, recipe: str, root: Path, fault: str = "", kill: tuple[int, float] | None = None, **more: Any) -> dict[str, Any]:
        """One run in a child. kill: (steps, seconds): SIGKILL so many seconds after the child has made so many steps.

        Returns {"status": exit status, or minus the signal that ended it; "error": what it raised; "steps": steps it made}.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        wanted = {"recipe": recipe, "root": str(root), "fault": fault, "kill": kill, **more}
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


def _serve() -> None:
    """Reads one wish a line, forks a child for it, and answers with how the child ended."""
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import posttrain.training.session  # noqa: F401
    from posttrain.pipeline import provenance

    torch.set_num_threads(1)
    provenance.own_code()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        wanted = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(wanted, writing)
        os.close(writing)
        said = _watch(child, reading, wanted["kill"])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        steps = [int(each.split()[1]) for each in said if each.startswith("step ")]
        errors = [each.removeprefix("error ") for each in said if each.startswith("error ")]
        answers.write(json.dumps({"status": status, "steps": steps, "error": errors[0] if errors else None}) + "\n")
        answers.flush()


def _watch(child: int, reading: int, kill: tuple[int, float] | None) -> list[str]:
    """What the child says until it ends, or until it is killed after `kill` = (steps, seconds)."""
    said, doom = b"\n", None
    while True:
        if kill is not None and doom is None and said.count(b"\nstep ") >= kill[0]:
            doom = time.monotonic() + kill[1]
        left = None if doom is None else max(0.0, doom - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            kill = doom = None
            continue
        part = os.read(reading, 65536)
        if not part:
            os.close(reading)
            return said.decode().splitlines()
        said += part


def _child(wanted: dict[str, Any], writing: int) -> None:
    from posttrain.errors import PosttrainError
    from posttrain.pipeline.stage import Interrupted

    def say(line: str) -> None:
        os.write(writing, (line.replace("\n", " ") + "\n").encode())

    def show(training: Any, _metrics: dict[str, float]) -> None:
        say(f"step {training.step}")
        for number in wanted.get("signals", {}).get(str(training.step), []):
            signal.raise_signal(number)

    os.environ["POSTTRAIN_FAULT"] = wanted["fault"]
    status = 0
    try:
        run(parsed(wanted["recipe"]), wanted["root"], Listener(say=say, show=show))
    except Interrupted as stopped:
        status = 128 + signal.Signals[stopped.signal]
    except PosttrainError as error:
        status = error.exit_status
        say(f"error {error}")
    except BaseException as error:
        status = 99
        say(f"error {type(error).__name__}: {error}")
    os._exit(status)


if __name__ == "__main__":
    sys.modules["tiny_runs"] = sys.modules["__main__"]  # so that the grader's path finds this very module
    _serve()
