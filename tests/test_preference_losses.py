"""Preference losses: their printed values, gradients, minima and symmetries, and the derivations that they come from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import assert_gradient_is_finite_differences, numbers
from torch import tensor

from posttrain import losses

F64 = torch.float64
BETA = 0.1
CHOSEN, REJECTED, MARGIN = (tensor([x], dtype=F64) for x in (1.0, -0.5, 1.5))  # of log-probs -10, -12 and reference -11, -11.5
GOOD = tensor([True])
few = settings(max_examples=60, deadline=None)
finite = st.floats(-30, 30)


def bad(ratio):
    return torch.zeros(len(ratio), dtype=torch.bool)


def good(ratio):
    return ~bad(ratio)


# every loss as a function of the two log-ratios (or mean log-probs), at the settings of the printed values
BY_MARGIN = {
    "dpo": lambda h: losses.dpo(h, BETA),
    "cdpo": lambda h: losses.dpo(h, BETA, 0.1),
    "robust": lambda h: losses.robust_dpo(h, BETA, 0.1),
    "ipo": lambda h: losses.ipo(h, BETA),
    "psi_po": lambda h: losses.psi_po(h, torch.full_like(h, 0.7), BETA, losses.psi_log_odds),
    "hinge": lambda h: losses.hinge(h, BETA),
    "exo": lambda h: losses.exo(h, BETA),
    "discopop": lambda h: losses.discopop(h, BETA),
    "rpo": lambda h: losses.rpo(h, torch.ones_like(h), BETA, 0.5),
}
BY_SIDES = {
    **{name: lambda c, r, f=f: f(c - r) for name, f in BY_MARGIN.items()},
    "dpop": lambda c, r: losses.dpop(c - r, c, BETA, 5.0),
    "nca": lambda c, r: losses.nca(c, r, BETA),
    "bco": lambda c, r: losses.bco(c, good(c), BETA, 0.0) + losses.bco(r, bad(r), BETA, 0.0),
    "sppo": lambda c, r: losses.sppo(c, r, BETA),
    "apo_zero": lambda c, r: losses.apo_zero(c, r, BETA),
    "apo_down": lambda c, r: losses.apo_down(c, r, BETA),
    "aot": lambda c, r: losses.aot(c - r, numbers(len(c), 9).to(c), BETA),
    "aot_unpaired": lambda c, r: losses.aot_unpaired(c, r, BETA, 0.1),
    "kto": lambda c, r: losses.kto(c, good(c), 0.2, BETA) + losses.kto(r, bad(r), 0.2, BETA),
    "forward_kl": lambda c, r: losses.dpo(losses.f_forward_kl(c) - losses.f_forward_kl(r), BETA),
    "js": lambda c, r: losses.dpo(losses.f_js(c) - losses.f_js(r), BETA),
    "alpha": lambda c, r: losses.dpo(losses.f_alpha(c, 0.6) - losses.f_alpha(r, 0.6), BETA),
    "reverse_kl": lambda c, r: losses.dpo(losses.f_reverse_kl(c) - losses.f_reverse_kl(r), BETA),
    "simpo": lambda c, r: losses.simpo(c, r, 2.0, 1.0),
    "orpo": lambda c, r: losses.orpo(-c.abs(), -r.abs()),
}
WHOLE_BATCH = {"aot", "aot_unpaired"}


def gradients(function, *points):
    points = [point.detach().clone().requires_grad_() for point in points]
    return torch.autograd.grad(function(*points).sum(), points)


def slope(function, at):
    return float(gradients(function, tensor([at], dtype=F64))[0])


# ---- values


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: losses.dpo(MARGIN, BETA), 0.6209570),
        (lambda: losses.dpo(MARGIN, BETA, 0.1), 0.6359570),
        (lambda: losses.dpo(MARGIN, BETA, tensor([0.1], dtype=F64)), 0.6359570),
        (lambda: losses.robust_dpo(MARGIN, BETA, 0.1), 0.6022070),
        (lambda: losses.dpo(tensor([-10.0 + 12], dtype=F64), BETA), 0.5981389),  # reference-free, and CPO
        (lambda: losses.dpo(CHOSEN / 5 - REJECTED / 10, BETA), 0.6807253),  # means over 5 and 10 tokens
        (lambda: losses.dpo(0 * MARGIN, BETA), 0.6931472),
        (lambda: losses.ipo(MARGIN, BETA), 12.25),
        (lambda: losses.ipo(CHOSEN / 5 - REJECTED / 10, BETA), 22.5625),
        (lambda: losses.hinge(MARGIN, BETA), 0.85),
        (lambda: losses.nca(CHOSEN, REJECTED, BETA), 1.3508248),
        (lambda: losses.bco(CHOSEN, GOOD, BETA, 0.0) + losses.bco(REJECTED, ~GOOD, BETA, 0.0), 1.3128563),
        (lambda: losses.exo(MARGIN, BETA), 2.5055166),
        (lambda: losses.sppo(CHOSEN, REJECTED, BETA), 36.25),
        (lambda: losses.apo_zero(CHOSEN, REJECTED, BETA), 0.9625234),
        (lambda: losses.apo_down(CHOSEN, REJECTED, BETA), 0.9875493),
        (lambda: losses.discopop(MARGIN, BETA), 0.8493376),
        (lambda: losses.kto(CHOSEN, GOOD, 0.2, BETA), 0.4800107),
        (lambda: losses.kto(REJECTED, ~GOOD, 0.2, BETA), 0.4825071),
        (lambda: losses.log_odds_of_mean(tensor([-2.0], dtype=F64)) - losses.log_odds_of_mean(tensor([-1.2], dtype=F64)), -1.0129690),
        (lambda: losses.orpo(tensor([-2.0], dtype=F64), tensor([-1.2], dtype=F64)), 1.3227593),
        (lambda: losses.simpo(tensor([-2.0], dtype=F64), tensor([-1.2], dtype=F64), 2.0, 1.0), 2.6716447),
    ],
)  # fmt: skip
def test_the_printed_values(found, expected):
    assert float(found()) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda h: losses.dpo(h, BETA), -0.0462570),
        (lambda h: losses.dpo(h, BETA, 0.1), -0.0362570),
        (lambda h: losses.robust_dpo(h, BETA, 0.1), -0.0587570),
        (lambda h: losses.ipo(h, BETA), -7.0),
    ],
)
def test_the_printed_slopes(function, expected):
    assert slope(function, 1.5) == pytest.approx(expected, abs=1e-7)


def test_values_worked_out_by_hand_where_none_are_printed():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    fallen = losses.dpop(MARGIN, tensor([-0.3], dtype=F64), BETA, 5.0)  # 1.5 - 5 x 0.3 = 0
    assert float(fallen) == pytest.approx(math.log(2))
    assert losses.dpop(MARGIN, CHOSEN, BETA, 5.0) == losses.dpo(MARGIN, BETA), "a chosen answer that rose costs nothing"
    assert float(losses.bco(CHOSEN, GOOD, BETA, 0.3)) == pytest.approx(-math.log(sigmoid(0.1 - 0.3)))
    assert float(losses.bco(CHOSEN, ~GOOD, BETA, 0.3)) == pytest.approx(-math.log(sigmoid(0.3 - 0.1)))
    for ratio, label, weight in ((CHOSEN, GOOD, 3.0), (REJECTED, ~GOOD, 0.5)):
        plain = losses.kto(ratio, label, 0.2, BETA)
        torch.testing.assert_close(losses.kto(ratio, label, 0.2, BETA, 3.0, 0.5), weight * plain)
    assert losses.f_forward_kl(tensor([math.log(2)], dtype=F64)).item() == pytest.approx(0.5)
    assert losses.f_js(tensor([math.log(3)], dtype=F64)).item() == pytest.approx(math.log(2 * 3 / 4))
    assert losses.f_alpha(tensor([math.log(4)], dtype=F64), 0.5).item() == pytest.approx((4**-0.5 - 1) / -0.5)
    assert losses.f_alpha(tensor([math.log(4)], dtype=F64), 2.0).item() == pytest.approx(3)
    assert losses.wpo_weight(tensor([-0.4, 0.5]), tensor([-0.6, -0.2])).tolist() == pytest.approx([math.exp(-1), 1.0])
    a, b = sigmoid(0.1 * 1.5), sigmoid(0.5 * 2.0)
    kl = b * math.log(b / a) + (1 - b) * math.log((1 - b) / (1 - a))
    assert float(losses.rpo(MARGIN, tensor([2.0], dtype=F64), BETA, 0.5)) == pytest.approx(kl)
    policy, reference = tensor([3.0, -1.0, 2.0], dtype=F64), tensor([0.0, 2.0, -2.0], dtype=F64)
    torch.testing.assert_close(losses.aot(policy, reference, BETA), losses.dpo(tensor([1.0, 2.0, 1.0], dtype=F64), BETA))
    torch.testing.assert_close(
        losses.aot_unpaired(policy, reference, BETA, 0.1), losses.dpo(tensor([1.0, 2.0, 1.0], dtype=F64), BETA, 0.1)
    )


# ---- gradients


@pytest.mark.parametrize("name", BY_SIDES)
def test_the_gradient_of_a_preference_loss_is_its_finite_difference(name):
    chosen, rejected = numbers(12, 1, 2.0), numbers(12, 2, 2.0)
    assert_gradient_is_finite_differences(lambda c: BY_SIDES[name](c, rejected), chosen)
    assert_gradient_is_finite_differences(lambda r: BY_SIDES[name](chosen, r), rejected)


def test_the_gradient_of_log_odds_and_of_f_is_the_finite_difference_on_both_sides_of_their_seams():
    below = tensor([-0.02, -0.1, -0.69, -0.70, -2.0, -30.0], dtype=F64)
    assert_gradient_is_finite_differences(losses.log_odds_of_mean, below)
    for function in (losses.f_js, losses.f_forward_kl, lambda x: losses.f_alpha(x, 0.3), lambda x: losses.f_alpha(x, 1.7)):
        assert_gradient_is_finite_differences(function, numbers(9, 3, 2.0))


def test_constants_get_no_gradient_and_the_weight_of_wpo_has_none():
    point, shift = tensor(0.2, dtype=F64, requires_grad=True), tensor(0.3, dtype=F64, requires_grad=True)
    ratio = numbers(4).requires_grad_()
    (losses.kto(ratio, good(ratio), point, BETA) + losses.bco(ratio, bad(ratio), BETA, shift)).sum().backward()
    assert (point.grad, shift.grad) == (None, None)
    assert ratio.grad is not None
    assert not losses.wpo_weight(ratio, ratio).requires_grad


def test_a_step_down_raises_the_chosen_and_lowers_the_rejected_answer_at_the_reference():
    for name in set(BY_SIDES) - {"orpo", "apo_down", "aot", "discopop"}:
        start = torch.full((1,), -0.5, dtype=F64) if name == "simpo" else torch.zeros(1, dtype=F64)
        up, down = gradients(BY_SIDES[name], start, start)
        assert float(up) <= 0 <= float(down), name
        assert float(down) > 0, name
    up, down = gradients(losses.orpo, tensor([-0.5], dtype=F64), tensor([-0.5], dtype=F64))
    assert float(up) < 0 < float(down)
    up, down = gradients(BY_SIDES["apo_down"], 0 * CHOSEN, 0 * CHOSEN)
    assert (float(up), float(down)) == pytest.approx((0.0, BETA / 4)), "both fall, the rejected one more: at first only that"
    assert slope(lambda c: BY_SIDES["apo_down"](c, c.detach() - 30), 1.0) > 0, "the chosen one falls once it is far ahead"


def test_discopop_has_a_hump_at_the_reference_as_its_formula_says():
    assert slope(BY_MARGIN["discopop"], 0.0) == pytest.approx(BETA * (5 * (1 - math.log(2)) - 0.75))  # m' = 1 / (4 x 0.05) = 5
    assert slope(BY_MARGIN["discopop"], 2.0) < 0
    assert slope(BY_MARGIN["discopop"], -4.0) < 0


# ---- where the minima are


def descend(function, start, rate, steps=400):
    point = tensor(start, dtype=F64)
    for _ in range(steps):
        point = point - rate * gradients(function, point)[0]
    return point.tolist()


def test_losses_with_a_finite_minimum_go_there_and_from_above_as_well():
    odds = math.log(0.9 / 0.1) / BETA
    assert BETA * odds == pytest.approx(2.1972246)
    for start in ([0.0], [40.0]):
        assert descend(lambda h: losses.dpo(h, BETA, 0.1), start, 500) == pytest.approx([odds])
        assert descend(lambda h: losses.exo(h, BETA, 0.1), start, 400) == pytest.approx([odds])
        assert descend(lambda h: losses.ipo(h, BETA), start, 0.4) == pytest.approx([5.0])
        assert descend(
            lambda h: losses.psi_po(h, tensor([0.95], dtype=F64), BETA, losses.psi_identity), start, 0.4
        ) == pytest.approx([4.5])
        assert descend(lambda h: losses.rpo(h, tensor([4.0], dtype=F64), BETA, 0.5), start, 500) == pytest.approx([20.0])
        assert descend(lambda c: losses.nca(c, c.detach(), BETA), start, 200) == pytest.approx([math.log(2) / BETA])
    assert descend(lambda x: losses.sppo(x[:1], x[1:], BETA), [0.0, 0.0], 0.4) == pytest.approx([5.0, -5.0])


def test_the_others_have_no_finite_minimum_their_gradient_only_vanishes():
    reach = tensor([-100.0, 0.0, 5.0, 100.0, 200.0], dtype=F64)
    still = torch.zeros_like(reach)
    for name in ("dpo", "bco", "kto", "apo_zero", "reverse_kl", "aot_unpaired", "simpo", "dpop"):
        function = BY_SIDES[name] if name != "aot_unpaired" else lambda c, r: losses.aot_unpaired(c, r, BETA)
        assert (gradients(function, reach / 10 if name == "simpo" else reach, still)[0] < 0).all(), name
    assert (gradients(BY_SIDES["apo_down"], still, reach)[1] > 0).all()
    assert (gradients(BY_SIDES["nca"], still, reach)[1] > 0).all(), "NCA: the rejected answer falls for ever"
    below = tensor([-30.0, -3.0, -0.1, -1e-4], dtype=F64)
    assert (gradients(losses.orpo, below, torch.full_like(below, -1.0))[0] < 0).all()


def test_the_hinge_is_flat_beyond_one_and_robust_dpo_has_no_bottom():
    assert slope(lambda h: losses.hinge(h, BETA), 10.001) == 0
    assert slope(lambda h: losses.hinge(h, BETA), 9.999) == pytest.approx(-BETA)
    assert float(losses.robust_dpo(tensor([1e6], dtype=F64), BETA, 0.1)) < -1e4


def test_ipo_pulls_a_margin_down_that_is_too_large_and_dpo_never_does():
    assert slope(lambda h: losses.ipo(h, BETA), 7.0) == pytest.approx(4.0)
    assert slope(lambda h: losses.dpo(h, BETA), 7.0) < 0


@pytest.mark.parametrize(("p", "optimum"), [(0.6, 4.0546511), (0.8, 13.8629436)])
def test_the_population_optimum_of_dpo_is_the_log_odds_over_beta(p, optimum):
    def expected(h):
        return p * losses.dpo(h, BETA) + (1 - p) * losses.dpo(-h, BETA)

    assert slope(expected, optimum) == pytest.approx(0, abs=1e-9)
    assert descend(expected, [0.0], 500) == pytest.approx([optimum])
    soft = losses.psi_po(tensor([optimum], dtype=F64), tensor([p], dtype=F64), BETA, losses.psi_log_odds)
    assert float(soft) == pytest.approx(0, abs=1e-12), "which is what psi = log odds says directly"


# ---- symmetries and relations


@few
@given(h=finite, e=st.floats(0, 0.45), p=st.floats(0.02, 0.98), gap=finite)
def test_swapping_the_answers_is_the_loss_of_minus_the_margin(h, e, p, gap):
    h, p, gap = (tensor([x], dtype=F64) for x in (h, p, gap))
    same = lambda one, other: torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)  # noqa: E731
    same(losses.dpo(-h, BETA, 1 - e), losses.dpo(h, BETA, e))
    same(losses.rpo(-h, -gap, BETA, 0.5), losses.rpo(h, gap, BETA, 0.5))
    for psi in (losses.psi_identity, losses.psi_log_odds):
        same(losses.psi_po(-h, 1 - p, BETA, psi), losses.psi_po(h, p, BETA, psi))
    for function in BY_MARGIN.values():
        same(function(0 - h), function(0 * h - h))
    same(losses.dpo(-h, BETA) - losses.dpo(h, BETA), BETA * h)


@few
@given(h=finite, e=st.floats(0, 0.45))
def test_robust_dpo_is_unbiased_over_flipped_labels(h, e):
    h = tensor([h], dtype=F64)
    expectation = (1 - e) * losses.robust_dpo(h, BETA, e) + e * losses.robust_dpo(-h, BETA, e)
    torch.testing.assert_close(expectation, losses.dpo(h, BETA), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*BY_MARGIN, "apo_down-difference"])
def test_a_shift_common_to_both_log_ratios_changes_nothing(name):
    chosen, rejected, shift = numbers(20), numbers(20, 1), numbers(20, 2, 5.0)
    function = BY_SIDES.get(name, lambda c, r: losses.apo_down(c, r, BETA) - (BETA * c).sigmoid())
    torch.testing.assert_close(function(chosen + shift, rejected + shift), function(chosen, rejected))


@few
@given(h=finite, p=st.floats(0, 1), tau=st.floats(0.05, 2))
def test_psi_po_with_the_identity_has_the_gradient_of_ipo_with_drawn_winners(h, p, tau):
    drawn = p * slope(lambda m: losses.ipo(m, tau), h) - (1 - p) * slope(lambda m: losses.ipo(m, tau), -h)
    known = slope(lambda m: losses.psi_po(m, tensor([p], dtype=F64), tau, losses.psi_identity), h)
    assert known == pytest.approx(drawn, abs=1e-9)
    certain = losses.psi_po(tensor([h], dtype=F64), tensor([1.0], dtype=F64), tau, losses.psi_identity)
    torch.testing.assert_close(certain, losses.ipo(tensor([h], dtype=F64), tau))


@few
@given(h=finite, gap=finite)
def test_rpo_is_zero_exactly_where_the_margin_says_what_the_rewards_say(h, gap):
    loss = float(losses.rpo(tensor([h], dtype=F64), tensor([gap], dtype=F64), BETA, 0.5))
    assert loss >= -1e-15
    assert float(losses.rpo(tensor([5 * gap], dtype=F64), tensor([gap], dtype=F64), BETA, 0.5)) == pytest.approx(0, abs=1e-15)
    if abs(BETA * h - 0.5 * gap) > 1e-2:
        assert loss > 0


def test_f_divergences_agree_where_they_are_one_another_and_leave_the_reference_alone():
    x = numbers(50, 0, 3.0)
    torch.testing.assert_close(losses.f_forward_kl(x), 1 - (-x).exp())
    torch.testing.assert_close(losses.f_alpha(x, 0.0), losses.f_forward_kl(x))
    torch.testing.assert_close(losses.f_alpha(x, 1 + 1e-9), losses.f_reverse_kl(x), rtol=1e-7, atol=1e-7)
    assert losses.f_alpha(x, 1.0) is x
    for function in (losses.f_reverse_kl, losses.f_forward_kl, losses.f_js, lambda x: losses.f_alpha(x, 0.4)):
        assert slope(lambda h, f=function: f(h), 0.0) == pytest.approx(0.5 if function is losses.f_js else 1.0)
        assert float(function(torch.zeros(1, dtype=F64))) == pytest.approx(0, abs=1e-15)
        assert (function(x.sort().values).diff() > 0).all()


@few
@given(x=st.floats(-40, -1e-6) | st.floats(-14, -0.1).map(lambda power: -(10**power)))
def test_log_odds_of_the_mean_are_the_log_odds(x):
    exact = x - math.log(-math.expm1(x))
    assert float(losses.log_odds_of_mean(tensor([x], dtype=F64))) == pytest.approx(exact, rel=1e-12)
    if x < -torch.finfo(torch.float32).eps:  # nearer to 0 it is taken as that
        assert float(losses.log_odds_of_mean(tensor([x]))) == pytest.approx(exact, rel=5e-7, abs=5e-7)


# ---- numerics


@pytest.mark.parametrize("name", sorted(set(BY_SIDES) - {"orpo"}))
def test_a_log_ratio_of_ten_thousand_gives_a_finite_loss_and_gradient_in_float32(name):
    extreme = tensor([1e4, -1e4, 88.0, -88.0, 104.0, -104.0, 0.0])
    chosen, rejected = (each.flatten() for each in torch.meshgrid(extreme, extreme, indexing="ij"))
    if name == "discopop":  # e^-l of a wrong pair is bounded by m, so that only the other side is large
        assert losses.discopop(tensor([-1e5]), BETA).isfinite().all()
    loss = BY_SIDES[name](chosen, rejected)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    for gradient in gradients(BY_SIDES[name], chosen, rejected):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_orpo_is_finite_where_an_answer_is_certain_and_where_it_is_impossible(dtype):
    extreme = tensor([0.0, -1e-12, -1e-3, -0.6931, -0.6932, -30.0, -200.0, -1e4], dtype=dtype)
    chosen, rejected = (each.flatten() for each in torch.meshgrid(extreme, extreme, indexing="ij"))
    assert losses.orpo(chosen, rejected).isfinite().all()
    for gradient in gradients(losses.orpo, chosen, rejected):
        assert gradient.isfinite().all()
    assert (losses.log_odds_of_mean(extreme).diff() <= 0).all()


@pytest.mark.parametrize("name", sorted(set(BY_SIDES) - WHOLE_BATCH))
def test_no_preference_loss_reduces_or_looks_at_another_pair(name):
    chosen, rejected = numbers(5), numbers(5, 1)
    whole = BY_SIDES[name](chosen, rejected)
    apart = [BY_SIDES[name](chosen[rows], rejected[rows]) for rows in (slice(0, 2), slice(2, 5), slice(5, 5))]
    torch.testing.assert_close(torch.cat(apart), whole, rtol=0, atol=0)


def test_aot_needs_its_whole_batch_and_not_its_pairing():
    chosen, rejected, order = numbers(8), numbers(8, 1), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    whole = losses.aot_unpaired(chosen, rejected, BETA)
    assert torch.equal(losses.aot_unpaired(chosen, rejected[order], BETA), whole)
    assert torch.equal(losses.aot(chosen, rejected[order], BETA), losses.aot(chosen, rejected, BETA))
    halves = torch.cat([losses.aot_unpaired(chosen[rows], rejected[rows], BETA) for rows in (slice(0, 4), slice(4, 8))])
    assert abs(float(halves.mean() - whole.mean())) > 1e-6
