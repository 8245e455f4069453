"""A whole step of GRPO: some prompts, the samples of each, at most 128 tokens, one update. Every sample has an advantage."""

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.machine import peak_megabytes
from benchmarks.models import HOME, PROBLEMS, SEED, model_folder
from benchmarks.sft import BEGAN, RATE, clock, metrics
from posttrain.data.source import Source
from posttrain.tasks.grader import Grader
from posttrain.text import Grade, Problem

SAMPLES, GROUP, BUDGET = 32, 8, 128  # of an update; of a prompt, by default


class Letters(Grader):
    """The number of different characters in a text: two samples rarely have the same."""

    def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(letters(text))


def letters(text: str) -> float:
    return len(set(text)) + len(text) / 1000


def problems(count: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Prompts of at least so many tokens of tiny-base's tokenizer: story problems, one after another. 0: as they are."""
    rows = [raw.value for raw in Source.model_validate({**PROBLEMS, "rows": "0:4000"}).read()]
    texts = [row["prompt"][-1]["content"] for row in rows]
    for index in range(count):
        number, prompt = index, texts[index]
        while len(prompt) < 3.2 * tokens:  # characters of a token
            number = (number + 977) % len(texts)
            prompt += "\n" + texts[number]
        yield {"id": f"problem-{index}", "prompt": prompt, "answer": "0"}


def source(steps: int, group: int, prompt: int) -> dict[str, Any]:
    arguments = {"count": steps * (SAMPLES // group), "tokens": prompt}
    return {"kind": "function", "path": "benchmarks.grpo:problems", "arguments": arguments}


def posttrain(
    shape: str, steps: int, dtype: str = "float32", group: int = GROUP, prompt: int = 0, **changes: Any
) -> dict[str, Any]:
    """The stage as a user would run it."""
    from posttrain import train

    folder = HOME / "grpo-posttrain"
    shutil.rmtree(folder, ignore_errors=True)
    stage = train(
        HOME, folder.name, model={"path": str(model_folder(shape)), "dtype": dtype},
        objective={"kind": "grpo", "aggregate": "token"},
        task={"kind": "problems", "source": source(steps, group, prompt), "grader": "benchmarks.grpo:Letters"},
        rollout={"problems": SAMPLES // group, "per_problem": group, "sampling": {"max_tokens": BUDGET}, "audit": 0}, steps=steps,
        optim={"learning_rate": RATE, "schedule": "constant", "warmup": 0.0, "clip": 1.0}, seed=SEED, **changes,
    )  # fmt: skip
    lines = metrics(stage)
    return {
        "first": lines[0]["time"]["at"] - lines[0]["time"]["seconds"] - BEGAN,
        "seconds": [line["time"]["seconds"] for line in lines],
        "tokens": [round(line["length"] * SAMPLES) for line in lines],
        "rewards": [line["reward"] for line in lines],
        "mismatch": max(line["mismatch"] for line in lines),
        "peak": peak_megabytes(),
    }


def trainer(
    shape: str, steps: int, watch: Any = None, group: int = GROUP, prompt: int = 0, **options: Any
) -> tuple[Any, list[int]]:
    """TRL's `GRPOTrainer` on the same problems, and the list to which it appends the tokens of each rollout."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from posttrain.tasks import Task

    task = Task.model_validate({"kind": "problems", "source": source(steps, group, prompt), "grader": "exact"})
    chats = [[{"role": each.role, "content": each.content} for each in problem.prompt] for problem in task.problems()]
    tokens: list[int] = []

    def reward(completions: Any, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [letters(each[0]["content"]) for each in completions]

    options = {"per_device_train_batch_size": GROUP, **options}
    together = options["per_device_train_batch_size"]
    arguments = GRPOConfig(
        str(HOME / "grpo-trl"), report_to="none", use_cpu=True, num_generations=group, max_completion_length=BUDGET,
        max_steps=steps, gradient_accumulation_steps=SAMPLES // together, learning_rate=RATE,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", disable_tqdm=True, max_grad_norm=1.0, weight_decay=0.0,
        shuffle_dataset=False, **options,
    )  # fmt: skip
    made = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder(shape), dtype="float32"), reward, args=arguments,
        train_dataset=Dataset.from_list([{"prompt": chat} for chat in chats]), callbacks=[watch] if watch else None,
        processing_class=AutoTokenizer.from_pretrained(model_folder(shape)),
    )  # fmt: skip
    return made, tokens


def trl(shape: str, steps: int, **options: Any) -> dict[str, Any]:
    """`options` go to `GRPOConfig`, whose defaults are bf16 and gradient checkpointing."""
    watch = clock()
    made, tokens = trainer(shape, steps, watch, **options)
    made.train()
    return {"first": watch.times[0] - BEGAN, "seconds": watch.seconds(), "tokens": tokens, "peak": peak_megabytes()}


def agreement(shape: str) -> dict[str, float]:
    """A batch that TRL sampled and credited, in float32: the gap of the loss and of the whole gradient, relative.

    With every ratio 1 the loss is a weighted mean of advantages about zero: its gap is relative to their mean size. A model that
    is sure of its tokens has gradients that float32 itself knows badly: `ours` and `theirs` are the gaps to float64.
    """
    import torch

    from posttrain.batch import Rollouts, Sequences
    from posttrain.models.load import wrap
    from posttrain.models.source import ModelSource
    from posttrain.objectives import GRPO

    made, _ = trainer(shape, 1, bf16=False, gradient_checkpointing=False)
    made.current_gradient_accumulation_steps = SAMPLES // GROUP
    rows = [made.train_dataset[index // GROUP] for index in range(SAMPLES)]
    batch = made._generate_and_score_completions(rows)
    theirs = torch.zeros(())
    for part in (slice(first, first + GROUP) for first in range(0, SAMPLES, GROUP)):
        loss = made._compute_loss(made.model, {name: value[part] if value.ndim else value for name, value in batch.items()})
        loss.backward()
        theirs += loss.detach()
    expected = torch.cat([parameter.grad.flatten() for parameter in made.model.parameters()])
    made.model.zero_grad()

    pairs, credit = [], []
    for row in range(len(rows)):
        prompt, answer = (
            batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist() for name in ("prompt", "completion")
        )
        pairs.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
        credit += [batch["advantages"][row]] * len(answer)
    seqs, objective, advantage = Sequences.of(pairs), GRPO(aggregate="token"), torch.stack(credit)

    def ours(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        lm = wrap(made.model.to(getattr(torch, dtype)), ModelSource(path="the model", dtype=dtype))
        lm.model.zero_grad()
        with torch.no_grad():
            logp = lm.logprobs(seqs)
        rollouts = Rollouts(seqs, logp, advantage.to(logp.dtype), torch.zeros(len(rows), dtype=torch.long))
        total = objective.loss(lm, rollouts).terms["policy"] / seqs.trained
        total.backward()
        return total.detach(), torch.cat([parameter.grad.flatten() for parameter in lm.model.parameters()])

    def gap(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one.double() - other.double()).norm() / other.double().norm())

    (loss, found), (_, exact) = ours("float32"), ours("float64")
    return {
        "loss": float((loss - theirs).abs() / advantage.abs().mean()),
        "gradient": gap(found, expected),
        "ours": gap(found, exact),
        "theirs": gap(expected, exact),
    }
