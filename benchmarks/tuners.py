"""What moves, and what it costs: fine-tuning on GSM8K under tuners that hold less, beside TRL with peft.

The peak is counted from the second step on: what loading and a first step take passes, and is not training.
"""

import shutil
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_megabytes
from benchmarks.models import HOME, ROWS, SEED, gsm8k, model_folder, sft_rows
from benchmarks.pairs import ALPHA, RANK
from benchmarks.sft import RATE, clock, metrics

LORA = {"kind": "lora", "rank": RANK, "alpha": ALPHA}
TUNERS: dict[str, dict[str, Any]] = {
    "full": {"tuner": {"kind": "full"}},
    "lora": {"tuner": LORA},
    "qlora": {"tuner": LORA, "model": {"quantize": "nf4", "double": True}},
    "bitfit": {"tuner": {"kind": "bitfit", "add": True}},
}


def forget_peak() -> None:
    """From here on the kernel counts this process's peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def posttrain(shape: str, steps: int, what: str, dtype: str) -> dict[str, Any]:
    """The stage as a user would run it."""
    from posttrain.pipeline.recipe import Recipe
    from posttrain.pipeline.run import Listener, run

    name = f"{what}-posttrain"
    shutil.rmtree(HOME / name, ignore_errors=True)
    changes = dict(TUNERS[what])
    model = {"path": str(model_folder(shape)), "dtype": dtype, **changes.pop("model", {})}
    optim = {"learning_rate": RATE, "schedule": "constant", "warmup": 0.0, "clip": 1.0}
    stage = {
        "model": model, "objective": "sft", "data": gsm8k(steps), "steps": steps, "batch": {"rows": ROWS}, "optim": optim,
        **changes,
    }  # fmt: skip
    peaks: list[float] = []

    def show(training: Any, _metrics: dict[str, float]) -> None:
        if training.step == 1:
            forget_peak()
        peaks.append(peak_megabytes())

    recipe = Recipe.model_validate({"name": name, "seed": SEED, "stages": {"train": stage}})
    lines = metrics(run(recipe, HOME, Listener(show=show)).model("train"))
    return {
        "seconds": [line["time"]["seconds"] for line in lines], "tokens": [line["tokens"] for line in lines],
        "losses": [line["loss/nll"] for line in lines], "peak": max(peaks[1:]),
    }  # fmt: skip


def trl(shape: str, steps: int, what: str, dtype: str) -> dict[str, Any]:
    """`SFTTrainer` with its defaults (gradient checkpointing; bf16 if `dtype` is mixed) on the same tokens, with peft's LoRA."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    mixed = dtype == "mixed"
    codes = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16" if mixed else "float32",
    )  # fmt: skip
    more = {"quantization_config": codes} if what == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(model_folder(shape), dtype="float32", **more)
    rows = sft_rows(shape, steps)
    data = Dataset.from_list([{"input_ids": tokens, "completion_mask": [int(mark) for mark in train]} for tokens, train in rows])
    watch, peaks = clock(), []
    arguments = SFTConfig(
        str(HOME / "tuners-trl"), report_to="none", use_cpu=True, bf16=mixed, per_device_train_batch_size=ROWS, max_steps=steps,
        learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, logging_first_step=True, save_strategy="no",
        disable_tqdm=True, completion_only_loss=True, train_sampling_strategy="sequential", max_grad_norm=1.0, weight_decay=0.0,
    )  # fmt: skip
    ended = watch.on_step_end

    def on_step_end(*given: Any, **named: Any) -> None:
        ended(*given, **named)
        if len(watch.times) == 2:
            forget_peak()
        peaks.append(peak_megabytes())

    watch.on_step_end = on_step_end
    tokenizer = AutoTokenizer.from_pretrained(model_folder(shape))
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[watch],
        peft_config=None if what == "full" else lora,
    )  # fmt: skip
    trainer.train()
    sizes = [len(tokens) for tokens, _ in rows]
    return {
        "seconds": watch.seconds(), "losses": watch.losses, "peak": max(peaks[1:]),
        "tokens": [sum(sizes[step * ROWS : (step + 1) * ROWS]) for step in range(steps)],
    }  # fmt: skip
