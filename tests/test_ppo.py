"""Proximal policy optimisation as a whole: what a token is rewarded with, who gets the credit, what moves, and where it ends."""

import copy
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from test_reward_models import inline, made
from tiny_models import make
from torch import nn, tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from posttrain.batch import Rollouts, Sequences, Valued
from posttrain.data.render import Template
from posttrain.errors import ModelError
from posttrain.models.actor_critic import ActorCritic, ValueHead
from posttrain.models.lm import LM
from posttrain.models.load import load, load_scalar
from posttrain.models.reward import save_reward_model
from posttrain.models.roles import Frozen, Roles
from posttrain.models.scalar import ScalarLM
from posttrain.models.source import ModelSource
from posttrain.objectives import Objective
from posttrain.pipeline.recipe import Recipe
from posttrain.rl import Drawer, OnPolicyStream, Rollout
from posttrain.sampling import InProcess, Sampling
from posttrain.tasks.grader import Grader
from posttrain.text import Grade, Message, Problem, Sample
from posttrain.training.fit import Learner, Training, fit
from posttrain.training.optim import AdamW
from posttrain.training.record import Recorder
from posttrain.training.roles import actor_critic, frozen_roles, new_head
from posttrain.training.session import Rows, Session, make_updates, train
from posttrain.training.settings import Checkpoints, TrainSettings
from posttrain.training.updates import SampledUpdates
from posttrain.tuners import tuned

SUMS = [(a, b) for a in range(1, 4) for b in range(1, 3)]
STOPS = frozenset(range(110))  # of 403 tokens: about a quarter of the draws ends an answer
TASK = {
    "kind": "problems",
    "grader": {"kind": "function", "path": "test_ppo:charm"},
    "source": {"kind": "inline", "items": [{"id": f"p{a}{b}", "prompt": f"What is {a} + {b}?", "answer": "7"} for a, b in SUMS]},
}


def charm(_problem, text):
    """A score that differs between samples of a random model, and depends on the text alone."""
    return float(sum(map(ord, text)) % 5)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A policy to start from, another one, and a reward model of the same family whose scores have a shift."""
    folder = tmp_path_factory.mktemp("ppo")
    made(folder / "start")
    made(folder / "other", seed=1)
    reward = load_scalar(made(folder / "third", seed=2), new_head(5))
    reward.lm.shift = 0.25
    save_reward_model(reward.lm, reward.tokenizer, Template(reward.tokenizer).stop_ids, folder / "reward")
    return folder


def ppo(**settings):
    return Objective.lookup("ppo")(**settings)


class Seen:
    """A record that keeps the figures of each step."""

    def __init__(self):
        self.figures = []

    def step(self, run, update, figures, seconds):
        self.figures.append(figures)

    def end(self, run):
        pass


def prepared(home, folder, objective, stops=STOPS, **changes):
    """A training as `session.train` puts it together, not begun. Answers end at one of `stops`."""
    plan = {"task": TASK, "steps": 2, "optim": {"learning_rate": 0.01, "warmup": 0.0, "clip": None}, "rollout": rollout()}
    settings = TrainSettings.model_validate({"model": str(home / "start"), "objective": objective, **plan, **changes})
    loaded = load(settings.model)
    template = Template(loaded.tokenizer)
    template.stop_ids = stops
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings.tuner.install(loaded.lm.model)
    learners = {"policy": Learner.of(tuned(loaded.lm.model), settings.optim)}
    policy = loaded.lm
    if settings.critic is not None:
        policy, learners["critic"] = actor_critic(settings, settings.critic, loaded.lm, loaded.tokenizer, 0)
    roles = frozen_roles(settings, loaded, learners["policy"].parameters)
    updates, steps = make_updates(settings, Session(folder, "owner"), policy, template, roles, Rows.read(settings))
    return Training(policy, learners, updates, steps, roles, micro_tokens=200)


def rollout(temperature=1.0, max_tokens=6, **changes):
    return {"problems": 3, "per_problem": 4, "sampling": {"max_tokens": max_tokens, "temperature": temperature}, **changes}


CRITICS = {"shared": {"shared": True}, "own": {}}


# ---- a rollout as it is


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(("tuner", "temperature"), [("full", 1.0), ("full", 0.7), ("lora", 0.7)])
def test_in_the_first_minibatch_every_ratio_is_one_and_nothing_is_clipped(critic, tuner, temperature, home, tmp_path):
    plan = rollout(temperature, epochs=2)
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic=CRITICS[critic], tuner=tuner, rollout=plan)
    seen = Seen()
    fit(run, seen)
    first, second = seen.figures
    assert first["ratio"] == pytest.approx(1, abs=1e-5)
    assert (first["clip_fraction"], first["value_clip_fraction"]) == (0, 0)
    assert first["step_kl"] < 1e-9
    assert first["mismatch"] < 1e-5
    assert first["kl"] == pytest.approx(0, abs=1e-4), "the reference is the start"
    assert second["step_kl"] > 1e-6
    assert second["mismatch"] > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_at_a_ratio_of_one_the_gradient_is_that_of_the_advantage_times_the_log_probability(temperature, home, tmp_path):
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic={}, rollout=rollout(temperature))
    batch = next(run.updates).items[0].batch
    weights = list(tuned(run.policy.model).values())
    found = torch.autograd.grad(ppo().loss(run.policy, batch).terms["policy"], weights)
    logp = run.policy.logprobs(batch.rollouts.seqs, temperature=temperature)
    expected = torch.autograd.grad(-(batch.rollouts.advantage * logp).sum(), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


def brute_force(reward, value, gamma, lam):
    """The O(T^2) sum over later surprises."""
    value = [*value, 0.0]
    surprise = [reward[t] + gamma * value[t + 1] - value[t] for t in range(len(reward))]
    return [sum((gamma * lam) ** (k - t) * surprise[k] for k in range(t, len(reward))) for t in range(len(reward))]


def by_transformers(home, sample, temperature):
    """(log-probability by `other`, value by `reward`) of each sampled token, from the sequence alone."""
    ids, start = tensor([sample.tokens]), sample.sampled.index(True)
    reference = AutoModelForCausalLM.from_pretrained(home / "other").eval()
    critic = AutoModelForSequenceClassification.from_pretrained(home / "reward").eval()
    with torch.no_grad():
        logp = (reference(input_ids=ids).logits[0] / temperature).log_softmax(-1)
        value = critic.score(critic.model(input_ids=ids).last_hidden_state[0])[:, 0] + critic.config.reward_shift
    places = range(start, len(sample.tokens))
    return [float(logp[place - 1, sample.tokens[place]]) for place in places], [float(value[place - 1]) for place in places]


@pytest.mark.parametrize(("whiten", "temperature"), [(False, 1.0), (True, 0.7)])
def test_the_credit_of_real_samples_is_that_of_a_brute_force_sum(whiten, temperature, home, tmp_path):
    objective = {"kind": "ppo", "kl": 0.1, "gamma": 0.97, "lam": 0.9, "whiten_advantages": whiten}
    run = prepared(
        home, tmp_path, objective, critic={"model": str(home / "reward")}, reference=str(home / "other"), rollout=rollout(temperature)
    )  # fmt: skip
    update = next(run.updates)
    batch, samples = update.items[0].batch, update.samples
    assert {one.stop for one, _ in samples} == {"end", "length"}
    assert len({len(one.logp) for one, _ in samples}) > 2
    advantages, returns, values = [], [], []
    for one, grade in samples:
        ref, value = by_transformers(home, one, temperature)
        reward = [-0.1 * (now - then) for now, then in zip(one.logp, ref, strict=True)]
        reward[-1] += grade.score if one.stop == "end" else -1.0
        found = brute_force(reward, value, 0.97, 0.9)
        advantages += found
        returns += [a + v for a, v in zip(found, value, strict=True)]
        values += value
    expected = tensor(advantages, dtype=torch.float64)
    if whiten:
        expected = (expected - expected.mean()) / (expected.var() + 1e-8).sqrt()
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(batch.rollouts.advantage.double(), expected, **close)
    torch.testing.assert_close(batch.returns.double(), tensor(returns, dtype=torch.float64), **close)
    torch.testing.assert_close(batch.value.double(), tensor(values, dtype=torch.float64), **close)
    assert batch.rollouts.version.tolist() == [0] * 12


def test_an_answer_ends_with_its_end_token_and_nothing_behind_it_has_a_gradient(home, tmp_path):
    """Of the policy term for the logits: nothing at the prompt, at the last token, or at the padding."""
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic={})
    update = next(run.updates)
    for one, _ in update.samples:
        drawn = one.tokens[one.sampled.index(True) :]
        assert all(one.sampled[one.sampled.index(True) :])
        assert [token in STOPS for token in drawn[:-1]] == [False] * (len(drawn) - 1)
        assert (drawn[-1] in STOPS) == (one.stop == "end") or len(drawn) == 6
    batch = update.items[0].batch
    assert batch.rollouts.seqs.rows() == [list(one.tokens) for one, _ in update.samples]
    assert bool((batch.rollouts.advantage != 0).all())
    kept = []

    def keep(_module, _inputs, output):
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    policy = ActorCritic(LM(run.policy.model, "padded"), run.policy.critic)
    handle = policy.backbone.register_forward_hook(keep)
    ppo().loss(policy, batch).terms["policy"].backward()
    handle.remove()
    (states,) = kept
    expected = torch.zeros(states.shape[:2], dtype=torch.bool)
    for row, (one, _) in enumerate(update.samples):
        start = one.sampled.index(True)
        expected[row, start - 1 : len(one.tokens) - 1] = True
    assert torch.equal((states.grad != 0).any(-1), expected)
    assert not bool(expected.all(1).any())


def test_minibatches_are_drawn_anew_each_epoch_and_share_the_whitening_of_the_whole_rollout(home, tmp_path):
    plan = rollout(problems=6, epochs=2, minibatches=2)
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic={}, rollout=plan)
    parts = [next(run.updates).items[0].batch for _ in range(4)]
    rows = [{tuple(row) for row in part.rollouts.seqs.rows()} for part in parts]
    assert rows[0] | rows[1] == rows[2] | rows[3]
    assert rows[0].isdisjoint(rows[1])
    assert rows[0] not in (rows[2], rows[3]), "another permutation"
    whole = torch.cat([part.rollouts.advantage for part in parts[:2]]).double()
    assert float(whole.mean()) == pytest.approx(0, abs=1e-6)
    assert float(whole.std()) == pytest.approx(1, abs=1e-5)
    assert abs(float(parts[0].rollouts.advantage.mean())) > 1e-3


# ---- rewards, from samples that were made by hand


class Answered:
    """A policy and a reference that say what they were told."""

    def __init__(self, ref=(), value=None):
        self.ref, self.value = tensor([each for row in ref for each in row]), value

    def logprobs(self, seqs, temperature=1.0):
        return self.ref

    def in_parts(self, fn, seqs, micro_tokens):
        return fn(seqs)

    def values(self, seqs):
        return torch.zeros(seqs.trained) if self.value is None else tensor([each for row in self.value for each in row])


def told_roles(objective, told):
    return SimpleNamespace(reference=told, controls=objective.controls(), micro_tokens=100)


def credited(objective, logp, ref, scores, stops=None, value=None, roles=None):
    """The credit of answers with these log-probabilities; where nothing is valued and lambda is 0, the advantages are rewards."""
    stops = stops or ["end"] * len(logp)
    told = Answered(ref, value)
    roles = roles or told_roles(objective, told)
    samples = [
        Sample(
            Problem(f"p{row}", ()),
            0,
            (1, 2, *range(3, 3 + len(each))),
            (False, False, *[True] * len(each)),
            tuple(each),
            stop,
            "",
        )
        for row, (each, stop) in enumerate(zip(logp, stops, strict=True))
    ]
    batch, owners = objective.credit(samples, [Grade(score) for score in scores], told, roles, 1.0)
    assert owners == [f"p{row}" for row in range(len(logp))]
    return batch


def bare(**settings):
    return ppo(lam=0.0, whiten_advantages=False, **settings)


LOGP, REF = [[-1.0, -2.0, -0.5], [-3.0], [-0.25, -0.75]], [[-1.5, -1.0, -0.5], [-2.0], [-1.25, -0.5]]


def test_the_score_stands_on_the_last_token_and_the_kl_on_each():
    found = credited(bare(kl=0.1), LOGP, REF, [7.0, -2.0, 0.5]).rollouts.advantage
    torch.testing.assert_close(found, tensor([-0.05, 0.1, 7.0, -2.0 + 0.1, -0.1, 0.5 + 0.025]))
    torch.testing.assert_close(
        credited(bare(kl=0.0), LOGP, REF, [7.0, -2.0, 0.5]).rollouts.advantage, tensor([0.0, 0.0, 7.0, -2.0, 0.0, 0.5])
    )


def test_a_score_reaches_the_tokens_before_it_by_lambda_alone():
    found = credited(ppo(kl=0.0, lam=0.5, whiten_advantages=False), LOGP[:1], REF[:1], [8.0])
    assert found.rollouts.advantage.tolist() == found.returns.tolist() == [2.0, 4.0, 8.0]
    golden = credited(ppo(kl=0.0, lam=0.95, whiten_advantages=False), LOGP[:1], REF[:1], [1.0], value=[[0.5, 0.6, 0.7]])
    torch.testing.assert_close(golden.rollouts.advantage, tensor([0.46575, 0.385, 0.3]))
    torch.testing.assert_close(golden.returns, tensor([0.96575, 0.985, 1.0]))


@pytest.mark.parametrize(
    ("estimator", "of"),
    [("k1", lambda d: d), ("k2", lambda d: d * d / 2), ("k3", lambda d: math.exp(-d) - 1 + d)],
)
def test_the_penalty_is_the_estimator_that_was_asked_for(estimator, of):
    found = credited(bare(kl=0.2, kl_estimator=estimator), LOGP, REF, [0.0] * 3).rollouts.advantage
    gaps = [now - then for row, other in zip(LOGP, REF, strict=True) for now, then in zip(row, other, strict=True)]
    torch.testing.assert_close(found, tensor([-0.2 * of(gap) for gap in gaps]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [7.0, -1.0, -1.0]),
        ({"no_end_score": -4.0}, [7.0, -4.0, -4.0]),
        ({"no_end_score": None}, [7.0, -2.0, 0.5]),
        ({"no_end_score": None, "no_end_penalty": 3.0}, [7.0, -5.0, -2.5]),
        ({"no_end_score": 1.0, "no_end_penalty": 3.0}, [7.0, -2.0, -2.0]),
    ],
)
def test_only_an_answer_that_was_cut_off_gets_another_score(settings, expected):
    batch = credited(bare(kl=0.0, **settings), LOGP, REF, [7.0, -2.0, 0.5], ["end", "length", "length"])
    assert batch.rollouts.advantage[[2, 3, 5]].tolist() == expected
    assert batch.rollouts.advantage[[0, 1, 4]].tolist() == [0.0] * 3


def test_an_answer_that_could_not_be_graded_takes_no_part():
    whole = credited(bare(kl=0.1), LOGP[::2], REF[::2], [7.0, 0.5])
    objective = bare(kl=0.1)
    told = Answered(REF[::2])
    samples = [
        Sample(
            Problem(f"p{row}", ()),
            0,
            (1, 2, *range(3, 3 + len(each))),
            (False, False, *[True] * len(each)),
            tuple(each),
            "end",
            "",
        )
        for row, each in enumerate(LOGP)
    ]
    batch, owners = objective.credit(
        samples, [Grade(7.0), Grade(None, failure="?"), Grade(0.5)], told, told_roles(objective, told), 1.0
    )
    assert owners == ["p0", "p2"]
    assert torch.equal(batch.rollouts.advantage, whole.rollouts.advantage)


def test_whitened_advantages_leave_the_returns_as_they_were():
    value = [[0.5, -0.6, 0.7], [0.1], [2.0, 0.3]]
    plain, white = (credited(ppo(whiten_advantages=each), LOGP, REF, [7.0, -2.0, 0.5], value=value) for each in (False, True))
    raw = plain.rollouts.advantage.double()
    torch.testing.assert_close(white.rollouts.advantage.double(), (raw - raw.mean()) / raw.std(), rtol=0, atol=1e-6)
    assert torch.equal(white.returns, plain.returns)
    torch.testing.assert_close(plain.returns, plain.rollouts.advantage + plain.value)
    golden = credited(ppo(kl=0.0), LOGP[:1], REF[:1], [1.0], value=[[0.5, 0.6, 0.7]])
    torch.testing.assert_close(golden.rollouts.advantage, tensor([0.9913436, 0.0170921, -1.0084358]))


def test_whitened_rewards_have_variance_one_and_their_own_mean():
    plain, white = (credited(bare(kl=0.1, whiten_rewards=each), LOGP, REF, [7.0, -2.0, 0.5]) for each in (False, True))
    raw, found = plain.rollouts.advantage.double(), white.rollouts.advantage.double()
    torch.testing.assert_close(found, (raw - raw.mean()) / raw.std() + raw.mean(), rtol=0, atol=1e-6)


def test_the_adaptive_controller_has_its_printed_value_and_saturates():
    """512 answers of one token each, which are 12 nats from the reference where 6 are aimed at."""
    for kl, expected in (
        (12.0, 0.151536),
        (7.2, 0.151536),
        (1e6, 0.151536),
        (6.6, 0.15 * (1 + 0.1 * 0.0512)),
        (6.0, 0.15),
        (0.0, 0.148464),
    ):
        objective = bare(kl=0.15, kl_target=6.0)
        roles = told_roles(objective, Answered([[-1.0 - kl]] * 512))
        batch = credited(objective, [[-1.0]] * 512, [[-1.0 - kl]] * 512, [0.0] * 512, roles=roles)
        assert roles.controls["kl_weight"] == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(batch.rollouts.advantage, torch.full((512,), -0.15 * kl))  # with the weight before it moved
    roles = told_roles(bare(kl=0.15), Answered([[-13.0]]))
    credited(bare(kl=0.15), [[-1.0]], [[-13.0]], [0.0], roles=roles)
    assert roles.controls == {"kl_weight": 0.15}, "without a target it stays"


def test_the_kl_that_is_steered_and_shown_is_a_mean_over_answers_of_their_sums(home, tmp_path):
    """It is 10% over the target, which moves the weight by 10% of 12 answers in 100."""

    def begun(**control):
        objective = {"kind": "ppo", "kl": 0.1, "kl_horizon": 100, **control}
        return prepared(home, tmp_path, objective, critic={"shared": True}, reference=str(home / "other"), steps=1)

    before = begun()
    batch = next(before.updates).items[0].batch.rollouts
    apart = (batch.sampled_logp - before.roles.reference.logprobs(batch.seqs)).double()
    expected = float(apart.sum()) / 12
    assert expected > 1.5 * float(apart.mean()) > 0
    run, seen = begun(kl_target=expected / 1.1), Seen()
    fit(run, seen)
    assert seen.figures[0]["kl"] == pytest.approx(expected, rel=1e-5)
    assert seen.figures[0]["kl_weight"] == pytest.approx(0.1 * (1 + 0.1 * 12 / 100), rel=1e-6)


@pytest.mark.parametrize("critic", CRITICS)
def test_two_updates_a_resume_and_two_more_are_four_updates_bit_for_bit_with_controller_and_critic(critic, home, tmp_path):
    objective = {"kind": "ppo", "kl": 0.1, "kl_target": 0.5, "kl_horizon": 50}
    plan = rollout(epochs=3)  # the rollout is not used up where the run is interrupted

    def finish(folder, stop_at=None):
        run = prepared(home, folder, objective, critic=CRITICS[critic], rollout=plan, steps=4)
        record = Recorder(folder, "owner", Checkpoints(every=10))
        record.interrupted = lambda: "SIGTERM" if run.step == stop_at else None
        resumed = record.resume(run)
        fit(run, record)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return resumed, run, [{name: value for name, value in line.items() if name != "time"} for line in lines]

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    _, whole, figures = finish(tmp_path / "whole")
    assert len({line["kl_weight"] for line in figures}) == 2, "it moved once a rollout"
    _, half, _ = finish(tmp_path / "broken", stop_at=2)
    state = json.loads((tmp_path / "broken" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["controls"] == half.roles.controls != {"kl_weight": 0.1}
    resumed, again, same = finish(tmp_path / "broken")
    assert (resumed, again.step, again.roles.controls) == (True, 4, whole.roles.controls)
    assert same == figures
    assert any(name.startswith("critic.") for name in whole.parameters)
    assert all(torch.equal(value, again.parameters[name]) for name, value in whole.parameters.items())


# ---- the loss


def minibatch(lm, temperature=0.7, apart=0.5):
    """Answers of three problems with what was known when they were sampled, off from what the model says now."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for prompt, answer in ((4, 3), (20, 5), (20, 1), (7, 4)):
        tokens = torch.randint(0, 97, (prompt + answer,), generator=draw).tolist()
        rows.append((tokens, [False] * prompt + [True] * answer))
    seqs = Sequences.of(rows)
    with torch.no_grad():
        logp, value = lm.logprobs(seqs, temperature=temperature), lm.values(seqs)

    def off(size=1.0):
        return size * torch.randn(seqs.trained, generator=draw, dtype=torch.float64)

    rollouts = Rollouts(
        seqs, sampled_logp=(logp + off(apart)).float(), advantage=off().float(), version=torch.zeros(4, dtype=torch.long),
        ref_logp=logp.float(), temperature=temperature,
    )  # fmt: skip
    return Valued(rollouts, (value + off(0.3)).float(), (value + off()).float())


def with_critic(lm, own=False):
    if own:
        critic = make("gpt2", "float64", seed=4).model
        critic.score = nn.Linear(32, 1, bias=False).double()
        new_head(1)(critic.score.weight.data)
        return ActorCritic(lm, ScalarLM(critic, "tree"))
    head = ValueHead(lm)
    with torch.no_grad():
        head.weight.copy_(0.3 * torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
        head.bias.fill_(0.1)
    return ActorCritic(lm, head)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"dual_clip": 1.5, "value_weight": 0.7}, {"value_clip": None, "clip": 0.1}, {"entropy": 0.05, "value_clip": 0.05}],
)
def test_ppo_is_its_formula_token_by_token(settings, own):
    lm = with_critic(make("gpt2", "float64"), own)
    batch, objective = minibatch(lm), ppo(**settings)
    with torch.no_grad():
        logp, value = lm.logprobs(batch.rollouts.seqs, temperature=0.7), lm.values(batch.rollouts.seqs)
    clip, dual, near = objective.clip, objective.dual_clip, objective.value_clip
    policy, error, clipped, off = [], [], 0, 0
    for now, then, good, v, old, aim in zip(
        logp.tolist(), batch.rollouts.sampled_logp.tolist(), batch.rollouts.advantage.tolist(),
        value.tolist(), batch.value.tolist(), batch.returns.tolist(), strict=True,
    ):  # fmt: skip
        ratio = math.exp(now - then)
        loss = max(-ratio * good, -min(max(ratio, 1 - clip), 1 + clip) * good)
        clipped += (ratio > 1 + clip and good > 0) or (ratio < 1 - clip and good < 0)
        policy.append(min(loss, -dual * good) if dual and good < 0 else loss)
        held = v if near is None else min(max(v, old - near), old + near)
        error.append(max((v - aim) ** 2, (held - aim) ** 2) / 2)
        off += near is not None and abs(v - old) > near
    loss = objective.loss(lm, batch)
    assert float(loss.terms["policy"].detach()) == pytest.approx(sum(policy), rel=1e-6)  # what was sampled is float32
    assert float(loss.terms["value"].detach()) == pytest.approx(objective.value_weight * sum(error), rel=1e-6)
    assert objective.units(batch) == dict.fromkeys(loss.terms, 13)
    assert set(loss.terms) == {"policy", "value"} | ({"entropy"} if objective.entropy else set())
    assert loss.stats["clip_fraction"] == (clipped, 13)
    assert clipped > 0
    assert loss.stats.get("value_clip_fraction", (0, 13)) == (off, 13)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy_of_whole_distributions():
    lm = with_critic(make("gpt2", "float64"))
    batch = minibatch(lm)
    weights = list(lm.model.parameters())
    loss = ppo(entropy=0.05).loss(lm, batch)
    found = torch.autograd.grad(loss.terms["entropy"], weights)
    total = torch.zeros((), dtype=torch.float64)
    for row, marks in zip(
        batch.rollouts.seqs.rows(), batch.rollouts.seqs.train.split(batch.rollouts.seqs.lengths.tolist()), strict=True
    ):
        logp = (lm.model(input_ids=tensor([row])).logits[0] / 0.7).log_softmax(-1)
        total = total - (logp.exp() * logp).sum(-1)[marks.nonzero()[:, 0] - 1].sum()
    assert float(loss.terms["entropy"].detach()) == pytest.approx(-0.05 * float(total.detach()), rel=1e-9)
    for one, other in zip(found, torch.autograd.grad(-0.05 * total, weights, allow_unused=True), strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-7, atol=1e-9)


def flat(term, parameters):
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(each.numel(), dtype=each.dtype) if grad is None else grad.flatten()
            for each, grad in zip(parameters, found, strict=True)
        ]
    )


def counting(calls, name):
    def count(*_):
        calls[name] += 1

    return count


def test_a_shared_critic_costs_no_forward_and_one_of_its_own_leaves_the_policy_alone():
    for own in (False, True):
        lm = with_critic(make("gpt2", "float64"), own)
        batch = minibatch(lm)
        forwards = Counter()
        handles = [lm.backbone.register_forward_hook(counting(forwards, "policy"))]
        if own:
            handles.append(lm.critic.backbone.register_forward_hook(counting(forwards, "critic")))
        loss = ppo().loss(lm, batch)
        for handle in handles:
            handle.remove()
        assert forwards == {"policy": 1} | ({"critic": 1} if own else {})
        policy, critic = list(lm.model.parameters()), list(lm.critic.parameters())
        assert float(flat(loss.terms["policy"], policy).norm()) > 1e-3
        assert float(flat(loss.terms["policy"], critic).norm()) == 0
        assert float(flat(loss.terms["value"], critic).norm()) > 1e-3
        assert (float(flat(loss.terms["value"], policy).norm()) > 1e-3) == (not own), "a shared critic moves the trunk"
        if own:
            trunk = list(lm.critic.backbone.parameters())
            assert float(flat(loss.terms["value"], trunk).norm()) > 1e-3, "the gradient goes on below the head"


def test_without_advantages_only_the_critic_learns_and_it_learns_the_returns(home, tmp_path):
    """Every score and every value is 0 at first, and there is no KL: the policy has nothing to learn."""
    start = prepared(
        home, tmp_path, {"kind": "ppo", "kl": 0.0, "whiten_advantages": False}, critic={"optim": {"learning_rate": 0.01}}
    )
    batch = next(start.updates).items[0].batch
    still = Valued(
        Rollouts(batch.rollouts.seqs, batch.rollouts.sampled_logp, torch.zeros_like(batch.rollouts.advantage), batch.rollouts.version),
        batch.value, batch.returns,
    )  # fmt: skip
    before = {name: value.detach().clone() for name, value in start.learners["policy"].parameters.items()}
    objective, errors = ppo(kl=0.0, value_clip=None), []
    for _ in range(12):
        loss = objective.loss(start.policy, still)
        assert float(loss.terms["policy"].detach()) == 0
        sum(loss.terms.values()).backward()
        for learner in start.learners.values():
            learner.optimizer.step()
            learner.optimizer.zero_grad()
        errors.append(float(loss.stats["value_error"][0]))
    assert errors[-1] < 0.5 * errors[0]
    assert all(torch.equal(value, before[name]) for name, value in start.learners["policy"].parameters.items())


# ---- the critic


def test_a_critic_that_begins_as_a_reward_model_values_a_state_as_it_scores_it(home, tmp_path):
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic={"model": str(home / "reward")})
    batch = next(run.updates).items[0].batch
    seqs, reward = batch.rollouts.seqs, load_scalar(home / "reward").lm
    prefixes = [
        row[:place]
        for row, marks in zip(seqs.rows(), seqs.train.split(seqs.lengths.tolist()), strict=True)
        for place in marks.nonzero()[:, 0].tolist()
    ]
    with torch.no_grad():
        expected = reward.scores_of_many(Sequences.of([(row, [False] * len(row)) for row in prefixes]), 400)
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(batch.value, expected, rtol=0, atol=1e-5)
    assert torch.equal(run.policy.critic.head.weight, reward.head.weight)
    assert run.policy.critic.shift == 0.25


@pytest.mark.parametrize("critic", CRITICS)
def test_a_critic_with_a_new_head_values_everything_at_0(critic, home, tmp_path):
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic=CRITICS[critic])
    batch = next(run.updates).items[0].batch
    assert batch.value.tolist() == [0.0] * batch.rollouts.seqs.trained
    seqs = Sequences.of([([5, 6, 7], [False, True, True])])
    with torch.no_grad():
        assert run.policy.values(seqs).tolist() == [0.0, 0.0]


def test_a_critic_of_another_tokenizer_is_refused(home, tmp_path):
    made(tmp_path / "llama3", "llama3")
    with pytest.raises(
        ModelError, match=r"critic: .*llama3 has another tokenizer than the policy .*take a critic of the policy's family"
    ):
        prepared(home, tmp_path, {"kind": "ppo"}, critic={"model": str(tmp_path / "llama3")})


@pytest.mark.parametrize("shared", [True, False])
def test_an_actor_critic_keeps_the_gradient_checkpointing_and_the_silence_of_dropout(shared, tmp_path):
    made(tmp_path, attention_dropout=0.5)
    source = ModelSource(path=str(tmp_path), gradient_checkpointing=True)
    lm = load(source).lm
    policy = ActorCritic(lm, ValueHead(lm) if shared else load_scalar(source, nn.init.ones_).lm)
    seqs = Sequences.of([(list(range(5, 25)), [False] * 4 + [True] * 16)])
    plain = load(ModelSource(path=str(tmp_path))).lm
    torch.testing.assert_close(policy.logprobs(seqs), plain.logprobs(seqs))
    torch.testing.assert_close(policy.values(seqs), policy.values(seqs), rtol=0, atol=0)
    runs = []
    layer = policy.backbone.layers[0].self_attn
    handle = layer.register_forward_hook(lambda *_: runs.append(1))
    policy.logprobs(seqs).sum().backward()
    handle.remove()
    assert len(runs) == 2, "once forward, once again in the backward"


def test_a_stage_leaves_the_policy_and_its_critic_as_folders_that_transformers_reads(home, tmp_path):
    plan = {"task": TASK, "steps": 2, "rollout": rollout(max_tokens=3), "optim": {"learning_rate": 0.01}}
    critic = {"model": str(home / "reward"), "tuner": {"kind": "lora", "rank": 2}, "optim": {"learning_rate": 0.01}}
    settings = TrainSettings.model_validate(
        {"model": str(home / "start"), "objective": "ppo", "tuner": "lora", "critic": critic, **plan}
    )
    found = train(settings, Session(tmp_path, "owner"))
    assert found["steps"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval()
    assert model.config.reward_shift == 0.25
    lm, before = load_scalar(tmp_path / "critic").lm, load_scalar(home / "reward").lm
    ids = list(range(5, 15))
    with torch.no_grad():
        ours = lm.scores(Sequences.of([(ids, [False] * 10)]))
        theirs = model(input_ids=tensor([ids])).logits[:, 0] + 0.25
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert float((lm.head.weight - before.head.weight).detach().abs().max()) > 1e-4, "its head was trained"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 and line["grad_norm/critic"] > 0 for line in lines[1:])


# ---- what else is learned from


class Kept:
    """An optimizer that keeps the gradients that it is to move by, and moves nothing."""

    def __init__(self, parameters):
        self.parameters, self.param_groups = parameters, [{"params": list(parameters.values())}]

    def step(self):
        self.found = {name: value.grad.clone() for name, value in self.parameters.items()}

    def zero_grad(self, set_to_none=True):
        for value in self.parameters.values():
            value.grad = None


def gradient(run):
    for learner in run.learners.values():
        learner.optimizer = Kept(learner.parameters)
    run.steps = 1
    seen = Seen()
    fit(run, seen)
    return run.learners["policy"].optimizer.found, seen.figures[0]


def test_mixed_in_text_adds_exactly_its_weight_times_its_own_gradient(home, tmp_path):
    """PPO-ptx (arXiv 2203.02155): each is a mean over its own tokens."""
    text = inline([{"text": f"{a} + {b} = {a + b}" + " and" * b} for a, b in SUMS])
    mix = {"objective": "pretrain", "data": text, "rows": 4, "weight": 27.8}
    alone, _ = gradient(prepared(home, tmp_path, {"kind": "ppo"}, critic={}))
    both, figures = gradient(prepared(home, tmp_path, {"kind": "ppo"}, critic={}, mix=mix))
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic={}, mix=mix)
    seqs = next(run.updates).items[1].batch
    assert seqs.count == 4
    weights = tuned(run.policy.model)
    nll = -run.policy.logprobs(seqs).mean()
    assert figures["mix/loss/nll"] == pytest.approx(float(nll.detach()), rel=1e-5)
    for (name, one), more in zip(alone.items(), torch.autograd.grad(nll, list(weights.values())), strict=True):
        torch.testing.assert_close(both[name], one + 27.8 * more, rtol=1e-4, atol=1e-5)


# ---- where it ends: a bandit


class Words:
    """What the sampler and the stream ask of a template: the prompt is token 0, and every token ends an answer."""

    def __init__(self, arms):
        self.stop_ids, self.tokenizer = frozenset(range(arms)), SimpleNamespace(decode=lambda *_, **__: "")

    def prompt(self, messages):
        return [0]


class Arms(Grader):
    """The reward of an arm: the token that was drawn."""

    rewards: tuple[float, ...]

    def grade_all(self, samples):
        return [Grade(self.rewards[one.tokens[-1]]) for one in samples]


def bandit(probabilities):
    """A one-layer model that draws an arm with these probabilities after its prompt."""
    arms = len(probabilities)
    config = LlamaConfig(
        vocab_size=arms, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        state = model.model(input_ids=tensor([[0]])).last_hidden_state[0, 0]
        model.lm_head.weight.copy_(tensor(probabilities).log()[:, None] * state / (state @ state))
    return LM(model)


def chances(lm):
    with torch.no_grad():
        return lm.model(input_ids=tensor([[0]])).logits[0, 0].double().softmax(-1)


def played(objective, reference, rewards, start=None, steps=60, samples=96, rate=0.05, **plan):
    """The probabilities of the arms after training by the loop on rollouts of one-token answers."""
    frozen = bandit(reference)
    lm = bandit(start or reference)
    policy = lm
    learners = {"policy": Learner.of(tuned(lm.model), AdamW(learning_rate=rate, schedule="linear", warmup=0.0, clip=None))}
    if "critic" in objective.trains:
        policy = ActorCritic(lm, ValueHead(lm))
        parameters = {f"critic.{name}": each for name, each in policy.critic.named_parameters()}
        learners["critic"] = Learner.of(parameters, AdamW(learning_rate=0.05, schedule="linear", warmup=0.0, clip=None))
    roles = Roles(reference=Frozen(frozen), controls=objective.controls())
    problem = Problem("bandit", (Message("user", "?"),))
    drawn = Rollout(problems=1, per_problem=samples, sampling=Sampling(max_tokens=1), **plan)
    words = Words(len(rewards))
    source = Drawer(objective, [problem], Arms(rewards=rewards), InProcess(), drawn, policy, words, roles, 0)
    stream = OnPolicyStream(objective, source, drawn, policy, roles, 0)
    fit(Training(policy, learners, SampledUpdates(stream), steps, roles), Seen())
    return chances(lm)


def divergence(one, other):
    return float((one * (one.log() - other.log())).sum())


def optimum(reference, rewards, beta):
    weight = tensor(reference, dtype=torch.float64) * (tensor(rewards, dtype=torch.float64) / beta).exp()
    return weight / weight.sum()


def test_the_printed_optimum_of_a_three_armed_bandit_is_found_with_its_objective():
    reference, rewards = (0.2, 0.5, 0.3), (1.0, 0.0, -1.0)
    torch.testing.assert_close(chances(bandit(reference)), tensor(reference, dtype=torch.float64), rtol=0, atol=1e-6)
    best = optimum(reference, rewards, 0.5)
    torch.testing.assert_close(best, tensor([0.7321654, 0.2477195, 0.0201151], dtype=torch.float64), rtol=0, atol=1e-7)
    found = played(ppo(kl=0.5, lam=1.0, whiten_advantages=False), reference, rewards)
    assert divergence(found, best) < 1e-3
    gain = float(found @ tensor(rewards, dtype=torch.float64)) - 0.5 * divergence(found, tensor(reference, dtype=torch.float64))
    assert gain == pytest.approx(0.3511555, abs=1e-3)


@pytest.mark.parametrize("settings", [{"whiten_advantages": False}, {}], ids=["plain", "whitened"])
def test_a_six_armed_bandit_ends_at_the_reference_tilted_by_its_rewards(settings):
    reference, rewards = (0.3, 0.05, 0.2, 0.25, 0.1, 0.1), (0.2, 1.0, -0.5, 0.0, 0.6, -1.0)
    best = optimum(reference, rewards, 0.4)
    assert divergence(best, tensor(reference, dtype=torch.float64)) > 0.2
    found = played(ppo(kl=0.4, lam=1.0, **settings), reference, rewards, epochs=2)
    assert divergence(found, best) < 1e-2


def test_a_strong_pull_keeps_the_policy_at_the_reference_and_no_reward_brings_it_back_there():
    reference, rewards = (0.3, 0.05, 0.2, 0.25, 0.1, 0.1), (0.2, 1.0, -0.5, 0.0, 0.6, -1.0)
    there = tensor(reference, dtype=torch.float64)
    assert divergence(played(ppo(kl=100.0, whiten_advantages=False), reference, rewards, steps=30, rate=0.01), there) < 1e-3
    start = (0.1, 0.3, 0.1, 0.1, 0.3, 0.1)
    assert divergence(tensor(start, dtype=torch.float64), there) > 0.3
    back = played(ppo(kl=0.5, lam=1.0, whiten_advantages=False), reference, (0.0,) * 6, start=start)
    assert divergence(back, there) < 1e-2


def test_without_a_reward_the_kl_gives_no_gradient_at_the_reference(home, tmp_path):
    task = copy.deepcopy(TASK) | {"grader": {"kind": "function", "path": "test_ppo:nothing"}}
    found = {}
    for start in ("start", "other"):
        run = prepared(
            home,
            tmp_path,
            {"kind": "ppo", "kl": 1.0, "whiten_advantages": False, "no_end_score": None},
            critic={},
            task=task,
            reference=str(home / start),
            stops=STOPS,
        )
        gradients, _ = gradient(run)
        found[start] = float(torch.cat([each.flatten() for each in gradients.values()]).norm())
    assert found["start"] < 1e-4 * found["other"]


def nothing(_problem, _text):
    return 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "objective ppo trains a critic: add the section `critic`, such as critic: {model: {stage: reward}}"),
        (
            {"critic": {"shared": True, "model": "m"}},
            "a shared critic is a head on the policy's states: it takes no `model` and no `tuner`",
        ),
        (
            {"critic": {"shared": True, "tuner": "lora"}},
            "a shared critic is a head on the policy's states: it takes no `model` and no `tuner`",
        ),
        (
            {"critic": {}, "objective": {"kind": "ppo", "kl": 0}, "reference": "m"},
            "objective ppo, as it is set, compares with no reference; remove the section `reference`",
        ),
        ({"critic": {}, "reference": {"cache": True}}, "objective ppo asks the reference about something else at every update"),
        (
            {"critic": {}, "mix": {"objective": "dpo", "data": "rows.jsonl"}},
            "objective dpo cannot be mixed in: take one that needs only data",
        ),
        ({"critic": {}, "mix": {"objective": "grpo", "data": "rows.jsonl"}}, "objective grpo cannot be mixed in"),
    ],
)
def test_sections_that_do_not_go_with_ppo_are_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        TrainSettings.model_validate({"model": "m", "objective": "ppo", "task": TASK, "steps": 1} | changes)
    assert message in str(error.value)


def test_a_reference_is_asked_only_where_the_kl_has_a_weight(home, tmp_path):
    assert (ppo(kl=0.0).needs, ppo().needs) == (frozenset(), {"reference"})
    run = prepared(home, tmp_path, {"kind": "ppo", "kl": 0.0}, critic={"shared": True}, steps=1)
    assert run.roles.reference is None
    seen = Seen()
    fit(run, seen)
    assert "kl" not in seen.figures[0]


def test_eps_reaches_the_optimizer_of_the_policy_and_that_of_the_critic():
    parameters = {"w": torch.nn.Parameter(torch.zeros(2, 2))}
    stage = {
        "model": "m", "objective": "ppo", "steps": 1, "task": "arithmetic", "optim": {"eps": 1e-5}, "critic": {"optim": {"eps": 1e-6}},
    }  # fmt: skip
    asked = Recipe.parse(json.dumps(stage)).stages["train"]
    for optim, eps in ((asked.optim, 1e-5), (asked.critic.optim, 1e-6)):
        assert [group["eps"] for group in Learner.of(parameters, optim).optimizer.param_groups] == [eps]
