"""What RLHF is made of: reward models, optimal policies of a bandit and of DPO and IPO on it, GAE, whitening, clips, KL control."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import assert_gradient_is_finite_differences, numbers
from torch import tensor

from posttrain import losses

F64 = torch.float64
few = settings(max_examples=60, deadline=None)


def vector(*values):
    return tensor(values, dtype=F64)


def same(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected if torch.is_tensor(expected) else vector(*expected), rtol=0, atol=tolerance)


# ---- reward models


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: losses.bradley_terry(vector(1)), 0.3132617),
        (lambda: losses.bradley_terry(vector(1), at_least=0.5), 0.4740770),
        (lambda: losses.bradley_terry(vector(1), at_least=vector(0.5)), 0.4740770),
        (lambda: losses.bradley_terry(vector(0.4), 0.7), 0.6330153),
        (lambda: losses.bradley_terry(vector(0.4), vector(0.7)), 0.6330153),
        (lambda: losses.labelled(vector(0.4), 0.7), 0.6330153),
        (lambda: 0.01 * losses.centring(vector(2), vector(1)), 0.09),
        (lambda: losses.choice(vector(1, 0, 0, 0), tensor([0] * 4), tensor([True, False, False, False])), 0.7436684),
    ],
)
def test_the_printed_values_of_reward_model_losses(found, expected):
    same(found(), [expected], 1e-7)


def test_reward_model_losses_have_the_gradients_of_their_finite_differences():
    soft, at_least = numbers(9, 1).sigmoid(), numbers(9, 2).abs()
    assert_gradient_is_finite_differences(lambda m: losses.bradley_terry(m, soft, at_least), numbers(9, 0, 2.0))
    assert_gradient_is_finite_differences(lambda s: losses.labelled(s, soft), numbers(9, 0, 2.0))
    assert_gradient_is_finite_differences(lambda r: losses.centring(r, numbers(9, 3)), numbers(9))
    best = tensor([False, True, False, False, True, False, False, False, True])
    assert_gradient_is_finite_differences(
        lambda r: losses.choice(r, tensor([0, 0, 0, 2, 2, 1, 1, 1, 1]), best), numbers(9, 0, 2.0)
    )


def test_swapping_a_pair_swaps_its_label_and_a_margin_is_asked_of_either_winner():
    margin, soft = numbers(20), numbers(20, 1).sigmoid()
    torch.testing.assert_close(losses.bradley_terry(-margin, 1 - soft, 0.3), losses.bradley_terry(margin, soft, 0.3))
    torch.testing.assert_close(losses.bradley_terry(margin, 0.0, 0.3), losses.bradley_terry(-margin, 1.0, 0.3))
    torch.testing.assert_close(losses.bradley_terry(margin, 0.0, 0.3), torch.nn.functional.softplus(margin + 0.3))
    torch.testing.assert_close(losses.labelled(margin, soft), losses.dpo(margin, 1.0, 1 - soft))


def test_choice_is_cross_entropy_over_each_group_wherever_its_answers_stand():
    rewards = vector(3, -1, 0.5, 2, 0, 1e4, -1e4)
    group, best = tensor([1, 0, 1, 0, 1, 2, 2]), tensor([False, True, True, False, False, False, True])
    expected = [-vector(-1, 2).log_softmax(0)[0], -vector(3, 0.5, 0).log_softmax(0)[1], vector(2e4)[0]]
    same(losses.choice(rewards, group, best), torch.stack(expected), 1e-9)
    same(losses.choice(rewards[:5] + group[:5] * 7.0, group[:5], best[:5]), torch.stack(expected[:2]), 1e-9)
    pair = losses.choice(vector(1.3, 0.2), tensor([0, 0]), tensor([True, False]))
    torch.testing.assert_close(pair, losses.bradley_terry(vector(1.1)))
    assert losses.choice(rewards[:0], group[:0], best[:0]).tolist() == []
    for wrong in (tensor([True, True]), tensor([False, False])):
        with pytest.raises(AssertionError, match="exactly one best"):
            losses.choice(vector(1, 2), tensor([0, 0]), wrong)


def test_reward_model_losses_are_finite_for_extreme_rewards_in_float32():
    margin = tensor([1e4, -1e4, 0.0]).requires_grad_()
    loss = losses.bradley_terry(margin, 0.7, 0.5)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), margin)[0].isfinite().all()


# ---- the optimum of reward and KL, and the bandits of DPO and IPO

REFERENCE, REWARD, BETA = vector(0.2, 0.5, 0.3), vector(1, 0, -1), 0.5
OPTIMUM = (REFERENCE * (REWARD / BETA).exp()) / (REFERENCE * (REWARD / BETA).exp()).sum()
PAIRS = tensor([[0, 0, 1], [1, 2, 2]])


def value_of(policy):
    return float((policy * REWARD).sum() - BETA * (policy * (policy / REFERENCE).log()).sum())


def test_the_optimum_of_reward_less_kl_is_the_reference_tilted_by_the_reward():
    same(OPTIMUM, (0.7321654, 0.2477195, 0.0201151), 1e-7)
    assert float((REFERENCE * (REWARD / BETA).exp()).sum()) == pytest.approx(2.0184118, abs=1e-7)
    assert value_of(OPTIMUM) == pytest.approx(0.3511555, abs=1e-7)
    assert value_of(OPTIMUM) == pytest.approx(BETA * math.log(2.0184118), abs=1e-7)
    for seed in range(20):
        other = (OPTIMUM.log() + numbers(3, seed, 0.1)).softmax(0)
        assert value_of(other) < value_of(OPTIMUM)


def test_the_implicit_reward_of_the_optimum_is_the_reward_up_to_a_constant():
    implicit = BETA * (OPTIMUM / REFERENCE).log()
    assert float((implicit - REWARD).diff().abs().max()) < 1e-12
    chosen, rejected = PAIRS
    log_ratio = (OPTIMUM / REFERENCE).log()
    bradley_terry = (REWARD[chosen] - REWARD[rejected]).sigmoid()
    same((BETA * (log_ratio[chosen] - log_ratio[rejected])).sigmoid(), bradley_terry, 1e-12)


def test_dpo_on_bradley_terry_labels_is_stationary_at_the_optimum_and_psi_po_zero():
    chosen, rejected = PAIRS
    soft = (REWARD[chosen] - REWARD[rejected]).sigmoid()
    logits = OPTIMUM.log().requires_grad_()
    log_ratio = logits.log_softmax(0) - REFERENCE.log()
    margin = log_ratio[chosen] - log_ratio[rejected]
    (gradient,) = torch.autograd.grad(losses.dpo(margin, BETA, 1 - soft).sum(), logits, retain_graph=True)
    assert float(gradient.abs().max()) < 1e-12
    assert float(losses.psi_po(margin.detach(), soft, BETA, losses.psi_log_odds).max()) < 1e-12
    shifted = losses.dpo(margin + 0.1, BETA, 1 - soft).sum()
    assert shifted > losses.dpo(margin, BETA, 1 - soft).sum()


def bandit(loss, rate, steps):
    """The policy over three arms after gradient descent on y1 > y2 > y3, each pair equally often, from a uniform reference."""
    logits, (chosen, rejected) = torch.zeros(3, dtype=F64), PAIRS
    for _ in range(steps):
        point = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point[chosen] - point[rejected]).mean(), point)
        logits = logits - rate * gradient
    return logits.softmax(0)


@pytest.mark.parametrize(("tau", "expected"), [(0.1, (0.96437, 0.03440, 0.00123)), (1.0, (0.44844, 0.32132, 0.23024))])
def test_ipo_on_certain_preferences_stops_where_tau_says(tau, expected):
    found = bandit(lambda margin: losses.ipo(margin, tau), 0.3, 200)
    same(found, expected, 5e-6)
    same(found.log().diff(), [-1 / (3 * tau)] * 2, 1e-9)


def test_dpo_on_certain_preferences_collapses_whatever_beta_says():
    for beta in (0.1, 1.0):
        found = [bandit(lambda margin, beta=beta: losses.dpo(margin, beta), 100.0, steps)[0] for steps in (100, 1000)]
        assert found[0] > 0.999  # as far as 10,000 steps of rate 1
        assert found[1] > 0.9999


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 0.6224593), (0.1, 0.9933071)])
def test_ipo_on_two_arms_has_the_sigmoid_of_its_target(tau, expected):
    margin = torch.zeros(1, dtype=F64)
    for _ in range(100):
        point = margin.clone().requires_grad_()
        margin = margin - 0.4 * torch.autograd.grad(losses.ipo(point, tau).sum(), point)[0]
    same(margin.sigmoid(), [expected], 1e-7)


# ---- generalised advantage estimation


def brute_force(reward, value, gamma, lam, lengths):
    """The O(T^2) sum over later surprises, one sequence at a time."""
    found, start = [], 0
    for length in lengths:
        r, v = reward[start : start + length].tolist(), [*value[start : start + length].tolist(), 0.0]
        surprise = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        found += [sum((gamma * lam) ** (k - t) * surprise[k] for k in range(t, length)) for t in range(length)]
        start += length
    return tensor(found, dtype=F64)


def edges(lengths):
    return tensor([0, *lengths]).cumsum(0)


def test_gae_has_its_printed_values():
    reward, value = vector(0, 0, 1), vector(0.5, 0.6, 0.7)
    advantage = losses.gae(reward, value, 1.0, 0.95)
    same(advantage, (0.46575, 0.385, 0.3), 1e-12)
    same(advantage + value, (0.96575, 0.985, 1.0), 1e-12)
    same(losses.whiten(advantage), (0.9913436, 0.0170921, -1.0084358), 1e-7)
    same(losses.whiten(advantage, unbiased=False), (1.2141426, 0.0209335, -1.2350761), 1e-7)


@few
@given(lengths=st.lists(st.integers(0, 9), max_size=6), gamma=st.floats(0, 1), lam=st.floats(0, 1), seed=st.integers(0, 99))
def test_gae_is_the_sum_over_later_surprises_of_each_sequence_alone(lengths, gamma, lam, seed):
    reward, value = numbers(sum(lengths), seed), numbers(sum(lengths), seed + 100)
    found = losses.gae(reward, value, gamma, lam, edges(lengths))
    same(found, brute_force(reward, value, gamma, lam, lengths), 1e-12)


def test_gae_with_lambda_1_is_the_return_less_the_value_and_with_0_the_surprise():
    lengths, gamma = [4, 1, 6], 0.9
    reward, value = numbers(11), numbers(11, 1)
    discounted, surprise = [], []
    for part, base in zip(reward.split(lengths), value.split(lengths), strict=True):
        for t in range(len(part)):
            discounted.append(sum(gamma**k * float(part[t + k]) for k in range(len(part) - t)))
            surprise.append(float(part[t] - base[t] + (gamma * base[t + 1] if t + 1 < len(base) else 0)))
    same(losses.gae(reward, value, gamma, 1.0, edges(lengths)) + value, tensor(discounted, dtype=F64), 1e-12)
    same(losses.gae(reward, value, gamma, 0.0, edges(lengths)), tensor(surprise, dtype=F64), 1e-12)


def test_gae_of_several_sequences_is_that_of_each_and_none_means_one():
    lengths, reward, value = [3, 0, 5, 1], numbers(9), numbers(9, 1)
    whole = losses.gae(reward, value, 0.99, 0.9, edges(lengths))
    parts = [losses.gae(r, v, 0.99, 0.9) for r, v in zip(reward.split(lengths), value.split(lengths), strict=True)]
    same(torch.cat(parts), whole, 0)
    assert losses.gae(reward[:0], value[:0], 1.0, 1.0).tolist() == []


def test_gae_gives_constants_in_the_dtype_of_its_values():
    reward, value = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    for found in (losses.gae(reward, value.detach(), 1.0, 0.95), losses.gae(reward.detach(), value, 1.0, 0.95)):
        assert (found.requires_grad, found.dtype) == (False, torch.float32)


def test_gae_of_512_sequences_of_1000_tokens_takes_well_under_a_second():
    reward, value = torch.zeros(512_000), torch.ones(512_000)
    began = time.perf_counter()
    losses.gae(reward, value, 1.0, 0.95, edges([1000] * 512))
    assert time.perf_counter() - began < 1.0


# ---- whitening


@few
@given(count=st.integers(2, 30), seed=st.integers(0, 99), unbiased=st.booleans())
def test_whitened_values_have_mean_zero_and_deviation_one_and_may_keep_their_mean(count, seed, unbiased):
    values = numbers(count, seed, 3.0) + 5
    white = losses.whiten(values, unbiased=unbiased)
    assert float(white.mean()) == pytest.approx(0, abs=1e-9)
    if values.std() > 0.1:
        assert float(white.std(correction=int(unbiased))) == pytest.approx(1, abs=1e-5)
    kept = losses.whiten(values, shift_mean=False, unbiased=unbiased)
    same(kept, white + values.mean(), 1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
def test_values_without_spread_whiten_to_exactly_zero(unbiased):
    for value in (0.1, 1 / 3, 100.1, -2.3):
        for count in (1, 2, 3, 7, 16):
            for dtype in (torch.float32, F64):
                constant = torch.full((count,), value, dtype=dtype)
                assert losses.whiten(constant, unbiased=unbiased).tolist() == [0.0] * count
                torch.testing.assert_close(losses.whiten(constant, shift_mean=False, unbiased=unbiased), constant)
    assert losses.whiten(torch.zeros(0), unbiased=unbiased).tolist() == []


# ---- the clips


def surrogate(ratio, advantage, **clip):
    return losses.clipped_surrogate(vector(math.log(ratio) - 0.3), vector(-0.3), vector(advantage), **clip)


@pytest.mark.parametrize(("ratio", "advantage", "gain"), [(1.5, 1, 1.2), (1.5, -1, -1.5), (0.5, 1, 0.5), (0.5, -1, -0.8)])
def test_the_printed_values_of_the_policy_clip(ratio, advantage, gain):
    same(surrogate(ratio, advantage), [-gain], 1e-12)


def test_the_dual_clip_bounds_the_loss_of_bad_tokens_only():
    for ratio, advantage, expected in (
        (5, -2, 6),
        (2.9, -2, 5.8),
        (5, 2, -2.4),
        (5, 0.5, -0.6),
        (0.1, 2, -0.2),
        (0.1, -2, 1.6),
        (5, 0, 0),
    ):
        same(surrogate(ratio, advantage, dual_clip=3.0), [expected], 1e-12)
    same(surrogate(5, -2), [10], 1e-12)
    ratio, advantage = vector(5, 3.1, 2.9, 2.0, 9.0), vector(-1, -2, -2, -1, 0)
    logp = ratio.log().requires_grad_()
    losses.clipped_surrogate(logp, torch.zeros(5, dtype=F64), advantage, dual_clip=3.0).sum().backward()
    assert logp.grad is not None
    assert logp.grad[[0, 1, 4]].tolist() == [0.0] * 3
    same(logp.grad[2:4], (5.8, 2.0), 1e-12)


def test_the_gradient_of_the_dual_clip_is_its_finite_difference():
    sampled, advantage = numbers(40, 1, 0.8), numbers(40, 2)
    assert_gradient_is_finite_differences(
        lambda logp: losses.clipped_surrogate(logp, sampled, advantage, 0.2, 0.28, 2.0), numbers(40, 3, 0.8)
    )


def test_a_log_ratio_beyond_20_is_20():
    logp = tensor([300.0, -300.0]).requires_grad_()
    loss = losses.clipped_surrogate(logp, torch.zeros(2), tensor([-1.0, 1.0]))
    torch.testing.assert_close(loss, tensor([math.exp(20), -math.exp(-20)]))
    assert torch.autograd.grad(loss.sum(), logp)[0].tolist() == [0.0, 0.0]


def test_without_advantage_only_the_critic_learns():
    logp = numbers(5).requires_grad_()
    losses.clipped_surrogate(logp, numbers(5, 1), torch.zeros(5, dtype=F64), dual_clip=3.0).sum().backward()
    assert logp.grad is not None
    assert (logp.grad == 0).all()


def test_the_value_clip_takes_the_worse_of_both_and_stops_where_it_has_gone_far_enough():
    same(losses.clipped_value(vector(0.9), vector(0.5), vector(1.0), 0.2), [0.045], 1e-12)
    same(losses.clipped_value(vector(0.1), vector(0.5), vector(0.0), 0.2), [0.045], 1e-12)
    same(losses.clipped_value(vector(0.9), vector(0.5), vector(1.0), None), [0.005], 1e-12)
    same(losses.clipped_value(vector(0.1), vector(0.5), vector(1.0), 0.2), [0.405], 1e-12)  # further off than the clip: in full
    same(losses.clipped_value(vector(0.6), vector(0.5), vector(1.0), 0.2), [0.08], 1e-12)  # within the clip: as without
    value = vector(0.9, 0.1, 0.6).requires_grad_()
    old, returns = vector(0.5, 0.5, 0.5), vector(1, 1, 1)
    (gradient,) = torch.autograd.grad(losses.clipped_value(value, old, returns, 0.2).sum(), value)
    same(gradient, (0.0, -0.9, -0.4), 1e-12)
    for clip in (0.2, None):
        assert_gradient_is_finite_differences(
            lambda v, clip=clip: losses.clipped_value(v, numbers(30, 1), numbers(30, 2), clip), numbers(30)
        )


def test_none_of_these_reduces_what_it_is_given():
    a, b, c = numbers(5), numbers(5, 1), numbers(5, 2)
    for whole in (
        lambda rows: losses.clipped_surrogate(a[rows], b[rows], c[rows], dual_clip=3.0),
        lambda rows: losses.clipped_value(a[rows], b[rows], c[rows], 0.2),
        lambda rows: losses.bradley_terry(a[rows], b[rows].sigmoid(), c[rows]),
        lambda rows: losses.labelled(a[rows], b[rows].sigmoid()),
        lambda rows: losses.centring(a[rows], b[rows]),
    ):
        same(torch.cat([whole(slice(0, 2)), whole(slice(2, 5)), whole(slice(5, 5))]), whole(slice(0, 5)), 0)


# ---- the KL and its control


@pytest.mark.parametrize(
    ("apart", "spread", "bias"),
    [(0.1, {"k1": 20.0, "k2": 1.42, "k3": 1.42}, 0.002), (1.0, {"k1": 2.00, "k2": 1.73, "k3": 1.70}, 0.25)],
)
def test_the_spread_and_bias_of_the_kl_estimators_between_two_gaussians(apart, spread, bias):
    """By quadrature over the policy N(0, 1); the reference is N(apart, 1), and the KL is apart^2 / 2."""
    x = torch.linspace(-12, 12, 20_001, dtype=F64)
    weight = (-(x**2) / 2).softmax(0)
    for name, estimator in (("k1", losses.kl_k1), ("k2", losses.kl_k2), ("k3", losses.kl_k3)):
        found, kl = estimator(-(x**2) / 2, -((x - apart) ** 2) / 2), apart**2 / 2
        mean = float((weight * found).sum())
        assert mean / kl == pytest.approx(1 + (bias if name == "k2" else 0), abs=1e-3)
        assert float((weight * (found - mean) ** 2).sum()) ** 0.5 / kl == pytest.approx(spread[name], abs=5.1e-3)


def test_k3_times_an_attached_ratio_of_one_has_the_gradient_of_the_reverse_kl():
    policy, reference = vector(0.7, 0.3), vector(0.5, 0.5)
    logit = tensor(math.log(0.7 / 0.3), dtype=F64, requires_grad=True)
    logp = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)
    (policy * losses.kl_k3(logp, reference.log()) * (logp - logp.detach()).exp()).sum().backward()
    assert float(logit.grad) == pytest.approx(0.1779326, abs=1e-7)


def test_adaptive_kl_moves_beta_towards_its_target_and_saturates():
    assert losses.adaptive_kl(0.15, 12.0, 6.0, 512, 10_000) == pytest.approx(0.151536, abs=1e-12)
    assert losses.adaptive_kl(0.15, 1e9, 6.0, 512, 10_000) == losses.adaptive_kl(0.15, 7.3, 6.0, 512, 10_000)
    assert losses.adaptive_kl(0.15, 0.0, 6.0, 512, 10_000) == pytest.approx(0.15 * (1 - 0.2 * 0.0512))
    assert losses.adaptive_kl(0.15, 6.0, 6.0, 512, 10_000) == 0.15
    assert losses.adaptive_kl(0.15, 6.6, 6.0, 512, 10_000) == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
