"""From the start of a process to its first training step: imports, model, data, on the same file of chats.

Twice: by each tool's command, and by a script that calls its library.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HOME = Path("runs/benchmarks")
ROWS = HOME / "chats" / "train.jsonl"
BINARIES = Path(sys.executable).parent
BEGAN = float(os.environ.get("BENCHMARK_BEGAN", time.time()))


def write_rows(count: int = 1000) -> None:
    """GSM8K as prompt and completion, as both tools read it."""
    from benchmarks.models import gsm8k
    from posttrain.data.dataset import Data

    rows = Data.model_validate(gsm8k()).read().rows[0][:count]
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("w", encoding="utf-8") as out:
        for row in rows:
            prompt, answer = ([{"role": each.role, "content": each.content}] for each in row.messages)
            out.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


def posttrain_command(model: str) -> dict[str, float]:
    """`posttrain run` of a recipe of one stage, until the first step that it records begins."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "start.yaml"
        recipe.write_text(
            f"model: {model}\nobjective: sft\nsteps: 1\nbatch: {{rows: 8}}\n"
            f"data: {{sources: {ROWS}, format: prompt_completion}}\n"
        )
        began = time.time()
        command = [str(BINARIES / "posttrain"), "run", str(recipe), "--runs", folder]
        subprocess.run(command, check=True, capture_output=True)
        (logged,) = Path(folder).glob("*/**/metrics.jsonl")
        line = json.loads(logged.read_text().splitlines()[0])
    return {"first": line["time"]["at"] - line["time"]["seconds"] - began}


def trl_command(model: str) -> dict[str, float]:
    """`trl sft`, until its progress bar of training stands at 0 of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(BINARIES / "trl"), "sft", "--model_name_or_path", model, "--dtype", "float32", "--dataset_name", str(ROWS.parent),
            "--max_steps", "1", "--use_cpu", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "false",
            "--output_dir", folder,
        ]  # fmt: skip
        began, said = time.time(), b""
        environment = os.environ | {"HF_DATASETS_CACHE": folder}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
            assert process.stderr is not None
            while b" 0/1 [" not in said:
                more = os.read(process.stderr.fileno(), 4096)
                if not more:
                    raise RuntimeError(f"trl sft never began to train:\n{said.decode()[-2000:]}")
                said += more
            first = time.time() - began
            process.stderr.read()
    return {"first": first}


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
