"""The policy-gradient family beside what tests/test_properties.py and tests/test_parity.py hold every kind to: values worked by hand,
expectations by enumeration, and rollouts as they are drawn."""

import itertools
import math

import pytest
import torch
from test_ppo import TASK as CHARMED
from test_ppo import Seen, charm, made, prepared, rollout
from torch import tensor

from posttrain import losses
from posttrain.batch import Rollouts, Sequences
from posttrain.errors import RunError
from posttrain.models.roles import Roles
from posttrain.objectives import GRPO, Objective, PolicyGradient
from posttrain.objectives.grpo import DAPO, RLOO, DrGRPO, ReinforcePP
from posttrain.objectives.policy_gradient import Correction, levelled
from posttrain.training.fit import fit
from posttrain.training.settings import TrainSettings

F64 = torch.float64
FAMILY = {kind: cls for kind, cls in Objective.kinds.items() if issubclass(cls, PolicyGradient)}


def rare(_problem, text):
    """A score that most groups of four agree on."""
    return float(len(text) > 0 and sum(map(ord, text)) % 11 == 0)


RARE = {**CHARMED, "grader": {"kind": "function", "path": "test_policy_gradient:rare"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy-gradient")
    made(folder / "start")
    return folder


def answers(*lengths):
    """Sequences of a prompt token and so many sampled ones."""
    return Sequences.of([([1] + [2] * length, [False] + [True] * length) for length in lengths])


class Table:
    """A policy whose only distribution is a table of logits, whatever came before."""

    def __init__(self, logits):
        self.logits = torch.tensor(logits, dtype=F64, requires_grad=True)

    def logprobs(self, seqs, temperature=1.0):
        return (self.logits / temperature).log_softmax(0)[seqs.tokens[seqs.train]]

    def token_sum(self, seqs, fn, temperature=1.0):
        logp = self.logprobs(seqs, temperature)
        return fn(logp, slice(None)).sum(), logp.detach()


def sampled(policy, arms, advantage, ref_logp=None, before=None):
    """Answers of one token each."""
    seqs = Sequences.of([([0, arm], [False, True]) for arm in arms])
    logp = policy.logprobs(seqs).detach() if before is None else before
    version = torch.zeros(len(arms), dtype=torch.long)
    return Rollouts(seqs, sampled_logp=logp, advantage=tensor(advantage, dtype=F64), version=version, ref_logp=ref_logp)


def gradient(objective, policy, batch):
    """Of the mean over answers."""
    loss = objective.loss(policy, batch).terms["policy"] / batch.count
    return torch.autograd.grad(loss, policy.logits)[0]


# ---- values by hand


def test_the_mean_of_the_others_is_the_baseline_of_leave_one_out():
    found = losses.group_advantages(tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.long), "none", leave_one_out=True)
    torch.testing.assert_close(found, tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    groups, scores = tensor([0, 1, 0, 1, 0, 2]), tensor([3.0, 1, 0, 2, 6, 9])
    expected = tensor([3 - 3.0, 1 - 2.0, 0 - 4.5, 2 - 1.0, 6 - 1.5, 0])  # a group of one has no others
    torch.testing.assert_close(losses.group_advantages(scores, groups, "none", leave_one_out=True), expected)


def test_the_ratio_of_an_answer_is_the_product_or_the_geometric_mean_of_its_tokens():
    gaps, seqs = tensor([0.1, -0.2, 0.3, 0.05, 0.7], dtype=F64), answers(4, 1)
    mean = levelled(gaps, "sequence_mean", seqs).exp()
    product = levelled(gaps, "sequence_product", seqs).exp()
    assert mean.tolist() == pytest.approx([1.0644945] * 4 + [math.exp(0.7)], abs=1e-7)
    assert product.tolist() == pytest.approx([1.2840254] * 4 + [math.exp(0.7)], abs=1e-7)
    assert levelled(gaps, "token", seqs) is gaps


def test_the_token_form_of_gspo_has_the_value_and_the_gradient_of_its_sequence_form():
    """arXiv 2507.18071 section 4.3: s_t = sg(s) p_t / sg(p_t)."""
    logp = tensor([-1.0, -0.5, -2.0, -0.7], dtype=F64, requires_grad=True)
    before, good = logp.detach() - tensor([0.1, -0.2, 0.3, 0.05], dtype=F64), 1.7
    whole = levelled(logp - before, "sequence_mean", answers(4)).exp()
    by_token = whole.detach() * (logp - logp.detach()).exp()
    one, other = ((form * good).mean() for form in (whole, by_token))
    assert float(one) == pytest.approx(float(other))
    torch.testing.assert_close(torch.autograd.grad(one, logp)[0], torch.autograd.grad(other, logp)[0])


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    logp = tensor([-2.0, -2.0], dtype=F64, requires_grad=True)
    log_ratio = logp - logp.detach() + tensor([6.0, 0.5], dtype=F64).log()  # as in training, by way of the policy
    value = losses.cispo(logp, log_ratio, tensor([1.0, -1.0], dtype=F64), 5.0)
    assert value.tolist() == pytest.approx([10.0, -1.0])
    assert torch.autograd.grad(value.sum(), logp)[0].tolist() == pytest.approx([-5.0, 0.5])


def test_sapos_gate_is_the_ratio_at_one_and_flat_far_away():
    ratio = tensor([1.0, 1.0, 1e6, 1e-6], dtype=F64).log().requires_grad_()
    good = tensor([2.0, -2.0, 1.0, 1.0], dtype=F64)
    value = losses.soft_surrogate(ratio, good)
    assert value[:2].tolist() == pytest.approx([-4.0, 4 / 1.05])
    slope = torch.autograd.grad(value.sum(), ratio)[0]
    assert slope[:2].tolist() == pytest.approx([-2.0, 2.0])
    assert slope[2:].abs().max() < 1e-5


def test_vespos_weight_is_one_at_one_and_falls_on_both_sides():
    weight = losses.gamma_weight(tensor([0.0, 1.0, -1.0, 1.0], dtype=F64), tensor([1.0, 1, 1, -1], dtype=F64))
    expected = [1.0, *(w**k * math.exp(fall * (1 - w)) for w, k, fall in ((math.e, 2, 3), (1 / math.e, 2, 3), (math.e, 3, 2)))]
    assert weight.tolist() == pytest.approx(expected)
    assert max(expected[1:3]) < 1


def test_a_correction_caps_or_leaves_out_what_the_sampler_drew_otherwise():
    gap = tensor([-1.0 + 2.0, 0.0, -3.0], dtype=F64)  # trainer less sampler: e, 1, 0.05
    assert losses.importance_weight(gap).tolist() == pytest.approx([2.0, 1.0, math.exp(-3)])
    assert losses.importance_weight(gap, cap=3.0).tolist() == pytest.approx([math.e, 1.0, math.exp(-3)])
    assert losses.importance_weight(gap, mask=True, floor=0.5).tolist() == [0.0, 1.0, 0.0]


def test_what_is_to_go_is_the_sum_from_a_token_to_the_end_of_its_answer():
    reward, owner = torch.randn(9, dtype=F64, generator=torch.Generator().manual_seed(0)), tensor([0, 0, 0, 1, 3, 3, 3, 3, 4])
    expected = [sum(float(reward[j]) for j in range(i, 9) if owner[j] == owner[i]) for i in range(9)]
    assert losses.to_go(reward, owner).tolist() == pytest.approx(expected)
    assert losses.to_go(reward[:0], owner[:0]).tolist() == []


@pytest.mark.parametrize(("kind", "times"), [("grpo", 10.0), ("dr_grpo", 1.0), ("dapo", 1.0)])
def test_a_token_of_a_long_wrong_answer_weighs_less_under_grpo_alone(kind, times):
    """arXiv 2503.20783: two answers of 10 and 100 tokens with one advantage."""
    objective = FAMILY[kind](**({"length": 128} if kind == "dr_grpo" else {}))
    policy, seqs = Table([0.0, 0.0, 0.0]), answers(10, 100)
    live = policy.logprobs(seqs).detach().requires_grad_()
    policy.token_sum = lambda _seqs, fn, _temperature: (fn(live, slice(None)).sum(), live.detach())
    version = torch.zeros(2, dtype=torch.long)
    batch = Rollouts(seqs, sampled_logp=live.detach(), advantage=-torch.ones(110, dtype=F64), version=version)
    each = torch.autograd.grad(objective.loss(policy, batch).terms["policy"], live)[0]
    assert float(each[0] / each[-1]) == pytest.approx(times)


def test_for_answers_of_one_token_all_ratios_are_one_thing():
    policy, found = Table([0.3, -0.4, 1.0]), []
    batch = sampled(policy, [0, 2, 1, 1], [1.0, -0.5, 2.0, -1.0], before=tensor([-1.0, -0.2, -1.5, -2.5], dtype=F64))
    for ratio in ("token", "sequence_product", "sequence_mean"):
        found.append(gradient(GRPO(ratio=ratio), policy, batch))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_the_long_product_of_a_whole_answer_does_not_overflow():
    policy = Table([0.0, 0.0, 5.0])
    seqs = answers(400)
    version = torch.zeros(1, dtype=torch.long)
    batch = Rollouts(seqs, sampled_logp=torch.full((400,), -9.0, dtype=F64), advantage=-torch.ones(400, dtype=F64), version=version)
    away = Rollouts(seqs, batch.sampled_logp, batch.advantage, version, ref_logp=batch.sampled_logp)
    for objective in (GRPO(ratio="sequence_product"), GRPO(ratio="sequence_product", kl=0.1, kl_as="weighted")):
        loss = objective.loss(policy, away)
        assert math.isfinite(float(loss.terms["policy"]))
        assert all(math.isfinite(float(total)) for name, (total, _) in loss.stats.items() if name != "kl"), loss.stats


def test_scores_that_are_all_alike_are_not_blown_up_where_the_batch_divides():
    objective, seqs = GRPO(baseline="none", scale="batch"), answers(1, 1)
    for scores in ([3.0, 3.0], [3.0, 1.0]):
        good = objective._advantages(tensor(scores), tensor([0, 1]), seqs, torch.zeros(2), None)
        assert good.abs().max() < 4


# ---- expectations by enumeration

REWARD = [1.0, 0.2, -0.7]


def true_gradient(policy):
    """Of minus the expected reward."""
    return torch.autograd.grad(-(policy.logits.softmax(0) * tensor(REWARD, dtype=F64)).sum(), policy.logits)[0]


def expected_gradient(objective, policy, size):
    """Over all groups of answers that the policy can draw, each with its probability."""
    chance, total = policy.logits.softmax(0).detach(), torch.zeros(3, dtype=F64)
    for arms in itertools.product(range(3), repeat=size):
        scores, groups = tensor([REWARD[arm] for arm in arms], dtype=F64), torch.zeros(size, dtype=torch.long)
        seqs = Sequences.of([([0, arm], [False, True]) for arm in arms])
        good = objective._advantages(scores, groups, seqs, torch.zeros(size, dtype=F64), None)
        total += chance[list(arms)].prod() * gradient(objective, policy, sampled(policy, arms, good.tolist()))
    return total


def test_leaving_one_out_is_unbiased_and_the_groups_own_mean_is_too_small_by_one_part_in_its_size():
    policy = Table([0.5, -0.3, 0.1])
    exact = true_gradient(policy)
    torch.testing.assert_close(expected_gradient(RLOO(kl=0.0), policy, 3), exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(expected_gradient(GRPO(scale="none"), policy, 3), exact * 2 / 3, rtol=1e-6, atol=1e-7)
    scaled = expected_gradient(GRPO(), policy, 3)
    turned = torch.nn.functional.cosine_similarity(scaled, exact, dim=0)
    assert turned < 0.999, "dividing by the group's deviation changes the direction"


@pytest.mark.parametrize("kl_as", ["loss", "weighted", "score", "reward"])
def test_each_way_to_pull_has_the_gradient_that_its_card_says(kl_as):
    """Of answers of one token in their true shares: 1, 2 and 5 of 8."""
    policy = Table([math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)])
    other = tensor([0.5, 0.2, 0.3], dtype=F64).log()
    arms = [0, 1, 1, 2, 2, 2, 2, 2]
    seqs = Sequences.of([([0, arm], [False, True]) for arm in arms])
    ref_logp = other[seqs.tokens[seqs.train]]
    objective = GRPO(kl=1.0, kl_as=kl_as, baseline="none", scale="none")
    logp = policy.logprobs(seqs).detach()
    good = objective._advantages(torch.zeros(8, dtype=F64), torch.arange(8), seqs, logp, ref_logp)
    found = gradient(objective, policy, sampled(policy, arms, good.tolist(), ref_logp))
    ours = policy.logits.log_softmax(0)
    forward = (other.exp() * (other - ours)).sum()
    reverse = (ours.exp() * (ours - other)).sum()
    expected = torch.autograd.grad(forward if kl_as == "loss" else reverse, policy.logits)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_correction_takes_the_bias_of_another_sampler_away():
    """A stale sampler's draws, in its own true shares: the corrected gradient is the policy's own."""
    policy = Table([0.2, -0.1, 0.6])
    stale = tensor([1 / 4, 1 / 2, 1 / 4], dtype=F64)
    arms = [0, 1, 1, 2]
    seqs = Sequences.of([([0, arm], [False, True]) for arm in arms])
    before = stale.log()[seqs.tokens[seqs.train]]
    batch = sampled(policy, arms, [REWARD[arm] for arm in arms], before=before)
    corrected = Rollouts(
        seqs, sampled_logp=before, advantage=batch.advantage, version=batch.version, old_logp=policy.logprobs(seqs).detach()
    )
    exact = true_gradient(policy)
    settings = {"baseline": "none", "scale": "none"}
    right = gradient(GRPO(correction=Correction(cap=10.0), **settings), policy, corrected)
    torch.testing.assert_close(right, exact, rtol=1e-6, atol=1e-8)
    raw = gradient(GRPO(**settings), policy, sampled(policy, arms, batch.advantage.tolist()))
    assert (raw - exact).norm() > 0.05


# ---- rollouts


def drawn(run):
    """(batch, samples with grades, figures) of the next update."""
    rolled = next(run.updates.stream)
    return rolled.batch, rolled.samples, rolled.stats


def test_dapo_draws_on_until_every_group_has_mixed_scores(home, tmp_path):
    plan = {"task": RARE, "rollout": rollout(problems=2)}
    once, _, seen = drawn(prepared(home, tmp_path / "once", {"kind": "grpo"}, **plan))
    batch, samples, figures = drawn(prepared(home, tmp_path / "more", {"kind": "dapo"}, **plan))
    assert (once.advantage == 0).any(), "the first two problems are not both mixed"
    assert figures["filled"] == (2.0, 2)
    assert len(samples) > 8, "what was drawn in vain is recorded, too"
    assert seen["mixed_groups"] == (float(len({int(each) for each in once.seqs.owner[once.advantage != 0] // 4})), 2)
    groups = [{grade.score for _, grade in samples[first : first + 4]} for first in range(0, len(samples), 4)]
    assert figures["mixed_groups"] == (float(sum(len(each) > 1 for each in groups)), len(groups))
    assert sum(len(each) > 1 for each in groups[:-2]) < 2, "and no further"
    assert batch.count == 8
    assert all((batch.advantage[batch.seqs.owner // 4 == group] != 0).all() for group in (0, 1))


def test_what_cannot_be_filled_is_learned_from_as_far_as_it_goes(home, tmp_path):
    run = prepared(home, tmp_path, {"kind": "dapo"}, task=RARE, rollout=rollout(problems=6, refill=1))
    batch, samples, figures = drawn(run)
    assert len(samples) == 48
    assert figures["filled"] == (batch.count / 4, 6)


def test_nothing_mixed_in_ten_rollouts_stops_the_run(home, tmp_path):
    always = {**CHARMED, "grader": {"kind": "function", "path": "test_policy_gradient:always"}}
    with pytest.raises(RunError, match="gave nothing to learn from"):
        drawn(prepared(home, tmp_path, {"kind": "dapo"}, task=always, rollout=rollout(problems=2, refill=1, max_tokens=2)))


def always(_problem, _text):
    return 1.0


def test_a_refilled_rollout_is_the_same_after_a_resume(home, tmp_path):
    plan = {"task": RARE, "rollout": rollout(problems=2)}
    whole, broken = (prepared(home, tmp_path / name, {"kind": "dapo"}, **plan) for name in ("whole", "broken"))
    next(whole.updates)
    next(broken.updates)
    state = broken.updates.stream.state()
    later = prepared(home, tmp_path / "later", {"kind": "dapo"}, **plan)
    later.updates.stream.load(*state)
    one, other = drawn(whole)[0], drawn(later)[0]
    assert torch.equal(one.seqs.tokens, other.seqs.tokens)
    assert torch.equal(one.advantage, other.advantage)


def test_remax_compares_with_the_greedy_answer(home, tmp_path):
    run = prepared(home, tmp_path, {"kind": "remax"}, rollout=rollout(per_problem=1))
    stream, heard = run.updates.stream, []
    whole = stream.objective.credit
    object.__setattr__(stream.objective, "credit", lambda samples, grades, *rest: heard.extend(samples) or whole(samples, grades, *rest))
    batch, samples, _ = drawn(run)
    greedy = {one.problem.id: one for one in heard if one.by == "greedy"}
    assert len(greedy) == len(samples) == batch.count == 3
    for one in greedy.values():
        start = one.sampled.index(True)
        logits = run.policy.model(torch.tensor([one.tokens])).logits[0, start - 1 : -1]
        assert logits.argmax(-1).tolist() == list(one.tokens[start:])
    expected = [grade.score - charm(None, greedy[one.problem.id].text) for one, grade in samples]
    last = batch.seqs.trained_lengths.cumsum(0) - 1
    assert batch.advantage[last].tolist() == pytest.approx(expected)


def test_the_own_sampler_needs_no_correction(home, tmp_path):
    for correction in ({}, {"level": "sequence_product", "mask": True}):
        objective = {"kind": "grpo", "correction": correction}
        batch, _, _ = drawn(prepared(home, tmp_path, objective))
        assert float((batch.old_logp - batch.sampled_logp).abs().max()) < 1e-5
        run = prepared(home, tmp_path, objective)
        fit(run, seen := Seen())
        assert seen.figures[0]["correction"] == pytest.approx(1, abs=1e-4)


def test_answers_that_were_cut_off_are_in_the_mean_and_not_in_the_update(home, tmp_path):
    whole, samples, _ = drawn(prepared(home, tmp_path, "grpo"))
    fewer, again, _ = drawn(prepared(home, tmp_path, {"kind": "grpo", "learn_cut_off": False}))
    assert [one.tokens for one, _ in samples] == [one.tokens for one, _ in again]
    kept = [row for row, (one, _) in enumerate(samples) if one.stop == "end"]
    assert 0 < len(kept) < len(samples)
    assert fewer.count == len(kept)
    assert torch.equal(fewer.advantage, whole.select(kept).advantage)


def test_reinforce_pp_takes_the_divergence_of_what_follows_from_each_token(home, tmp_path):
    run = prepared(home, tmp_path, {"kind": "reinforce_pp", "kl": 0.5}, optim={"learning_rate": 0.1, "warmup": 0.0})
    fit(run, Seen())  # the policy leaves its reference
    batch, samples, _ = drawn(run)
    returns = []
    for row, (_, grade) in enumerate(samples):
        own = batch.seqs.owner == row
        away = (batch.sampled_logp - batch.ref_logp)[own].double()
        returns += [grade.score - 0.5 * float(away[place:].sum()) for place in range(len(away))]
    assert float((batch.sampled_logp - batch.ref_logp).abs().max()) > 0.1
    exact = tensor(returns, dtype=F64)
    torch.testing.assert_close(batch.advantage.double(), (exact - exact.mean()) / exact.std(), rtol=1e-4, atol=1e-4)


def test_dr_grpo_divides_by_the_longest_answer_that_may_be_drawn(home, tmp_path):
    stream = prepared(home, tmp_path, "dr_grpo", rollout=rollout(max_tokens=17)).updates.stream
    assert stream.objective.length == 17
    assert DrGRPO(length=5).planned(17).length == 5
    assert DAPO().planned(17).length is None


def test_a_share_of_tokens_learns_those_that_were_least_certain(home, tmp_path):
    run = prepared(home, tmp_path, {"kind": "grpo", "top_entropy": 0.25})
    batch = next(run.updates).items[0].batch
    with torch.no_grad():
        batch = GRPO(top_entropy=0.25).annotate(batch, run.policy, Roles())
        spread = run.policy.over_vocab(batch.seqs, lambda logits, _: losses.entropy(logits))
    count = len(spread)
    assert math.ceil(count / 4) <= int(batch.learns.sum()) <= math.ceil(count / 4) + 1
    assert float(spread[batch.learns].min()) >= float(spread[~batch.learns].max())
    assert torch.equal(batch.select([0, 2]).learns, batch.learns[batch.seqs.trained_tokens([0, 2])])


# ---- settings


@pytest.mark.parametrize(("objective", "message"), [
    ({"kind": "grpo", "length": 5}, "aggregate sequence divides by no constant"),
    ({"kind": "grpo", "baseline": "none"}, "scale: group goes with a baseline of the group"),
    ({"kind": "grpo", "correction": {"floor": 0.5}}, "only what is masked has a smallest weight"),
    ({"kind": "grpo", "correction": {"mask": True, "floor": 3}}, "is not below the cap, 2"),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(objective, message, home):
    plan = {"model": str(home / "start"), "task": CHARMED, "steps": 1}
    with pytest.raises(ValueError, match=message):
        TrainSettings.model_validate({**plan, "objective": objective})


@pytest.mark.parametrize("kind", FAMILY)
def test_one_answer_to_a_problem_is_refused_where_answers_are_compared(kind, home):
    plan = {"model": str(home / "start"), "task": CHARMED, "steps": 1, "rollout": {"per_problem": 1}}
    if FAMILY[kind]().baseline in {"group", "leave_one_out"}:
        with pytest.raises(ValueError, match=r"rollout.per_problem: objective \w+ compares the answers to one problem"):
            TrainSettings.model_validate({**plan, "objective": kind})
    else:
        TrainSettings.model_validate({**plan, "objective": kind})


def test_reinforce_pp_takes_a_groups_mean_where_it_is_asked_to():
    assert ReinforcePP(baseline="group").baseline == "group"
    assert ReinforcePP(baseline="group").whiten
