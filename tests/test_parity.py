"""The same numbers as other people's code: transformers' and TRL's losses, gradients and advantages are the oracles.

What is compared with what, on one tiny Llama in float64 and with the tokens that posttrain's own templates render:

- SFT: `fit`'s pieces (`count_units`, `in_pieces`, `SFT.loss`) against `transformers.loss.loss_utils.fixed_cross_entropy` on
  float64 logits, against `transformers.Trainer.training_step`, and against `trl.SFTTrainer.compute_loss` on a data set that is
  already tokenised; all over an update cut into unequal micro-batches, with the token mean over the whole update.
- GRPO: samples and grades through `GRPO.credit` and `GRPO.loss` against `trl.GRPOTrainer`: its `_generate_and_score_completions`
  is handed the same completions by a rollout function and makes advantages, old and reference log-probs by itself, its
  `_compute_loss` the loss. TRL "grpo" is our `aggregate: sequence`, "dapo" our `aggregate: token`.

transformers and TRL compute their logits in float32 here, which is what the tolerance of 1e-6 is for; without them it is 1e-12.
"""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny_runs import base
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.loss.loss_utils import fixed_cross_entropy

from posttrain import losses
from posttrain.batch import Sequences
from posttrain.data.render import Template
from posttrain.models.load import Loaded, load
from posttrain.models.roles import Frozen, Roles
from posttrain.models.source import ModelSource
from posttrain.objectives import GRPO, SFT, Objective, PolicyGradient
from posttrain.objectives.grpo import CISPO, DAPO, GSPO, RLOO, SAPO, VESPO, DrGRPO
from posttrain.text import Conversation, Grade, Message, Problem, Sample
from posttrain.training.fit import count_units, in_pieces
from posttrain.training.updates import Item, Update

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
Row = tuple[list[int], list[bool]]
Gradients = dict[str, Tensor]
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
F32, F64 = 1e-6, 1e-12


def loaded(noise: float = 0.1, seed: int = 0) -> Loaded:
    """The tiny base in float64, moved a little, so that no two tokens are equally likely."""
    made = load(ModelSource(path=str(base()), dtype="float64"))
    moved(made.lm.model, noise, seed)
    return made


def moved(model: PreTrainedModel, noise: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))


def gradients(model: PreTrainedModel) -> Gradients:
    """Of every parameter, taken off the model."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(ours: tuple[float, Gradients], theirs: tuple[float, Gradients], tolerance: float) -> None:
    """The loss and the whole gradient relative to their size, and each parameter's gradient within twice of that."""
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert gradient.norm() > 0, f"{name} takes part"
        gap = float((ours[1][name] - gradient).norm() / gradient.norm())
        assert gap < 2 * tolerance, f"the gradient of {name} differs by {gap:.2g}"
    one, other = (torch.cat([each[1][name].flatten() for name in theirs[1]]) for each in (ours, theirs))
    assert (one - other).norm() / other.norm() < tolerance


def our_update(model: Loaded, objective: Objective, batch: Any, micro_tokens: int) -> tuple[float, Gradients]:
    """Loss and gradients of one update as `fit` makes them."""
    update = Update((Item(objective, batch, [str(row) for row in range(batch.count)]),))
    units, loss, pieces = count_units(update), 0.0, 0
    for item in in_pieces(update, micro_tokens):
        terms = objective.loss(model.lm, item.batch).terms
        total = sum(term / units[id(objective), name] for name, term in terms.items())
        assert isinstance(total, Tensor)
        total.backward()
        loss, pieces = loss + float(total.detach()), pieces + 1
    assert pieces > 1, "the update is cut into micro-batches"
    return loss, gradients(model.lm.model)


# ---- supervised fine-tuning


def rendered(template: Template) -> list[Row]:
    """Seven conversations of one to three answers, of very unequal length: 3 to 40 trained tokens."""
    draw, rows = random.Random(0), []
    for index in range(7):
        turns: list[Message] = []
        for turn in range(1 + index % 3):
            turns += [
                Message("user", f"What is {index} + {turn}?"),
                Message("assistant", "It is so." * draw.randrange(6) + "7"),
            ]
        rows.append(template.conversation(Conversation(tuple(turns))))
    return [(list(tokens), list(train)) for tokens, train in rows]


def examples(rows: list[Row]) -> list[dict[str, list[int]]]:
    """As transformers takes them: labels of -100 where nothing is learned."""
    return [
        {"input_ids": tokens, "labels": [token if mark else -100 for token, mark in zip(tokens, train, strict=True)]}
        for tokens, train in rows
    ]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows]) for name, value in fill.items()
    }
    batch["attention_mask"] = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    )
    return batch


@pytest.mark.parametrize("micro_tokens", [1, 60, 120])
def test_sft_is_the_token_mean_of_transformers_cross_entropy_over_the_whole_update(micro_tokens: int) -> None:
    """Against `fixed_cross_entropy` on float64 logits of single rows, so that only the formula is compared: 1e-12."""
    model = loaded()
    rows = rendered(Template(model.tokenizer))
    items = sum(sum(train) for _, train in rows)
    theirs = 0.0
    for row in examples(rows):
        logits = model.lm.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        loss = fixed_cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), num_items_in_batch=items)
        loss.backward()
        theirs += float(loss.detach())
    expected = theirs, gradients(model.lm.model)
    assert_same(our_update(model, SFT(), Sequences.of(rows), micro_tokens), expected, F64)


@pytest.mark.parametrize("sizes", [(3, 3, 1), (1, 6), (2, 2, 2, 1)])
def test_sft_equals_the_update_of_transformers_trainer_over_unequal_micro_batches(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """`Trainer.get_batch_samples` counts the tokens of the update, `Trainer.training_step` adds up the gradients."""
    model = loaded()
    rows = rendered(Template(model.tokenizer))
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, gradient_accumulation_steps=len(sizes), disable_tqdm=True
    )
    trainer = Trainer(model.lm.model, arguments)
    flat, batches = examples(rows), []
    for size in sizes:
        batches.append(padded(flat[:size]))
        flat = flat[size:]
    samples, items = trainer.get_batch_samples(iter(batches), len(sizes), torch.device("cpu"))
    assert int(items) == sum(sum(train) for _, train in rows)
    trainer.current_gradient_accumulation_steps = len(samples)
    theirs = sum(float(trainer.training_step(model.lm.model, each, items)) for each in samples)
    expected = theirs, gradients(model.lm.model)
    model.lm.model.eval()
    assert_same(our_update(model, SFT(), Sequences.of(rows), 60), expected, F32)
    means = sum(float(model.lm.model(**each).loss.detach()) for each in batches) / len(batches)
    assert abs(means / theirs - 1) > 1e-3, "a mean of means would have been something else"


@pytest.mark.parametrize("masks", ["completion_mask", "assistant_masks"])
def test_sft_equals_trls_sft_trainer_on_the_same_tokens(masks: str, tmp_path: Path) -> None:
    """`SFTTrainer` with `loss_type="nll"` on pre-tokenised rows with a mask; its collator, its counts, its `compute_loss`."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = loaded()
    rows = rendered(Template(model.tokenizer))
    ours = our_update(model, SFT(), Sequences.of(rows), 60)
    arguments = trl.SFTConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=3, gradient_accumulation_steps=3,
        completion_only_loss=True if masks == "completion_mask" else None, loss_type="nll", gradient_checkpointing=False,
        disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": tokens, masks: [int(mark) for mark in train]} for tokens, train in rows])
    trainer = trl.SFTTrainer(model.lm.model, args=arguments, train_dataset=data, processing_class=model.tokenizer)
    samples, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 3, torch.device("cpu"))
    assert sorted(len(each["input_ids"]) for each in samples) == [1, 3, 3]
    assert int(items) == sum(sum(train) for _, train in rows)
    theirs = 0.0
    for each in samples:
        loss = trainer.compute_loss(model.lm.model, each, num_items_in_batch=items)
        loss.backward()
        theirs += float(loss.detach())
    assert_same(ours, (theirs, gradients(model.lm.model)), F32)


# ---- GRPO

GROUPS, GROUP = 3, 4
SCORES = [1.0, 0.0, 0.25, 0.0, 0.5, 0.5, 0.5, 0.5, 3.0, -1.0, 0.0, 1.0]


def completions(end: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) token ids: GROUPS prompts of unequal length with GROUP completions of 1 to 9 tokens each."""
    draw, found = random.Random(1), []
    for group in range(GROUPS):
        prompt = [draw.randrange(6, 300) for _ in range(3 + 2 * group)]
        for index in range(GROUP):
            length = 1 + (5 * index + 3 * group) % 9
            found.append((prompt, [draw.randrange(6, 300) for _ in range(length - 1)] + [end]))
    return found


def oracle(
    model: Loaded, folder: Path, scores: list[float | None] | None = None, more: list[float] | None = None, **changes: Any
) -> tuple[Any, Callable[[], dict[str, Tensor]]]:
    """A TRL GRPO trainer around the model; the function returns its scored batch of `completions`.

    Twelve samples are two micro-batches of one update; two iterations, so that old log-probs are kept. more: a second reward.
    """
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    pairs = completions(model.tokenizer.eos_token_id)
    given: list[Any] = list(SCORES if scores is None else scores)

    def rollout(prompts: list[Any], _trainer: Any) -> dict[str, Any]:
        assert len(prompts) == len(pairs)
        answers = [answer for _, answer in pairs]
        logp = [[0.0] * len(answer) for answer in answers]
        return {"prompt_ids": [prompt for prompt, _ in pairs], "completion_ids": answers, "logprobs": logp}

    def reward(completions: list[str], **_: Any) -> list[Any]:
        assert len(completions) == len(given)
        return given

    rewards: list[Any] = [reward] if more is None else [reward, lambda completions, **_: more]
    settings = {"use_bias_correction_kl": False, "epsilon": CLIP_LOW, "epsilon_high": CLIP_HIGH, **changes}
    arguments = trl.GRPOConfig(
        str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        per_device_train_batch_size=6, gradient_accumulation_steps=2, num_generations=GROUP, num_iterations=2, **settings,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "any"}] * len(pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.GRPOTrainer(
            model.lm.model, rewards, args=arguments, train_dataset=data, processing_class=model.tokenizer, rollout_func=rollout
        )
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    return trainer, lambda: trainer._generate_and_score_completions([{"prompt": "any"}] * len(pairs))


def their_update(
    trainer: Any, batch: dict[str, Tensor], parts: tuple[slice, ...] = (slice(0, 6), slice(6, 12))
) -> tuple[float, Gradients]:
    loss = 0.0
    for part in parts:
        each = trainer._compute_loss(trainer.model, {name: value[part] if value.ndim else value for name, value in batch.items()})
        each.backward()
        loss += float(each.detach())
    return loss, gradients(trainer.model)


def sampled(model: Loaded, temperature: float) -> list[Sample]:
    """The same completions as our sampler would hand them over, with the log-probs of the model as it is."""
    found = []
    for index, (prompt, answer) in enumerate(completions(model.tokenizer.eos_token_id)):
        marks = [False] * len(prompt) + [True] * len(answer)
        with torch.no_grad():
            logp = model.lm.logprobs(Sequences.of([(prompt + answer, marks)]), temperature=temperature)
        problem = Problem(f"p{index // GROUP}", (Message("user", "any"),))
        found.append(Sample(problem, index % GROUP, (*prompt, *answer), tuple(marks), tuple(logp.tolist()), "end", ""))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize(("loss_type", "aggregate"), [("grpo", "sequence"), ("dapo", "token")])
def test_grpos_loss_and_gradients_equal_trls(
    loss_type: str, aggregate: Literal["sequence", "token"], kl: float, temperature: float, tmp_path: Path
) -> None:
    """A reference, a policy that sampled, a policy that learns: three sets of weights; ratios clipped on both sides."""
    model, reference = loaded(), loaded()
    trainer, scored = oracle(model, tmp_path, loss_type=loss_type, beta=kl, temperature=temperature)
    if kl:
        trainer.ref_model.load_state_dict(reference.lm.model.state_dict())  # TRL reads its reference from the folder
    moved(model.lm.model, 0.03, seed=5)
    batch, samples = scored(), sampled(model, temperature)
    objective = GRPO(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, aggregate=aggregate, kl=kl)
    grades = [Grade(score) for score in SCORES]
    rollouts, _ = objective.credit(samples, grades, model.lm, Roles(Frozen(reference.lm)), temperature)
    lengths = [len(sample.logp) for sample in samples]
    assert batch["completion_mask"].sum(1).tolist() == lengths == rollouts.seqs.trained_lengths.tolist()
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_per_token_logps"][mask], rollouts.sampled_logp, rtol=0, atol=5e-6)
    moved(model.lm.model, 0.02, seed=6)  # since it sampled
    theirs = their_update(trainer, batch)
    model.lm.model.eval()
    with torch.no_grad():
        ratio = (model.lm.logprobs(rollouts.seqs, temperature=temperature) - rollouts.sampled_logp).exp()
    up, down = rollouts.advantage > 0, rollouts.advantage < 0
    assert ((ratio > 1 + CLIP_HIGH) & up).any(), "clipped above"
    assert ((ratio < 1 - CLIP_LOW) & down).any(), "clipped below"
    assert ((ratio > 1 - CLIP_LOW) & (ratio < 1 + CLIP_HIGH)).any(), "and not everywhere"
    assert_same(our_update(model, objective, rollouts, 30), theirs, F32)


WHOLE = "means over the tokens of a micro-batch"
FAMILY: list[tuple[PolicyGradient, dict[str, Any]]] = [
    (DrGRPO(length=9), {"loss_type": "dr_grpo", "max_completion_length": 9, "scale_rewards": "none"}),
    (GRPO(aggregate="token"), {"loss_type": "bnpo", WHOLE: True}),
    (GRPO(ratio="sequence_mean"), {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    (GSPO(kl=0.3, clip_low=0.02, clip_high=0.03), {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03, "beta": 0.3,
    }),
    (GRPO(ratio="sequence_mean", aggregate="sum"), {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    (GRPO(dual_clip=1.1, clip_high=0.05), {"loss_type": "grpo", "delta": 1.1, "epsilon_high": 0.05}),
    (GRPO(kl=0.3, kl_as="weighted"), {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True}),
    (DAPO(entropy=0.2), {"loss_type": "dapo", "entropy_coef": 0.2, WHOLE: True}),
    (DAPO(top_entropy=0.3, entropy=0.2, kl=0.3), {
        "loss_type": "dapo", "top_entropy_quantile": 0.3, "entropy_coef": 0.2, "beta": 0.3, WHOLE: True,
    }),
    (CISPO(cap=1.05), {"loss_type": "cispo", "epsilon_high": 1.05}),
    (SAPO(), {"loss_type": "sapo"}),
    (VESPO(), {"loss_type": "vespo"}),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "changes"), FAMILY, ids=[f"{index}-{ours.kind}" for index, (ours, _) in enumerate(FAMILY)])
def test_the_familys_losses_and_gradients_equal_trls(objective: PolicyGradient, changes: dict[str, Any], tmp_path: Path) -> None:
    """Every `loss_type` of TRL's and its switches, after the policy has moved on; those that TRL averages over the tokens of a
    micro-batch in one piece, as ours are over the update."""
    model, reference, changes = loaded(), loaded(), dict(changes)
    whole = changes.pop(WHOLE, False)
    trainer, scored = oracle(model, tmp_path, **changes)
    if objective.kl:
        trainer.ref_model.load_state_dict(reference.lm.model.state_dict())
    moved(model.lm.model, 0.03, seed=5)
    batch, samples = scored(), sampled(model, 1.0)
    if "clip_low" in type(objective).model_fields and objective.kind != "gspo":
        objective = objective.model_copy(update={"clip_low": CLIP_LOW, "clip_high": changes.get("epsilon_high", CLIP_HIGH)})
    roles = Roles(Frozen(reference.lm))
    rollouts, _ = objective.credit(samples, [Grade(score) for score in SCORES], model.lm, roles, 1.0)
    moved(model.lm.model, 0.02, seed=6)  # since it sampled
    if whole:
        trainer.current_gradient_accumulation_steps = 1
        batch["num_items_in_batch"] = batch["num_items_in_batch"] * 0 + batch["completion_mask"].sum()
        trainer.args.steps_per_generation = 1
    theirs = their_update(trainer, batch, (slice(0, 12),) if whole else (slice(0, 6), slice(6, 12)))
    model.lm.model.eval()
    with torch.no_grad():
        rollouts = objective.annotate(rollouts, model.lm, roles)
    assert_same(our_update(model, objective, rollouts, 30), theirs, F32 if objective.level == "token" else 1e-5)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_rloos_loss_and_gradients_equal_trls(kl: float, tmp_path: Path) -> None:
    """TRL takes the sum of the differences to the reference from the reward, and clips the ratio of the whole answer."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, reference = loaded(), loaded()
    pairs = completions(model.tokenizer.eos_token_id)
    arguments = trl.RLOOConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        per_device_train_batch_size=12, gradient_accumulation_steps=1, num_generations=GROUP, num_iterations=2, beta=kl,
        epsilon=CLIP_LOW, epsilon_high=CLIP_HIGH,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "any"}] * len(pairs))
    trainer: Any = trl.RLOOTrainer(
        model.lm.model, lambda **_: SCORES, args=arguments, train_dataset=data, processing_class=model.tokenizer
    )
    trainer._tokenize_prompts = lambda _prompts: ([prompt for prompt, _ in pairs], None, {})
    trainer._generate_single_turn = lambda *_: [answer for _, answer in pairs]
    if kl:
        trainer.ref_model.load_state_dict(reference.lm.model.state_dict())
    moved(model.lm.model, 0.03, seed=5)
    trainer.model.train()
    batch, samples = trainer._generate_and_score_completions([{"prompt": "any"}] * len(pairs)), sampled(model, 1.0)
    objective = RLOO(kl=kl, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
    rollouts, _ = objective.credit(samples, [Grade(score) for score in SCORES], model.lm, Roles(Frozen(reference.lm)), 1.0)
    ours = rollouts.advantage[rollouts.seqs.trained_lengths.cumsum(0) - 1]
    torch.testing.assert_close(ours, batch["advantages"].float(), rtol=1e-5, atol=1e-5)
    moved(model.lm.model, 0.02, seed=6)  # since it sampled
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    theirs = float(loss.detach()), gradients(trainer.model)
    model.lm.model.eval()
    assert_same(our_update(model, objective, rollouts, 30), theirs, 1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "scores",
    [
        SCORES,
        [1.0, 0.0, 0.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0],
        [100.0, 101.0, 99.5, 100.0, -3.0, 7.0, 7.0, 7.0, 1e-3, 2e-3, 1e-3, 1e-3],
    ],
)
def test_advantages_equal_trls_own_normalisation(scale: str, scores: list[float], tmp_path: Path) -> None:
    """`scale_rewards` against `losses.group_advantages`; where a group's scores are all equal ours are exactly zero."""
    _, scored = oracle(loaded(), tmp_path, scores, scale_rewards=scale, beta=0.0)
    groups = torch.arange(GROUPS).repeat_interleave(GROUP)
    ours = losses.group_advantages(torch.tensor(scores), groups, scale)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, scored()["advantages"], rtol=1e-6, atol=1e-6)
    for group in range(GROUPS):
        members = scores[group * GROUP : (group + 1) * GROUP]
        assert (len(set(members)) == 1) == bool((ours[groups == group] == 0).all())


def test_rewards_that_are_normalised_each_have_the_advantages_of_trls(tmp_path: Path) -> None:
    """GDPO: `multi_objective_aggregation: normalize_then_sum`."""
    lengths = [3.0, 9.0, 4.0, 4.0, 100.0, 250.0, 180.0, 90.0, 7.0, 7.0, 7.0, 7.0]
    weights = {"right": 1.0, "short": -0.5}
    model = loaded()
    _, scored = oracle(
        model, tmp_path, None, lengths, beta=0.0, multi_objective_aggregation="normalize_then_sum", reward_weights=[1.0, -0.5]
    )
    grades = [
        Grade(score - 0.5 * length, {"right": score, "short": length}, weights=weights)
        for score, length in zip(SCORES, lengths, strict=True)
    ]
    batch, _ = GRPO(rewards="each").credit(sampled(model, 1.0), grades, model.lm, Roles(), 1.0)
    ours = batch.advantage[batch.seqs.trained_lengths.cumsum(0) - 1]
    torch.testing.assert_close(ours, scored()["advantages"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_sample_that_could_not_be_graded_takes_no_part_in_a_baseline_as_in_trl(scale: Any, tmp_path: Path) -> None:
    """TRL: a reward of None; ours: a grade that is a failure, which is not in the batch at all."""
    scores: list[float | None] = [*SCORES]
    scores[1] = scores[10] = None
    model = loaded()
    _, scored = oracle(model, tmp_path, scores, scale_rewards=scale, beta=0.0)
    grades = [Grade(score, failure=None if score is not None else "no answer") for score in scores]
    batch, _ = GRPO(scale=scale).credit(sampled(model, 1.0), grades, model.lm, Roles(), 1.0)
    ours = batch.advantage[batch.seqs.trained_lengths.cumsum(0) - 1]
    theirs = scored()["advantages"]
    torch.testing.assert_close(ours, theirs[[score is not None for score in scores]], rtol=1e-6, atol=1e-6)
    assert theirs[[1, 10]].tolist() == [0.0, 0.0]
