"""Preferences on HH rows: DPO and a reward model, the same pairs in the same updates, at the same learning rate."""

import copy
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_megabytes
from benchmarks.models import HOME, SEED, model_folder
from benchmarks.sft import BEGAN, clock, metrics

RATE = 1e-4
PAIRS = 8  # of an update: TRL's default batch
LONGEST = 512  # tokens of prompt and answer; longer pairs are dropped whole
OBJECTIVES = {"dpo": {"kind": "dpo", "beta": 0.1}, "reward": {"kind": "bradley_terry"}}
RANK, ALPHA = 16, 32


def hh(updates: int) -> dict[str, Any]:
    """The `data:` of a recipe: enough rows for the updates."""
    return {
        "sources": {"path": "posttrain:data/hh_helpful_train.jsonl.gz", "rows": f"0:{3 * updates * PAIRS}"},
        "format": "preference", "max_tokens": LONGEST,
    }  # fmt: skip


def folder_of(shape: str, work: str) -> Path:
    """The model that both begin with: a causal LM, or that LM with a score head."""
    return reward_folder(shape) if work == "reward" else model_folder(shape)


def reward_folder(shape: str) -> Path:
    folder = HOME / f"model-{shape}-reward"
    if not (folder / "config.json").is_file():
        from posttrain.data.render import Template
        from posttrain.models.load import load_scalar
        from posttrain.models.reward import save_reward_model
        from posttrain.training.roles import new_head

        loaded = load_scalar(model_folder(shape), new_head(SEED))
        save_reward_model(loaded.lm, loaded.tokenizer, Template(loaded.tokenizer).stop_ids, folder)
    return folder


@cache
def drawn(shape: str, updates: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) token ids in the order in which posttrain's stage draws them: for other trainers."""
    from transformers import AutoTokenizer

    from posttrain.data.dataset import Data
    from posttrain.data.render import Template
    from posttrain.data.stream import Stream

    data = Data.model_validate(hh(updates))
    rendered = data.render(data.read(), Template(AutoTokenizer.from_pretrained(model_folder(shape))))
    stream = Stream([len(each) for each in rendered.rows], None, SEED)
    found = []
    for source, row in stream.take(updates * PAIRS):
        (chosen, train), (rejected, _) = rendered.rows[source][row].sequences
        prompt = train.index(True)
        found.append((list(chosen[:prompt]), list(chosen[prompt:]), list(rejected[prompt:])))
    return found


def posttrain(shape: str, steps: int, work: str, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """The stage as a user would run it."""
    from posttrain import train

    folder = HOME / f"{work}-posttrain"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(HOME / "cache", ignore_errors=True)
    stage = train(
        HOME, folder.name, model={"path": str(folder_of(shape, work)), "dtype": dtype}, objective=OBJECTIVES[work],
        data=hh(steps), steps=steps, batch={"rows": PAIRS, **changes.pop("batch", {})}, seed=SEED,
        optim={"learning_rate": RATE, "schedule": "constant", "warmup": 0.0, "clip": 1.0}, **changes,
    )  # fmt: skip
    lines = metrics(stage)
    return {
        "first": lines[0]["time"]["at"] - lines[0]["time"]["seconds"] - BEGAN,
        "seconds": [line["time"]["seconds"] for line in lines],
        "tokens": [PAIRS] * steps,
        "losses": [line[f"loss/{'ranking' if work == 'reward' else 'preference'}"] for line in lines],
        "peak": peak_megabytes(),
    }


def trl(shape: str, steps: int, work: str, lora: bool = False, **options: Any) -> dict[str, Any]:
    """`DPOTrainer` or `RewardTrainer` on the same tokens; `options` go to its config."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
    from trl.trainer import dpo_trainer

    from posttrain import draws

    kinds: dict[str, Any] = {
        "dpo": (AutoModelForCausalLM, DPOConfig, DPOTrainer),
        "reward": (AutoModelForSequenceClassification, RewardConfig, RewardTrainer),
    }
    auto, config, trainer_kind = kinds[work]
    model = auto.from_pretrained(folder_of(shape, work), dtype="float32")
    rows = drawn(shape, steps)
    if work == "dpo":
        data = Dataset.from_list([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows])
    else:
        data = Dataset.from_list([{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in rows])

    class Ready(trainer_kind):  # type: ignore[misc]
        """With tokens that are made already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    own = {"ref_model": copy.deepcopy(model)} if work == "dpo" and not (lora or "precompute_ref_log_probs" in options) else {}
    watch = clock()
    arguments = config(
        str(HOME / f"{work}-trl"), report_to="none", use_cpu=True, per_device_train_batch_size=PAIRS, max_steps=steps,
        learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, logging_first_step=True, save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential", max_grad_norm=1.0, weight_decay=0.0, max_length=None, **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder_of(shape, work))
    plan = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    if lora:  # A is drawn after this call: the same A as posttrain's
        dpo_trainer.set_seed = lambda _seed: torch.manual_seed(draws.key(SEED, "tuner") % 2**63)
    trainer = Ready(
        model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[watch], peft_config=plan, **own
    )  # fmt: skip
    trainer.train()
    return {
        "first": watch.times[0] - BEGAN,
        "seconds": watch.seconds(),
        "tokens": [PAIRS] * steps,
        "losses": watch.losses,
        "peak": peak_megabytes(),
    }
