"""Preference losses against TRL 1.16's own code: value and gradient with respect to every token's log-probability.

TRL's trainers compute their losses in methods that ask the model only for log-probabilities. They are called here as they
stand, on a trainer that is only a bag of settings and a model that looks log-probabilities up in a table: each token id occurs
once, so that an entry's gradient is that of one token of one answer. Nothing is loaded or downloaded. The tests at the end
state where the definitions differ.
"""

import math
import os
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from posttrain import losses

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")

F64, BETA, SMOOTH = torch.float64, 0.1, 0.2
LENGTHS = tensor([5, 2, 7, 1, 3, 10, 4, 4, 1, 6])  # of five chosen answers, then of the five rejected ones
PROMPT = 2
PAIRS = len(LENGTHS) // 2
WIDTH = PROMPT + int(LENGTHS.max())
IDS = torch.arange(len(LENGTHS) * WIDTH).reshape(len(LENGTHS), WIDTH)
MASK = ((torch.arange(WIDTH) >= PROMPT) & (torch.arange(WIDTH) < PROMPT + LENGTHS[:, None])).long()
OWNER, TOKENS = MASK.nonzero()[:, 0], IDS[MASK.bool()]


def table(seed, count=10 * WIDTH, dtype=F64):
    """Log-probabilities of tokens."""
    return -torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=F64).mul(2).to(dtype)


class Model:
    """Answers as a TRL model with a fused head does: nothing where the label is -100."""

    def __init__(self, logp, log_sum_sq=None):
        self.logp, self.log_sum_sq = logp, torch.zeros_like(logp) if log_sum_sq is None else log_sum_sq

    def __call__(self, labels, **_):
        labels = labels[:, 1:]
        look = lambda values: values[labels.clamp(min=0)].masked_fill(labels == -100, 0)  # noqa: E731
        logp, log_sum_sq = look(self.logp), look(self.log_sum_sq)
        idle = torch.zeros_like(logp)
        return SimpleNamespace(log_probs=logp, log_sum_sq_probs=log_sum_sq, entropy=idle, mean_logits=idle, is_top1=idle.bool())


def bag(**settings):
    """A trainer's settings, without the trainer."""
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    usual = {
        "model": SimpleNamespace(training=True), "accelerator": same, "_metrics": {"train": defaultdict(list)},
        "aux_loss_enabled": False, "_total_train_tokens": 0, "_tp_size": 1, "beta": BETA, "precompute_ref_logps": True,
    }  # fmt: skip
    return SimpleNamespace(**(usual | settings))


def their_dpo(policy, reference, loss_type, log_sum_sq=None, **settings):
    """`DPOTrainer._compute_loss` of the ten answers."""
    usual = {
        "ld_alpha": None, "f_divergence_type": "reverse_kl", "loss_types": [loss_type], "loss_weights": [1.0],
        "label_smoothing": 0.0, "use_weighting": log_sum_sq is not None, "args": SimpleNamespace(discopop_tau=0.05),
    }  # fmt: skip
    ref_chosen, ref_rejected = sides(reference)
    inputs = {
        "input_ids": IDS, "attention_mask": torch.ones_like(IDS), "completion_mask": MASK,
        "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected,
    }  # fmt: skip
    return trl.DPOTrainer._compute_loss(bag(**(usual | settings)), Model(policy, log_sum_sq), inputs, False)


def sides(logp, mean=False):
    """Log-probabilities of the chosen and of the rejected answers, from ours."""
    reduce = losses.sequence_means if mean else losses.sequence_sums
    return reduce(logp[TOKENS], OWNER, 2 * PAIRS).chunk(2)


def ratios(policy, reference, mean=False):
    return tuple(one - other for one, other in zip(sides(policy, mean), sides(reference, mean), strict=True))


def by_margin(function, mean=False):
    return lambda policy, reference: function(torch.sub(*ratios(policy, reference, mean)))


def by_sides(function):
    return lambda policy, reference: function(*ratios(policy, reference))


def our_bco(chosen, rejected):
    good = torch.ones(len(chosen), dtype=torch.bool)
    return losses.bco(chosen, good, BETA, 0.0) + losses.bco(rejected, ~good, BETA, 0.0)


def our_aot(policy, reference):
    return losses.aot(torch.sub(*sides(policy)), torch.sub(*sides(reference)), BETA, SMOOTH)


def assert_equal(ours, theirs, policy, tolerance):
    """ours: a function from log-probabilities to a loss per pair; theirs: to a scalar. Value and gradient."""
    found = []
    for loss in (lambda logp: ours(logp).mean(), theirs):
        point = policy.clone().requires_grad_()
        value = loss(point)
        found.append((value.detach(), torch.autograd.grad(value, point)[0]))
    (value, gradient), (their_value, their_gradient) = found
    assert their_gradient.norm() > 0
    torch.testing.assert_close(value, their_value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, their_gradient, rtol=tolerance, atol=tolerance)


# ---- DPOTrainer

OURS = {
    "sigmoid": by_margin(partial(losses.dpo, beta=BETA)),
    "hinge": by_margin(partial(losses.hinge, beta=BETA)),
    "ipo": by_margin(partial(losses.ipo, tau=BETA), mean=True),
    "exo_pair": by_margin(partial(losses.exo, beta=BETA, label_smoothing=SMOOTH)),
    "nca_pair": by_sides(partial(losses.nca, beta=BETA)),
    "robust": by_margin(partial(losses.robust_dpo, beta=BETA, label_smoothing=SMOOTH)),
    "bco_pair": by_sides(our_bco),
    "sppo_hard": by_sides(partial(losses.sppo, beta=BETA)),
    "aot": our_aot,
    "aot_unpaired": by_sides(partial(losses.aot_unpaired, beta=BETA, label_smoothing=SMOOTH)),
    "apo_zero": by_sides(partial(losses.apo_zero, beta=BETA)),
    "apo_down": by_sides(partial(losses.apo_down, beta=BETA)),
    "discopop": by_margin(partial(losses.discopop, beta=BETA)),
    "sigmoid_norm": by_margin(partial(losses.dpo, beta=BETA), mean=True),
}


@pytest.mark.parametrize("loss_type", OURS)
def test_each_loss_type_of_trls_dpo_is_ours(loss_type):
    reference = table(0)
    tolerance = 1e-6 if loss_type == "exo_pair" else 1e-12  # TRL takes the logarithm of its epsilon in float32
    assert_equal(
        lambda policy: OURS[loss_type](policy, reference),
        lambda policy: their_dpo(policy, reference, loss_type, label_smoothing=SMOOTH),
        table(1), tolerance,
    )  # fmt: skip


F = {"forward_kl": losses.f_forward_kl, "js_divergence": losses.f_js, "reverse_kl": losses.f_reverse_kl}


@pytest.mark.parametrize("divergence", F)
@pytest.mark.parametrize(("loss_type", "mean", "function"), [
    ("sigmoid", False, partial(losses.dpo, beta=BETA)), ("hinge", False, partial(losses.hinge, beta=BETA)),
    ("discopop", False, partial(losses.discopop, beta=BETA)), ("ipo", True, partial(losses.ipo, tau=BETA)),
    ("sigmoid_norm", True, partial(losses.dpo, beta=BETA)),
])  # fmt: skip
def test_trls_f_divergences_are_ours_and_its_means_are_taken_after_f(divergence, loss_type, mean, function):
    reference = table(0)
    lengths = LENGTHS if mean else torch.ones_like(LENGTHS)

    def ours(policy):
        chosen, rejected = (F[divergence](ratio) for ratio in ratios(policy, reference))
        return function(chosen / lengths[:PAIRS] - rejected / lengths[PAIRS:])

    assert_equal(
        ours, lambda policy: their_dpo(policy, reference, loss_type, f_divergence_type=divergence), table(1), 1e-12
    )  # fmt: skip


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 2.0])
def test_trls_alpha_divergence_is_ours_in_float32(alpha):
    reference = table(0, dtype=torch.float32)
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}

    def ours(policy):
        chosen, rejected = (losses.f_alpha(ratio, alpha) for ratio in ratios(policy, reference))
        return losses.dpo(chosen - rejected, BETA)

    theirs = partial(their_dpo, reference=reference, loss_type="sigmoid", **settings)
    assert_equal(ours, theirs, table(1, dtype=torch.float32), 1e-6)


def test_the_weights_of_wpo_are_trls():
    reference, log_sum_sq = table(0), table(2)

    def ours(policy):
        means = losses.sequence_means((policy - log_sum_sq)[TOKENS], OWNER, 2 * PAIRS).chunk(2)
        return losses.wpo_weight(*means) * OURS["sigmoid"](policy, reference)

    low = table(1) - 2  # so that no weight is above 1
    theirs = partial(their_dpo, reference=reference, loss_type="sigmoid", log_sum_sq=log_sum_sq)
    assert_equal(ours, theirs, low, 1e-12)


# ---- KTO, reward model, CPO, SimPO, ORPO


def their_kto(policy, reference, good, loss_type="kto", mismatched=None):
    """`KTOTrainer._compute_loss`; the mismatched answers are `mismatched` rows of IDS."""
    moved = IDS if mismatched is None else IDS[mismatched]
    moved_mask = MASK if mismatched is None else MASK[mismatched]
    sums = torch.cat(sides(reference))
    inputs = {
        "input_ids": IDS, "attention_mask": torch.ones_like(IDS), "completion_mask": MASK, "label": good, "ref_logps": sums,
        "KL_input_ids": moved, "KL_attention_mask": torch.ones_like(IDS), "KL_completion_mask": moved_mask,
        "ref_KL_logps": sums if mismatched is None else sums[mismatched],
    }  # fmt: skip
    trainer = bag(calculate_KL=mismatched is not None, loss_type=loss_type, desirable_weight=1.3, undesirable_weight=0.7)
    trainer._compute_kl_logps = partial(trl.KTOTrainer._compute_kl_logps, trainer)
    return trl.KTOTrainer._compute_loss(trainer, Model(policy), inputs, False)


@pytest.mark.parametrize("moved", [[1, 2, 3, 4, 0, 6, 7, 8, 9, 5], [0] * 10], ids=["above 0", "below 0"])
def test_trls_kto_is_ours_with_its_reference_point(moved):
    policy, reference, good = table(1), table(0), tensor([True, False, True, True, False] * 2)
    policy[IDS[1:]] += 0.5
    policy[IDS[0]] = reference[IDS[0]] - 0.1  # only row 0 fell

    def ours(logp):
        ratio = torch.cat(ratios(logp, reference))
        point = ratio[moved].mean().clamp(min=0)
        assert bool(point > 0) == (moved != [0] * 10)
        return losses.kto(ratio, good, point, BETA, 1.3, 0.7)

    assert_equal(ours, lambda logp: their_kto(logp, reference, good, mismatched=tensor(moved)), policy, 1e-12)


def test_trls_unpaired_apo_zero_is_the_two_terms_of_ours():
    reference, good = table(0), torch.arange(2 * PAIRS) < PAIRS

    def ours(logp):
        chosen, rejected = ratios(logp, reference)
        up, down = losses.apo_zero(chosen, chosen * 0 - math.inf, BETA), losses.apo_zero(rejected * 0 + math.inf, rejected, BETA)
        return torch.cat([1.3 * up, 0.7 * down])

    assert_equal(ours, lambda logp: their_kto(logp, reference, good, "apo_zero_unpaired"), table(1), 1e-12)


@pytest.mark.parametrize("margin", [None, tensor([0.5, 0.0, 1.0, 2.0, 0.1], dtype=F64)])
@pytest.mark.parametrize("centre", [None, 0.01])
def test_trls_reward_loss_with_its_margin_and_its_centring_is_ours(margin, centre):
    def theirs(rewards):
        inputs = {"attention_mask": torch.ones(2, 3)} | ({} if margin is None else {"margin": margin})
        trainer = bag(args=SimpleNamespace(center_rewards_coefficient=centre))
        return trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs)

    def ours(rewards):
        chosen, rejected = rewards.chunk(2)
        loss = losses.bradley_terry(chosen - rejected, at_least=0.0 if margin is None else margin)
        return loss + (centre or 0.0) * losses.centring(chosen, rejected)

    assert_equal(ours, theirs, table(3, 2 * PAIRS), 1e-12)


@pytest.mark.parametrize(
    ("loss_type", "ours"),
    [
        ("sigmoid", lambda c, r: losses.dpo(c - r, BETA, SMOOTH)),
        ("hinge", lambda c, r: losses.hinge(c - r, BETA)),
        ("ipo", lambda c, r: losses.ipo(c - r, BETA)),
    ],
)
def test_trls_cpo_is_our_loss_of_the_margin_without_a_reference(loss_type, ours):
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = bag(alpha=0.0, loss_type=loss_type, label_smoothing=SMOOTH)
    theirs = lambda both: cpo.CPOTrainer.cpo_loss(trainer, *both.chunk(2))[0].mean()  # noqa: E731
    assert_equal(lambda both: ours(*both.chunk(2)), theirs, table(4, 2 * PAIRS), 1e-12)


def test_trls_simpo_is_ours_its_gamma_is_divided_by_beta_and_multiplied_again():
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = bag(alpha=0.0, loss_type="simpo", label_smoothing=0.0, simpo_gamma=0.5, beta=2.0)
    theirs = lambda both: cpo.CPOTrainer.cpo_loss(trainer, *both.chunk(2))[0].mean()  # noqa: E731
    assert_equal(lambda both: losses.simpo(*both.chunk(2), 2.0, 0.5), theirs, table(4, 2 * PAIRS), 1e-12)


def test_trls_orpo_is_ours_in_float32_and_comes_as_a_gain():
    orpo = pytest.importorskip("trl.experimental.orpo")
    theirs = lambda both: -orpo.ORPOTrainer.odds_ratio_loss(bag(), *both.chunk(2))[0].mean()  # noqa: E731
    both = table(4, 2 * PAIRS, torch.float32)
    assert_equal(lambda both: BETA * losses.orpo(*both.chunk(2)), theirs, both, 1e-6)


# ---- where the definitions differ


def test_trls_sigmoid_ignores_label_smoothing_and_ours_is_cdpo():
    policy, reference = table(1), table(0)
    smooth, hard = (their_dpo(policy, reference, "sigmoid", label_smoothing=each) for each in (0.2, 0.0))
    assert smooth == hard
    assert not torch.isclose(by_margin(partial(losses.dpo, beta=BETA, label_smoothing=0.2))(policy, reference).mean(), smooth)


def test_trls_ipo_is_of_means_over_tokens_and_the_papers_is_of_sums():
    policy, reference = table(1), table(0)
    theirs = their_dpo(policy, reference, "ipo")
    assert not torch.isclose(by_margin(partial(losses.ipo, tau=BETA))(policy, reference).mean(), theirs, rtol=1e-2)


def test_trl_does_not_bound_the_weight_of_wpo_and_ours_is_at_most_one():
    policy, reference, log_sum_sq = table(1), table(0), table(2) - 2
    means = losses.sequence_means((policy - log_sum_sq)[TOKENS], OWNER, 2 * PAIRS).chunk(2)
    plain = OURS["sigmoid"](policy, reference)
    torch.testing.assert_close(their_dpo(policy, reference, "sigmoid", log_sum_sq), (sum(means).exp() * plain).mean())
    assert losses.wpo_weight(*means).max() == 1
    assert sum(means).exp().max() > 1


def test_trls_alpha_divergence_refuses_float64():
    with pytest.raises(KeyError):
        their_dpo(table(1), table(0), "sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5)


def test_trls_forward_kl_overflows_in_float32_and_ours_is_flat_there():
    policy, reference = table(1, dtype=torch.float32), table(0, dtype=torch.float32)
    policy[IDS[0]] -= 40  # five tokens: a log-ratio of -200 or so
    policy[IDS[PAIRS]] -= 40
    assert their_dpo(policy, reference, "sigmoid", f_divergence_type="forward_kl").isnan()
    chosen, rejected = (losses.f_forward_kl(ratio) for ratio in ratios(policy, reference))
    assert losses.dpo(chosen - rejected, BETA).isfinite().all()


def test_trls_discopop_is_nan_for_a_very_wrong_pair_in_float32_and_ours_is_finite():
    policy, reference = table(1, dtype=torch.float32), table(0, dtype=torch.float32)
    policy[IDS[2]] -= 400
    assert their_dpo(policy, reference, "discopop").isnan()
    assert by_margin(partial(losses.discopop, beta=BETA))(policy, reference).isfinite().all()


def test_trls_orpo_is_infinite_for_a_certain_answer_and_ours_is_not():
    orpo = pytest.importorskip("trl.experimental.orpo")
    certain, other = tensor([0.0]), tensor([-1.0])
    assert orpo.ORPOTrainer.odds_ratio_loss(bag(), other, certain)[0].isinf()
    assert losses.orpo(other, certain).isfinite().all()
