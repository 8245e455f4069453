"""What must hold for every objective under every tuner. Registered kinds are found; their examples are in example_batches.py."""

import hashlib
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from example_batches import EXAMPLES, IDLE, draw, only, rows
from tiny_fits import (
    OTHERS,
    TUNERS,
    Fixed,
    Shuffled,
    Watcher,
    beside,
    build,
    built_for,
    fitted,
    learners,
    moving,
    near,
    ready,
    update_of,
)
from tiny_models import make, twin
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.batch import Sequences
from posttrain.errors import ModelError
from posttrain.models.load import wrap
from posttrain.models.roles import Frozen, Roles
from posttrain.models.source import ModelSource
from posttrain.objectives import GRPO, PPO, XPO, Objective, OnlineDPO, OnPolicy
from posttrain.sampling import Sampling
from posttrain.sampling.engine import Engine, Request
from posttrain.text import Grade, Problem, Sample
from posttrain.training.fit import Learner, Training, count_units, fit, in_pieces
from posttrain.training.optim import AdamW
from posttrain.training.record import Recorder
from posttrain.training.settings import Checkpoints
from posttrain.training.updates import Item, Update
from posttrain.tuners import LoRA, Tuner, tuned

KINDS = {kind: cls for kind, cls in Objective.kinds.items() if ":" not in kind}
EXACT = {"float64": ("gpt2", 1e-10), "float32": ("llama", 1e-5)}  # gpt2, as the norms of llama go through float32

def called(example):
    return f"{example.name}-{example.batch.__name__}"


examples = pytest.mark.parametrize("example", EXAMPLES, ids=called)


def cases(chosen=EXAMPLES):
    """(tuner, example): every example under full, the first of each kind and sort of model under lora, and under each of the other
    tuners the first of all, and every few of the rest."""
    firsts = list({(each.kind, each.policy): each for each in reversed(chosen)}.values())[::-1]
    found = [(tuner, each) for tuner in TUNERS for each in chosen if tuner == "full" or each in firsts]
    dealt = [(place, tuner, each) for place, each in enumerate(firsts) for tuner in OTHERS]
    return found + [(tuner, each) for place, tuner, each in dealt if place == 0 or list(OTHERS)[place % len(OTHERS)] == tuner]


def under_tuners(chosen=EXAMPLES):
    return pytest.mark.parametrize(("tuner", "example"), cases(chosen), ids=[f"{t}-{called(each)}" for t, each in cases(chosen)])


def splits():
    """(dtype, tuner, example): all in float64; in float32 all under full, and each sort of model under the other tuners."""
    firsts = {each.policy: each for each in reversed(EXAMPLES)}.values()
    found = [(d, t, each) for d in EXACT for t, each in cases() if d == "float64" or t == "full" or each in firsts]
    return pytest.mark.parametrize(("dtype", "tuner", "example"), found, ids=[f"{d}-{t}-{called(each)}" for d, t, each in found])


def relative(one, other):
    return float((one - other).norm() / other.norm())


def total_of(lm, update):
    """The loss of a whole update, in one piece."""
    units = count_units(update)
    terms = [
        term / max(1, units[id(item.objective), name])
        for item in update.items
        for name, term in item.objective.loss(lm, item.batch).terms.items()
    ]
    return sum(terms)


def test_every_registered_objective_has_an_example_and_every_tuner_its_settings():
    missing = set(KINDS) - {example.kind for example in EXAMPLES}
    assert not missing, f"add an example batch for {sorted(missing)} to tests/example_batches.py"
    unknown = {kind for kind in Tuner.kinds if ":" not in kind} - set(TUNERS | OTHERS)
    assert not unknown, f"add small settings for the tuners {sorted(unknown)} to OTHERS"


@cache
def uneven(batch_of, policy):
    """A number of tokens at a time that cuts the batch into at least three pieces of unequal size."""
    example = next(each for each in EXAMPLES if (each.batch, each.policy) == (batch_of, policy))
    update = update_of(example, batch_of(built_for(example, "llama", "float32", "full")))
    assert [piece.batch.count for piece in in_pieces(update, 1)] == [1] * 8
    for micro_tokens in range(40, 400, 5):
        sizes = [piece.batch.count for piece in in_pieces(update, micro_tokens)]
        if len(sizes) >= 3 and len(set(sizes)) > 1:
            assert sum(sizes) == 8
            return micro_tokens
    raise AssertionError("this batch cannot be cut unevenly")


@splits()
def test_splitting_a_batch_does_not_change_the_gradient_or_the_figures(example, tuner, dtype):
    name, exactness = EXACT[dtype]
    lm = built_for(example, name, dtype, tuner)
    batch, roles = example.batch(lm), beside(example, lm)
    assert batch.count == 8
    assert len(set(batch.sequences[0].lengths.tolist())) > 4
    update = update_of(example, batch)
    whole, figures = fitted(lm, update, 10**6, roles)
    assert float(whole.norm()) > 1e-3
    for micro_tokens in (1, uneven(example.batch, example.policy)):
        split, same = fitted(lm, update, micro_tokens, roles)
        assert relative(split, whole) < exactness
        assert same == pytest.approx(figures, rel=1e-9 if dtype == "float64" else 1e-5, abs=1e-6)
    if tuner == "prefix":
        with pytest.raises(ModelError, match="a prefix needs layout: tree"):
            fitted(twin(lm, "padded"), update, 10**6, roles)
        return
    assert relative(fitted(twin(lm, "padded"), update, 10**6, roles)[0], whole) < exactness


def example(kind, **settings):
    return next(each for each in EXAMPLES if each.kind == kind and settings.items() <= each.settings.items())


def test_sft_is_the_weighted_log_likelihood_of_the_answers_counted_in_trained_tokens():
    lm = make("gpt2", "float64")
    plain = example("sft").batch(lm)
    weights = [1.0, 2.0, 0.5, 3.0, 0.0, 1.0, 0.25, 1.0]
    logp = lm.logprobs(plain).split([3, 0, 3, 9, 9, 0, 5, 5])
    for batch, weight in ((plain, [1.0] * 8), (replace(plain, weight=torch.tensor(weights)), weights)):
        expected = -sum(float(part.detach().sum()) * each for part, each in zip(logp, weight, strict=True))
        item = Item(Objective.lookup("sft")(), batch, [""] * 8)
        assert item.objective.units(batch) == {"nll": 34}
        assert float(total_of(lm, Update((item,))).detach()) == pytest.approx(expected / 34, rel=1e-12)


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_grpo_is_its_formula_token_by_token(aggregate, kl):
    lm = make("gpt2", "float64")
    batch = example("grpo", kl=0.3).batch(lm)
    logp = lm.logprobs(batch.seqs, temperature=batch.temperature).tolist()
    per_row = [[] for _ in range(8)]
    for owner, new, old, ref, good in zip(
        batch.seqs.owner.tolist(),
        logp,
        batch.sampled_logp.tolist(),
        batch.ref_logp.tolist(),
        batch.advantage.tolist(),
        strict=True,
    ):
        ratio = math.exp(new - old)
        gain = min(ratio * good, min(max(ratio, 0.8), 1.28) * good)
        per_row[owner].append(-gain + kl * (math.exp(ref - new) - 1 - (ref - new)))
    by_row = sum(sum(row) / len(row) for row in per_row if row) / 8
    by_token = sum(map(sum, per_row)) / 34
    item = Item(GRPO(aggregate=aggregate, kl=kl, clip_low=0.2, clip_high=0.28), batch, [""] * 8)
    found = float(total_of(lm, Update((item,))).detach())
    assert found == pytest.approx(by_row if aggregate == "sequence" else by_token, rel=1e-10)
    assert abs(by_row - by_token) > 0.01 * abs(by_row)


@examples
def test_the_units_of_the_pieces_add_up_to_those_of_the_update(example):
    update = update_of(example, example.batch(built_for(example, "llama", "float32", "full")))
    pieces = [count_units(Update((piece,))) for piece in in_pieces(update, uneven(example.batch, example.policy))]
    assert {key: sum(each[key] for each in pieces) for key in pieces[0]} == count_units(update)


@under_tuners([each for each in EXAMPLES if each.kind != "kto"])  # the order says whose answers its z is of
def test_the_order_of_the_rows_does_not_matter(example, tuner):
    lm = built_for(example, "gpt2", "float64", tuner)
    batch, roles = example.batch(lm), beside(example, lm)
    whole, figures = fitted(lm, update_of(example, batch), 60, roles)
    other, same = fitted(lm, update_of(example, only(batch, [3, 0, 5, 2, 7, 4, 1, 6])), 60, roles)
    assert relative(other, whole) < 1e-10
    assert same == pytest.approx(figures, rel=1e-9)


STOPPED = {"cispo", "vespo"}  # their weights follow the policy and have no gradient, by design


@under_tuners([each for each in EXAMPLES if each.kind not in STOPPED])
def test_the_gradient_is_the_finite_difference_of_the_loss(example, tuner):
    """What `annotate` has found is a constant of the update: no gradient flows through it, and none is missing."""
    lm = built_for(example, "gpt2", "float64", tuner)
    update = ready(lm, update_of(example, example.batch(lm)), beside(example, lm))
    parameters = list(moving(lm).values())
    exact = torch.autograd.grad(total_of(lm, update), parameters, allow_unused=True)
    start = [value.detach().clone() for value in parameters]
    for seed in range(2):
        draws = torch.Generator().manual_seed(seed)
        direction = [torch.randn(value.shape, generator=draws, dtype=torch.float64) for value in parameters]
        if tuner == "ia3":  # the scales of GPT-2's queries are held at 1: without a gradient, by design
            direction = [way * (grad != 0) if grad is not None else way for way, grad in zip(direction, exact, strict=True)]
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                for value, first, way in zip(parameters, start, direction, strict=True):
                    value.copy_(first + step * way)
                ends.append(float(total_of(lm, update)))
        slope = sum(float((grad * way).sum()) for grad, way in zip(exact, direction, strict=True) if grad is not None)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-6, abs=1e-7)


@under_tuners([each for each in EXAMPLES if each.idles])
def test_a_batch_with_nothing_to_train_gives_a_loss_without_gradient_that_back_propagates(example, tuner):
    """Where tokens are what is counted, it is zero; a pair without tokens has the loss of a margin of zero."""
    lm = built_for(example, "llama", "float32", tuner)
    (item,) = ready(lm, update_of(example, example.batch(lm)), beside(example, lm)).items
    batch = only(item.batch, IDLE)
    loss = item.objective.loss(lm, batch)
    assert all(term.requires_grad for term in loss.terms.values())
    sum(loss.terms.values()).backward()
    assert all(value.grad is None or value.grad.abs().max() == 0 for value in moving(lm).values())
    assert all(math.isfinite(float(total)) for total, _ in loss.stats.values())
    if item.objective.reads in ("Sequences", "Rollouts", "Valued", "Stepped"):
        assert {name: float(term.detach()) for name, term in loss.terms.items()} == dict.fromkeys(loss.terms, 0.0)
        gradient, figures = fitted(lm, update_of(example, batch), 10**6)
        assert gradient.abs().max() == 0
        assert all(math.isfinite(value) for value in figures.values())


@under_tuners()
def test_a_batch_of_no_rows_at_all_gives_a_zero_that_back_propagates_too(example, tuner):
    lm = built_for(example, "llama", "float32", tuner)
    (item,) = ready(lm, update_of(example, example.batch(lm)), beside(example, lm)).items
    for layout in ("tree", "padded"):
        loss = item.objective.loss(twin(lm, layout), item.batch.select([]))
        total = sum(loss.terms.values())
        assert float(total.detach()) == 0.0
        total.backward()
        assert all(value.grad is None or value.grad.abs().max() == 0 for value in moving(lm).values())


@under_tuners()
def test_frozen_means_frozen_and_the_optimizer_holds_nothing_else(example, tuner):
    lm = built_for(example, "llama", "float32", tuner)
    parameters, roles = moving(lm), beside(example, lm)
    everything = {**lm.state_dict(keep_vars=True), **{f"ref.{k}": v for k, v in reference_weights(roles).items()}}
    frozen = {name: value for name, value in everything.items() if not value.requires_grad}
    before = {name: digest(value) for name, value in {**frozen, **parameters}.items()}
    assert bool(set(frozen) - set(reference_weights(roles, "ref."))) == (tuner != "full")
    settings = AdamW(learning_rate=1e-2, warmup=0.0, schedule="constant", weight_decay=0.1)
    learning = learners(lm, settings)
    held = [id(value) for each in learning.values() for group in each.optimizer.param_groups for value in group["params"]]
    assert sorted(held) == sorted(id(value) for value in parameters.values())
    assert len(held) == len({id(value) for value in lm.parameters() if value.requires_grad})
    fit(Training(lm, learning, Fixed(update_of(example, example.batch(lm))), 2, roles), Watcher())
    assert {name: digest(value) for name, value in frozen.items()} == {name: before[name] for name in frozen}
    assert all(value.grad is None for value in frozen.values())
    still = [name for name, value in parameters.items() if digest(value) == before[name]]
    assert not still, f"these did not move: {still}"


def reference_weights(roles, prefix=""):
    found = {} if roles.reference is None else roles.reference.lm.state_dict(keep_vars=True)
    return {f"{prefix}{name}": value for name, value in found.items()}


@under_tuners()
def test_two_updates_a_resume_and_two_more_are_four_updates_bit_for_bit(example, tuner, tmp_path):
    settings = AdamW(learning_rate=1e-2, warmup=0.3, schedule="linear", weight_decay=0.1)
    start = built_for(example, "llama", "float32", tuner)
    batch, roles = example.batch(start), beside(example, start)

    def trained(folder, stop_at=None):
        lm = built_for(example, "llama", "float32", tuner)
        asked = replace(roles, controls=dict(roles.controls))
        run = Training(lm, learners(lm, settings), Shuffled(example, batch), 4, asked)
        record = Recorder(tmp_path / folder, "owner", Checkpoints(every=10))
        record.interrupted = lambda: "SIGTERM" if run.step == stop_at else None
        resumed = record.resume(run)
        fit(run, record)
        return resumed, run.step, {name: digest(value) for name, value in moving(lm).items()}, asked.controls

    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = trained("whole")
    assert trained("broken", stop_at=2)[:2] == (False, 2)
    again = trained("broken")
    assert again[:2] == (True, 4)
    assert again[2:] == whole[2:]


def digest(value):
    return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()


# ---- on policy


def sampled(lm, temperature, version=0):
    """Graded samples of two problems of the policy as it is."""
    engine = Engine(lm, Sampling(max_tokens=6, temperature=temperature), stop_ids=[1, 2, 3, 4, 5], seed=3)
    prompts = {"p": draw(19, 1), "q": draw(4, 2)}
    for name, prompt in prompts.items():
        for index in range(6):
            engine.add(Request(tuple(prompt), (name, index)))
    samples, grades = [], []
    while (done := engine.next()) is not None:
        prompt, (name, index) = done.request.tokens, done.request.address
        marks = (False,) * len(prompt) + (True,) * len(done.tokens)
        samples.append(Sample(Problem(name, ()), index, (*prompt, *done.tokens), marks, tuple(done.logp), done.stop, "", version))
        grades.append(Grade(None, failure="no answer") if (name, index) == ("q", 0) else Grade(float(sum(done.tokens) % 3)))
    return samples, grades


def one_item(objective, batch):
    return Update((Item(objective, batch, [""] * batch.count),))


RATIOS = {  # the others that sample compute log-probs anew, and know no ratio
    "grpo": {}, "dr_grpo": {"length": 12}, "dapo": {}, "gspo": {}, "cispo": {}, "rloo": {"kl": 0.0}, "reinforce_pp": {"kl": 0.0},
    "remax": {}, "sapo": {}, "vespo": {}, "ppo": {"kl": 0.0},
}  # fmt: skip


def test_every_objective_that_samples_is_tested_as_it_samples():
    assert {kind for kind, cls in KINDS.items() if issubclass(cls, OnPolicy)} == {*RATIOS, "online_dpo", "xpo"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mamba"])
@pytest.mark.parametrize("kind", RATIOS)
def test_in_the_first_update_every_ratio_is_one_and_nothing_is_clipped(kind, name, temperature):
    objective = Objective.lookup(kind)(**RATIOS[kind])
    lm = build(name, "float32", "full", policy="shared critic" if objective.trains else "lm")
    samples, grades = sampled(lm, temperature)
    greedy = [replace(one, by="greedy") for one in samples if one.index == 0] if "greedy" in objective.also_samples else []
    batch, owners = objective.credit(
        [*samples, *greedy], [*grades, *(Grade(0.25) for _ in greedy)], lm, Roles(controls=objective.controls()), temperature
    )
    assert batch.count == 11  # what could not be graded takes no part
    assert (owners.count("p"), owners.count("q")) == (6, 5)
    assert {one.stop for one in samples} == {"end", "length"}
    rolled = batch.rollouts if kind == "ppo" else batch
    with torch.no_grad():
        gap = lm.logprobs(rolled.seqs, temperature=temperature) - rolled.sampled_logp
    assert float(gap.abs().max()) < 1e-5
    _, figures = fitted(lm, one_item(objective, batch), 60)
    assert figures["ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["mismatch"] < 1e-5
    if kind not in {"sapo", "vespo"}:
        assert figures["clip_fraction"] == 0
    if kind == "ppo":
        assert figures["step_kl"] < 1e-9
        assert figures["value_clip_fraction"] == 0


@pytest.mark.parametrize("tuner", TUNERS)
def test_before_the_first_update_the_kl_to_the_reference_is_zero(tuner):
    lm, objective = build("llama", "float32", tuner, moved=False), GRPO(kl=0.1)
    settings = Tuner.lookup(tuner)(**TUNERS[tuner])
    switch = (lambda: settings.switched_off(lm.model)) if settings.reversible else None
    reference = Frozen(lm, switch) if switch else Frozen(make("llama"))
    samples, grades = sampled(lm, 0.7)
    batch, _ = objective.credit(samples, grades, lm, Roles(reference), 0.7)
    with torch.no_grad():
        assert torch.equal(batch.ref_logp, lm.logprobs(batch.seqs, temperature=0.7))
    assert fitted(lm, one_item(objective, batch), 10**6)[1]["kl"] == 0.0


def test_an_update_raises_the_probability_of_what_was_better_than_its_group():
    lm, objective = build("llama", "float32", "full"), GRPO()
    batch, _ = objective.credit(*sampled(lm, 1.0), lm, Roles(), 1.0)
    settings = AdamW(learning_rate=1e-3, warmup=0.0, schedule="constant")
    fit(Training(lm, learners(lm, settings), Fixed(one_item(objective, batch)), 1), Watcher())
    with torch.no_grad():
        change = lm.logprobs(batch.seqs) - batch.sampled_logp
    assert float((change * batch.advantage).sum()) > 0.1
    assert float(change[batch.advantage > 0].mean()) > 0 > float(change[batch.advantage < 0].mean())


# ---- proximal policy optimisation


@pytest.mark.parametrize("settings", [{}, {"kl": 0.3, "kl_estimator": "k3", "gamma": 0.9, "lam": 0.7}, {"no_end_score": None}])
def test_ppos_credit_is_its_formula_token_by_token(settings):
    """Reward: -kl times the divergence at each token, the score at the last one; advantages backwards within each answer."""
    lm = build("llama", "float32", "full", policy="critic")
    objective = PPO(whiten_advantages=False, no_end_penalty=0.5, **settings)
    roles = Roles(Frozen(near(lm)), controls=objective.controls(), micro_tokens=50)
    samples, grades = sampled(lm, 0.7)
    batch, owners = objective.credit(samples, grades, lm, roles, 0.7)
    kept = [(one, grade.score) for one, grade in zip(samples, grades, strict=True) if grade.score is not None]
    assert owners == [one.problem.id for one, _ in kept]
    for row, (one, score) in enumerate(kept):
        alone = Sequences.of([(one.tokens, one.sampled)])
        with torch.no_grad():
            states = lm.critic.model.model(torch.tensor([one.tokens])).last_hidden_state[0]
            before = [place - 1 for place, mark in enumerate(one.sampled) if mark]
            value = lm.critic.model.score(states)[before, 0].tolist()
            ref = roles.reference.lm.logprobs(alone, temperature=0.7).tolist()
        gap = [ours - theirs for ours, theirs in zip(one.logp, ref, strict=True)]
        spent = [math.expm1(-each) + each for each in gap] if settings.get("kl_estimator") == "k3" else gap
        reward = [-objective.kl * each for each in spent]
        if one.stop != "end":
            score = (score if "no_end_score" in settings else -1.0) - 0.5
        reward[-1] += score
        advantage, later, after = [0.0] * len(value), 0.0, 0.0
        for t in reversed(range(len(value))):
            later = reward[t] + objective.gamma * after - value[t] + objective.gamma * objective.lam * later
            advantage[t], after = later, value[t]
        own = batch.rollouts.seqs.owner == row
        assert batch.value[own].tolist() == pytest.approx(value, abs=1e-5)
        assert batch.rollouts.advantage[own].tolist() == pytest.approx(advantage, abs=2e-5)
        assert batch.returns[own].tolist() == pytest.approx([a + v for a, v in zip(advantage, value, strict=True)], abs=2e-5)
    assert len({one.stop for one, _ in kept}) == 2


def test_ppos_loss_is_its_formula_token_by_token():
    lm = build("gpt2", "float64", "full", policy="critic")
    objective = PPO(clip=0.1, dual_clip=1.2, value_clip=0.2, value_weight=0.3, entropy=0.05)
    batch = example("ppo").batch(lm)
    rolled = batch.rollouts
    policy = value = spread = 0.0
    hidden = lm.critic.model.transformer
    index = 0
    for tokens, marks in zip(rolled.seqs.rows(), mask_rows(rolled.seqs), strict=True):
        with torch.no_grad():
            logits = lm.model(torch.tensor([tokens])).logits[0] / 0.7
            values = lm.critic.model.score(hidden(torch.tensor([tokens])).last_hidden_state[0])[:, 0]
        for place in (place for place, mark in enumerate(marks) if mark):
            logp = logits[place - 1].log_softmax(-1)
            ratio = math.exp(float(logp[tokens[place]]) - float(rolled.sampled_logp[index]))
            good = float(rolled.advantage[index])
            gain = min(ratio * good, min(max(ratio, 0.9), 1.1) * good)
            policy -= max(gain, 1.2 * good) if good < 0 else gain
            new, old, wanted = float(values[place - 1]), float(batch.value[index]), float(batch.returns[index])
            held = min(max(new, old - 0.2), old + 0.2)
            value += 0.3 * 0.5 * max((new - wanted) ** 2, (held - wanted) ** 2)
            spread += float(-(logp.exp() * logp).sum())
            index += 1
    assert index == 34
    terms = objective.loss(lm, batch).terms
    found = {name: float(term.detach()) for name, term in terms.items()}
    assert found == pytest.approx({"policy": policy, "value": value, "entropy": -0.05 * spread}, rel=1e-9)
    assert objective.units(batch) == {"policy": 34, "value": 34, "entropy": 34}


def mask_rows(seqs):
    return [part.tolist() for part in seqs.train.split(seqs.lengths.tolist())]


def test_ppos_controller_moves_after_its_weight_was_used_and_by_the_answers_of_the_rollout():
    lm = build("llama", "float32", "full", policy="shared critic")
    objective = PPO(kl=0.1, kl_target=6.0, kl_horizon=110)
    roles = Roles(Frozen(near(lm, 0.1)), controls=objective.controls())
    before, _ = PPO(kl=0.1).credit(*sampled(lm, 1.0), lm, Roles(roles.reference, controls={"kl_weight": 0.1}), 1.0)
    batch, _ = objective.credit(*sampled(lm, 1.0), lm, roles, 1.0)
    assert torch.equal(batch.rollouts.advantage, before.rollouts.advantage), "this rollout is still under the old weight"
    rolled = batch.rollouts
    nats = float((rolled.sampled_logp - rolled.ref_logp).sum()) / 11
    error = min(0.2, max(-0.2, nats / 6 - 1))
    assert roles.controls["kl_weight"] == pytest.approx(0.1 * (1 + error * 11 / 110), rel=1e-6)
    assert roles.controls["kl_weight"] != 0.1


def test_the_critic_learns_by_its_own_optimizer_and_the_policy_by_its_own():
    lm = build("llama", "float32", "full", policy="critic")
    before = {name: digest(value) for name, value in moving(lm).items()}
    learning = learners(lm, AdamW(learning_rate=1e-3, warmup=0.0))
    still = AdamW(learning_rate=1e-30, warmup=0.0, weight_decay=0.0)
    learning["policy"] = Learner.of(learning["policy"].parameters, still)
    watcher = Watcher()
    fit(Training(lm, learning, Fixed(update_of(example("ppo"), example("ppo").batch(lm))), 2), watcher)
    moved = {name for name, value in moving(lm).items() if digest(value) != before[name]}
    assert moved == set(learning["critic"].parameters)
    assert watcher.metrics[1]["value_error"] < watcher.metrics[0]["value_error"]
    assert {"grad_norm", "grad_norm/critic"} <= set(watcher.metrics[0])


# ---- pairs that are sampled


def answered(ident, index, score, answer, stop="end", by="policy"):
    prompt = draw(6, len(ident))
    marks = (False,) * 6 + (True,) * len(answer)
    one = Sample(Problem(ident, ()), index, (*prompt, *answer), marks, (0.0,) * len(answer), stop, "", 0, by)
    return one, Grade(score, failure="no answer" if score is None else None)


def test_online_pairs_are_the_best_and_the_worst_answer_to_each_prompt():
    drawn = [
        answered("a", 0, 1.0, [7]), answered("a", 1, 3.0, [8, 8]), answered("a", 2, None, [9]), answered("a", 3, 2.0, [5]),
        answered("bb", 0, 1.0, [7]), answered("bb", 1, 1.0, [8]),  # a tie
        answered("ccc", 0, 1.0, [7, 7]), answered("ccc", 1, 0.0, [7, 7]),  # one answer, two grades
        answered("dddd", 0, 2.0, [4, 4], "length"), answered("dddd", 1, 1.5, [6]),
        answered("eeeee", 0, 1.0, [4]),
    ]  # fmt: skip
    samples, grades = zip(*drawn, strict=True)
    lm = make("llama")
    batch, owners = OnlineDPO().credit(samples, grades, lm, Roles(), 1.0)
    assert owners == ["a", "dddd"]
    assert [row[6:] for row in batch.chosen.rows()] == [[8, 8], [4, 4]]
    assert [row[6:] for row in batch.rejected.rows()] == [[7], [6]]
    assert batch.chosen.trained_lengths.tolist() == [2, 2]
    assert batch.theirs is None
    batch, _ = OnlineDPO(no_end_penalty=1.0).credit(samples, grades, lm, Roles(), 1.0)
    assert [row[6:] for row in batch.chosen.rows()] == [[8, 8], [6]]


def test_xpo_compares_each_answer_with_the_references_of_the_same_draw_and_lowers_what_that_said():
    drawn = [
        answered("a", 0, 1.0, [7]), answered("a", 1, 5.0, [6]), answered("bb", 0, 2.0, [8, 8]),
        answered("a", 0, 2.0, [9, 5, 4], by="reference"), answered("a", 1, 5.0, [2], by="reference"),
        answered("bb", 0, 0.0, [3], by="reference"),
    ]  # fmt: skip
    samples, grades = zip(*drawn, strict=True)
    lm = make("gpt2", "float64")
    objective = XPO(optimism=0.25)
    batch, owners = objective.credit(samples, grades, lm, Roles(), 1.0)
    assert owners == ["a", "bb"], "the second draw is a tie"
    assert [row[6:] for row in batch.chosen.rows()] == [[9, 5, 4], [8, 8]]
    assert [row[6:] for row in batch.rejected.rows()] == [[7], [3]]
    assert batch.theirs.tolist() == [True, False]
    with torch.no_grad():
        logp = float(lm.logprobs(Sequences.of([(samples[place].tokens, samples[place].sampled) for place in (3, 5)])).sum())
    loss = objective.loss(lm, batch)
    assert float(loss.terms["optimism"].detach()) == pytest.approx(0.25 * logp, rel=1e-9)
    assert objective.units(batch) == {"preference": 2, "optimism": 2}


@pytest.mark.parametrize("kind", ["online_dpo", "xpo"])
def test_the_first_pairs_that_are_sampled_have_a_margin_of_zero(kind):
    lm, objective = build("llama", "float32", "lora", moved=False), Objective.lookup(kind)()
    roles = Roles(Frozen(lm, lambda: LoRA(**TUNERS["lora"]).switched_off(lm.model)))
    samples, grades = sampled(lm, 1.0)
    if "reference" in objective.also_samples:  # every second answer is the reference's
        samples = [replace(one, index=one.index // 2, by=("policy", "reference")[one.index % 2]) for one in samples]
    batch, owners = objective.credit(samples, grades, lm, roles, 1.0)
    assert {"q"} <= set(owners) <= {"p", "q"}
    figures = fitted(lm, one_item(objective, batch), 60, roles)[1]
    assert figures["margin"] == pytest.approx(0, abs=1e-5)
    assert figures["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)


# ---- LoRA


def logp_of(lm):
    with torch.no_grad():
        return lm.logprobs(Sequences.of(rows()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_lora_changes_nothing_when_it_is_installed_bit_for_bit(name):
    before = logp_of(make(name))
    assert torch.equal(logp_of(build(name, "float32", "lora", moved=False)), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_lora_switched_off_is_the_base_and_merged_is_what_it_was(name):
    base, lm, tuner = logp_of(make(name)), build(name, "float32", "lora"), LoRA(**TUNERS["lora"])
    trained = logp_of(lm)
    assert float((trained - base).abs().mean()) > 0.01
    with tuner.switched_off(lm.model):
        assert torch.equal(logp_of(lm), base)
    assert torch.equal(logp_of(lm), trained)
    tuner.merge(lm.model)
    torch.testing.assert_close(logp_of(lm), trained, rtol=0, atol=1e-5)
    assert not [key for key in lm.model.state_dict() if "lora" in key]
    assert set(lm.model.state_dict()) == set(make(name).model.state_dict())


def test_at_first_only_b_has_a_gradient():
    lm = build("llama", "float32", "lora", moved=False)
    fitted_grads = torch.autograd.grad(lm.logprobs(Sequences.of(rows())).sum(), list(tuned(lm.model).values()))
    largest = {key: float(grad.abs().max()) for key, grad in zip(tuned(lm.model), fitted_grads, strict=True)}
    assert all(value == 0 for key, value in largest.items() if "lora_A" in key)
    assert all(value > 0 for key, value in largest.items() if "lora_B" in key)
    assert len(largest) == 2 * 7 * 2


@pytest.mark.parametrize(("rank", "targets", "expected"), [(16, "all-linear", 39_976_960), (8, ["q_proj", "v_proj"], 4_194_304)])
def test_the_number_of_lora_parameters_is_rank_times_inputs_and_outputs(rank, targets, expected):
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        LoRA(rank=rank, targets=targets).install(model)
    assert sum(value.numel() for value in tuned(model).values()) == expected


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_lora_adds_alpha_over_rank_times_b_a(rslora, scale):
    lm = make("llama")
    before = lm.model.model.layers[1].mlp.up_proj.weight.clone()
    tuner = LoRA(rank=4, alpha=16.0, rslora=rslora, targets=["up_proj"])
    tuner.install(lm.model)
    layer = lm.model.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    expected = before + scale * (b @ a)
    tuner.merge(lm.model)
    torch.testing.assert_close(lm.model.model.layers[1].mlp.up_proj.weight, expected, rtol=0, atol=1e-6)


def test_lora_trains_under_gradient_checkpointing_although_the_embeddings_are_frozen():
    found = []
    for saving in (False, True):
        lm = wrap(build("llama", "float32", "lora").model, ModelSource(path="tiny", gradient_checkpointing=saving))
        found.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(lm.logprobs(Sequences.of(rows())).sum(), list(tuned(lm).values()))]
            )
        )
    assert float(found[0].norm()) > 1e-3
    assert relative(found[1], found[0]) < 1e-6
