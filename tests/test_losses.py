"""Losses as pure functions: values known from their formulas, gradients against finite differences, exact zeros."""

import math

import pytest
import torch
from torch import tensor

from posttrain import losses

F64 = torch.float64


def numbers(count, seed=0, scale=1.0):
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=F64)


def assert_gradient_is_finite_differences(function, point):
    point = point.clone().requires_grad_()
    (exact,) = torch.autograd.grad(function(point).sum(), point)
    step = 1e-6 * torch.eye(len(point), dtype=F64)
    with torch.no_grad():
        numeric = tensor(
            [(function(point + each).sum() - function(point - each).sum()).item() / 2e-6 for each in step], dtype=F64
        )
    torch.testing.assert_close(exact, numeric, rtol=1e-7, atol=1e-8)


# ---- aggregation


PER_TOKEN, OWNER = tensor([4.0, 1.0, 1.0, 1.0], dtype=F64), tensor([0, 1, 1, 1])


def test_the_three_ways_to_a_mean_give_their_known_values():
    sums, means = losses.sequence_sums(PER_TOKEN, OWNER, 2), losses.sequence_means(PER_TOKEN, OWNER, 2)
    assert sums.tolist() == [4.0, 3.0]
    assert means.tolist() == [4.0, 1.0]
    assert PER_TOKEN.sum() / 4 == 1.75  # over tokens
    assert means.sum() / 2 == 2.5  # over tokens of a sequence, then over sequences
    assert sums.sum() / 2 == 3.5  # summed over tokens, then over sequences
    assert sums.sum() / (2 * 5) == 0.7  # over a fixed length of 5


def test_a_sequence_without_tokens_has_the_mean_zero_and_not_nan():
    assert losses.sequence_means(PER_TOKEN, tensor([0, 2, 2, 2]), 4).tolist() == [4.0, 0.0, 1.0, 0.0]
    assert losses.sequence_means(PER_TOKEN[:0], OWNER[:0], 2).tolist() == [0.0, 0.0]


def test_a_tokens_share_in_its_sequence_mean_falls_with_the_sequences_length():
    values = torch.ones(110, dtype=F64, requires_grad=True)
    owner = tensor([0] * 10 + [1] * 100)
    losses.sequence_means(values, owner, 2).sum().backward()
    assert values.grad is not None
    assert values.grad[0] / values.grad[-1] == pytest.approx(10)
    assert torch.autograd.grad(losses.sequence_sums(values, owner, 2).sum(), values)[0].tolist() == [1.0] * 110


# ---- group advantages


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((1, 0, 0, 1), (0.8658754, -0.8658754, -0.8658754, 0.8658754)),
        ((1, 0, 0, 0), (1.4997000, -0.4999000, -0.4999000, -0.4999000)),
    ],
)
def test_a_groups_advantages_use_the_bessel_deviation_and_1e_minus_4(scores, expected):
    found = losses.group_advantages(tensor(scores, dtype=F64), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found, tensor(expected, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_equal_scores_has_an_advantage_of_exactly_zero(dtype, scale):
    wrong = []
    for score in (0.1, 0.7, 1 / 3, 0.99, -2.3, 100.1):
        for size in (1, 2, 3, 5, 7, 8, 16):
            scores = tensor([score] * size + [0.0, 1.0], dtype=dtype)
            groups = tensor([0] * size + [1, 1])
            if not (losses.group_advantages(scores, groups, scale)[:size] == 0).all():
                wrong.append((score, size))
    assert wrong == []


def test_the_batch_scale_divides_by_the_deviation_of_all_scores():
    scores, groups = tensor([1.0, 0, 5, 5, 3, 1], dtype=F64), tensor([0, 0, 1, 1, 2, 2])
    spread = math.sqrt(sum((x - 2.5) ** 2 for x in scores.tolist()) / 5)
    expected = tensor([0.5, -0.5, 0, 0, 1, -1], dtype=F64)
    torch.testing.assert_close(losses.group_advantages(scores, groups, "batch"), expected / (spread + 1e-4))
    torch.testing.assert_close(losses.group_advantages(scores, groups, "none"), expected)


def test_a_group_of_one_and_an_empty_batch_have_no_advantage():
    for scale in ("group", "batch", "none"):
        assert losses.group_advantages(tensor([3.0]), tensor([0]), scale).tolist() == [0.0]
        assert losses.group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), scale).tolist() == []


def test_groups_do_not_see_each_other_and_their_order_is_free():
    scores, groups = numbers(12), tensor([0, 1, 2] * 4)
    whole = losses.group_advantages(scores, groups)
    for group in range(3):
        alone = losses.group_advantages(scores[groups == group], torch.zeros(4, dtype=torch.long))
        torch.testing.assert_close(whole[groups == group], alone, rtol=0, atol=1e-15)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(losses.group_advantages(scores[order], groups[order]), whole[order])


def test_advantages_ignore_a_shift_of_the_scores_and_the_group_scale_also_their_size():
    scores, groups = numbers(8), tensor([0] * 4 + [1] * 4)
    for scale in ("group", "batch", "none"):
        torch.testing.assert_close(
            losses.group_advantages(scores + 7, groups, scale), losses.group_advantages(scores, groups, scale)
        )
    bigger, plain = (losses.group_advantages(each, groups, "group", eps=0.0) for each in (3 * scores, scores))
    torch.testing.assert_close(bigger, plain)
    torch.testing.assert_close(
        losses.group_advantages(3 * scores, groups, "none"), 3 * losses.group_advantages(scores, groups, "none")
    )


# ---- KL estimators


POLICY, REFERENCE = tensor([0.7, 0.3], dtype=F64), tensor([0.5, 0.5], dtype=F64)
KL = 0.0822829
ESTIMATORS = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}


@pytest.mark.parametrize(
    ("name", "values", "mean"),
    [
        ("k1", (0.3364722, -0.5108256), KL),
        ("k2", (0.0566068, 0.1304714), 0.0787662),
        ("k3", (0.0507580, 0.1558410), KL),
    ],
)
def test_kl_estimators_on_a_coin_have_their_known_values(name, values, mean):
    found = ESTIMATORS[name](POLICY.log(), REFERENCE.log())
    torch.testing.assert_close(found, tensor(values, dtype=F64), rtol=0, atol=1e-7)
    assert float((POLICY * found).sum()) == pytest.approx(mean, abs=1e-7)


@pytest.mark.parametrize(("name", "gradient"), [("k1", 0.0), ("k2", 0.1779326), ("k3", 0.2)])
def test_as_a_differentiated_term_k1_pulls_nowhere_k2_along_the_reverse_and_k3_along_the_forward_kl(name, gradient):
    logit = tensor(math.log(0.7 / 0.3), dtype=F64, requires_grad=True)
    logp = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)
    (POLICY * ESTIMATORS[name](logp, REFERENCE.log())).sum().backward()
    assert logit.grad is not None
    assert float(logit.grad) == pytest.approx(gradient, abs=1e-7)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_kl_of_a_policy_to_itself_is_exactly_zero(name):
    logp = numbers(20).requires_grad_()
    found = ESTIMATORS[name](logp, logp.detach().clone())
    assert found.tolist() == [0.0] * 20
    if name != "k1":
        found.sum().backward()
        assert logp.grad is not None
        assert logp.grad.abs().max() == 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_gradient_of_a_kl_estimator_is_its_finite_difference(name):
    assert_gradient_is_finite_differences(lambda logp: ESTIMATORS[name](logp, numbers(9, 1)), numbers(9))


def test_k2_and_k3_are_never_negative_and_k3_keeps_its_digits_near_zero():
    logp, ref_logp = numbers(1000), numbers(1000, 1)
    assert losses.kl_k2(logp, ref_logp).min() >= 0
    assert losses.kl_k3(logp, ref_logp).min() >= 0
    gap = tensor([1e-5], dtype=F64)  # exp(d) - 1 - d is d^2 / 2 + d^3 / 6 there, lost when exp is rounded first
    assert float(losses.kl_k3(-gap, 0 * gap)) == pytest.approx(1e-10 / 2 + 1e-15 / 6, rel=1e-8, abs=0)


# ---- clipped surrogate


def surrogate(ratio, advantage, **clip):
    return float(
        losses.clipped_surrogate(
            tensor([math.log(ratio)], dtype=F64), tensor([0.0], dtype=F64), tensor([advantage], dtype=F64), **clip
        )
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.4),  # clipped above where it would gain
        (0.5, 2.0, -1.0),  # a fall of a good token counts in full
        (1.5, -2.0, 3.0),  # a rise of a bad token counts in full
        (0.5, -2.0, 1.6),  # clipped below where it would gain
        (0.5, 0.0, 0.0),
    ],
)
def test_the_clipped_surrogate_has_its_known_values(ratio, advantage, expected):
    assert surrogate(ratio, advantage) == pytest.approx(expected, abs=1e-12)


def test_the_two_sides_are_clipped_by_their_own_settings():
    assert surrogate(9.0, 1.0, clip_low=0.1, clip_high=0.28) == pytest.approx(-1.28)
    assert surrogate(0.1, -1.0, clip_low=0.1, clip_high=0.28) == pytest.approx(0.9)


def test_where_the_surrogate_is_clipped_its_gradient_is_exactly_zero_and_elsewhere_it_is_not():
    ratio = tensor([1.21, 3.0, 0.79, 0.1, 1.19, 0.81, 0.5, 1.5], dtype=F64)
    advantage = tensor([1.0, 0.3, -1.0, -0.3, 1.0, -1.0, 1.0, -1.0], dtype=F64)
    logp = ratio.log().requires_grad_()
    losses.clipped_surrogate(logp, torch.zeros(8, dtype=F64), advantage).sum().backward()
    assert logp.grad is not None
    assert logp.grad[:4].tolist() == [0.0] * 4
    torch.testing.assert_close(logp.grad[4:], -(ratio * advantage)[4:])


def test_at_a_ratio_of_one_the_gradient_is_minus_the_advantage_so_that_descent_raises_what_was_good():
    logp, advantage = numbers(6).requires_grad_(), numbers(6, 1)
    losses.clipped_surrogate(logp, logp.detach().clone(), advantage).sum().backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, -advantage, rtol=0, atol=0)


def test_the_gradient_of_the_clipped_surrogate_is_its_finite_difference():
    sampled, advantage = numbers(40, 1, 0.3), numbers(40, 2)
    assert_gradient_is_finite_differences(
        lambda logp: losses.clipped_surrogate(logp, sampled, advantage, 0.2, 0.28), numbers(40, 3, 0.3)
    )


def test_no_loss_reduces_what_it_is_given():
    logp, other, advantage = numbers(5), numbers(5, 1), numbers(5, 2)
    for whole in (
        lambda rows: losses.clipped_surrogate(logp[rows], other[rows], advantage[rows]),
        lambda rows: losses.kl_k1(logp[rows], other[rows]),
        lambda rows: losses.kl_k2(logp[rows], other[rows]),
        lambda rows: losses.kl_k3(logp[rows], other[rows]),
    ):
        torch.testing.assert_close(torch.cat([whole(slice(0, 2)), whole(slice(2, 5))]), whole(slice(0, 5)), rtol=0, atol=0)
