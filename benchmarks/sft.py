"""Supervised fine-tuning on GSM8K: the same rows in the same updates, at the same learning rate."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_megabytes
from benchmarks.models import HOME, ROWS, SEED, gsm8k, model_folder, sft_rows

RATE = 1e-4
BEGAN = float(os.environ.get("BENCHMARK_BEGAN", time.time()))


def posttrain(shape: str, steps: int, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """The stage as a user would run it."""
    from posttrain import train

    folder = HOME / "sft-posttrain"
    shutil.rmtree(folder, ignore_errors=True)
    optim = {"learning_rate": RATE, "schedule": "constant", "warmup": 0.0, "clip": 1.0}
    model = {"path": str(model_folder(shape)), "dtype": dtype, **changes.pop("model", {})}
    batch = {"rows": ROWS, **changes.pop("batch", {})}
    stage = train(
        HOME, folder.name, model=model, objective="sft", data=gsm8k(steps), steps=steps, batch=batch, optim=optim, seed=SEED,
        **changes,
    )  # fmt: skip
    lines = metrics(stage)
    return {
        "first": lines[0]["time"]["at"] - lines[0]["time"]["seconds"] - BEGAN,
        "seconds": [line["time"]["seconds"] for line in lines],
        "tokens": [line["tokens"] for line in lines],
        "losses": [line["loss/nll"] for line in lines],
        "peak": peak_megabytes(),
    }


def metrics(model: Path) -> list[dict[str, Any]]:
    """The logged steps of the stage that made a model."""
    return [json.loads(line) for line in (model.parent / "metrics.jsonl").read_text().splitlines()]


def clock() -> Any:
    """A callback for transformers' trainers that keeps when each step begins and ends, and its loss."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.times.append(time.time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.time())

        def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: dict[str, Any], **__: Any) -> None:
            self.losses.extend([float(logs["loss"])] if "loss" in logs else [])

        def seconds(self) -> list[float]:
            return [end - begin for begin, end in zip(self.times[::2], self.times[1::2], strict=True)]

    return Clock()


def trl(shape: str, steps: int, **options: Any) -> dict[str, Any]:
    """`SFTTrainer` on the same tokens; `options` go to `SFTConfig`, whose defaults are bf16 and gradient checkpointing."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(model_folder(shape), dtype="float32")
    rows = sft_rows(shape, steps)
    data = Dataset.from_list([{"input_ids": tokens, "completion_mask": [int(mark) for mark in train]} for tokens, train in rows])
    watch = clock()
    arguments = SFTConfig(
        str(HOME / "sft-trl"), report_to="none", use_cpu=True, per_device_train_batch_size=ROWS, max_steps=steps,
        learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, logging_first_step=True, save_strategy="no",
        disable_tqdm=True, completion_only_loss=True, train_sampling_strategy="sequential", max_grad_norm=1.0,
        weight_decay=0.0, **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_folder(shape))
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[watch])
    trainer.train()
    sizes = [len(tokens) for tokens, _ in rows]
    return {
        "first": watch.times[0] - BEGAN,
        "seconds": watch.seconds(),
        "tokens": [sum(sizes[step * ROWS : (step + 1) * ROWS]) for step in range(steps)],
        "losses": watch.losses,
        "peak": peak_megabytes(),
    }


def size_of_work(shape: str, steps: int) -> list[tuple[int, int, int]]:
    """(tokens, trained tokens, sum of squared lengths) of each update."""
    rows = sft_rows(shape, steps)
    parts = [rows[step * ROWS : (step + 1) * ROWS] for step in range(steps)]
    return [(sum(len(t) for t, _ in part), sum(sum(m) for _, m in part), sum(len(t) ** 2 for t, _ in part)) for part in parts]
