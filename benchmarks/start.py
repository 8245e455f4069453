"""From the start of a process to its first training step: imports, model, data, on the same file of chats."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

HOME = Path("runs/benchmarks")
ROWS = HOME / "chats.jsonl"
BEGAN = float(os.environ.get("BENCHMARK_BEGAN", time.time()))


def write_rows(count: int = 1000) -> None:
    """GSM8K as prompt and completion, as both tools read it."""
    from benchmarks.models import gsm8k
    from posttrain.data.dataset import Data

    rows = Data.model_validate(gsm8k()).read().rows[0][:count]
    with ROWS.open("w", encoding="utf-8") as out:
        for row in rows:
            prompt, answer = ([{"role": each.role, "content": each.content}] for each in row.messages)
            out.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


def posttrain(model: str) -> dict[str, float]:
    from posttrain import train

    shutil.rmtree(HOME / "start-posttrain", ignore_errors=True)
    data = {"sources": str(ROWS), "format": "prompt_completion"}
    made = train(HOME, "start-posttrain", model=model, objective="sft", data=data, steps=1, batch={"rows": 8})
    line = json.loads((made.parent / "metrics.jsonl").read_text().splitlines()[0])
    return {"first": line["time"]["at"] - line["time"]["seconds"] - BEGAN}


def trl(model: str) -> dict[str, float]:
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    began: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began.append(time.time())

    arguments = SFTConfig(
        str(HOME / "start-trl"), report_to="none", use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    data = load_dataset("json", data_files=str(ROWS), split="train", cache_dir=str(HOME / "start-trl-cache"))
    SFTTrainer(model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    shutil.rmtree(HOME / "start-trl-cache", ignore_errors=True)
    return {"first": began[0] - BEGAN}
