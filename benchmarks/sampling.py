"""Sampling: tokens a second at several batch sizes, from the same prompts with the same budget."""

import time
from typing import Any

from benchmarks.machine import peak_megabytes
from benchmarks.models import PROBLEMS, SEED, model_folder

BUDGET = 128


def prompts(shape: str, count: int) -> list[list[int]]:
    """Token ids of arithmetic problems as chats that wait for an answer."""
    from transformers import AutoTokenizer

    from posttrain.data.render import Template
    from posttrain.tasks import Task

    template = Template(AutoTokenizer.from_pretrained(model_folder(shape)))
    problems = Task.model_validate({"kind": "arithmetic", "source": PROBLEMS, "limit": count}).problems()
    return [list(template.prompt(problem.prompt)) for problem in problems]


def posttrain(shape: str, rows: int, dtype: str = "float32", repeats: int = 2) -> dict[str, Any]:
    from posttrain.models.load import load
    from posttrain.models.source import ModelSource
    from posttrain.sampling.engine import Engine, Request
    from posttrain.sampling.settings import Sampling

    loaded = load(ModelSource(path=str(model_folder(shape)), dtype=dtype))
    asked = prompts(shape, rows)

    def once() -> int:
        engine = Engine(loaded.lm, Sampling(max_tokens=BUDGET), [loaded.tokenizer.eos_token_id], SEED)
        for index, tokens in enumerate(asked):
            engine.add(Request(tuple(tokens), (index,)))
        count = 0
        while (done := engine.next()) is not None:
            count += len(done.tokens)
        return count

    return timed(once, repeats)


def generate(shape: str, rows: int, repeats: int = 2, bf16: bool = False, **options: Any) -> dict[str, Any]:
    """transformers' `generate` on the left-padded batch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder(shape), dtype=torch.bfloat16 if bf16 else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(shape), padding_side="left")
    batch = tokenizer.pad({"input_ids": prompts(shape, rows)}, return_tensors="pt")

    def once() -> int:
        out = model.generate(**batch, do_sample=True, max_new_tokens=BUDGET, top_k=0, **options)[:, batch["input_ids"].shape[1] :]
        ended = (out == tokenizer.eos_token_id).cumsum(1)
        return int(((ended - (out == tokenizer.eos_token_id).long()) == 0).sum())

    torch.manual_seed(SEED)
    return timed(once, repeats)


def continuous(shape: str, rows: int, repeats: int = 1) -> dict[str, Any]:
    """transformers' continuous batching."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(model_folder(shape), dtype=torch.float32, attn_implementation="sdpa")
    wanted = GenerationConfig(do_sample=True, max_new_tokens=BUDGET, eos_token_id=model.config.eos_token_id, top_k=0)
    wanted.pad_token_id = model.config.pad_token_id
    asked = prompts(shape, rows)

    def once() -> int:
        found = model.generate_batch(asked, generation_config=wanted, progress_bar=False)
        return sum(len(each.generated_tokens) for each in found.values())

    return timed(once, repeats)


def timed(once: Any, repeats: int) -> dict[str, Any]:
    once()
    seconds, tokens = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens.append(once())
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens": tokens, "peak": peak_megabytes()}
