"""Losses over preferences, per pair (or per answer where the data come unpaired).

Legend: P pairs. `chosen` and `rejected` are the log-ratios log pi(y|x) - log ref(y|x) of the two answers, `margin` is
chosen - rejected. Whether a log-probability is a sum or a mean over tokens, and whether there is a reference, is the caller's
choice: CPO is `dpo` on the margin without a reference, and every function of `margin` takes that of an f-divergence as well.
"""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

LARGEST_EXPONENT = 80.0  # exp(80) is 5.5e34, which float32 can still hold and multiply a little


# ---- functions of the margin


def dpo(margin: Float[Tensor, " P"], beta: float, label_smoothing: float | Float[Tensor, " P"] = 0.0) -> Float[Tensor, " P"]:
    """-(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin): the chosen answer wins with 1 - e. arXiv 2305.18290 eq. 7.

    With e = label_smoothing above 0 this is cDPO, or a pair's soft label 1 - e (arXiv 2212.08073); the minimum is then finite:
    beta margin = log((1 - e) / e).
    """
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


def robust_dpo(margin: Float[Tensor, " P"], beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """(-(1 - e) log sigmoid(beta margin) + e log sigmoid(-beta margin)) / (1 - 2 e). arXiv 2403.00409.

    Where labels are flipped with probability e = label_smoothing < 1/2 its expectation is `dpo` on the true labels. It has no
    lower bound.
    """
    right, wrong = logsigmoid(beta * margin), logsigmoid(-beta * margin)
    return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def ipo(margin: Float[Tensor, " P"], tau: float) -> Float[Tensor, " P"]:
    """(margin - 1 / (2 tau))^2: pull the margin to a finite target. arXiv 2310.12036 eq. 17."""
    return (margin - 0.5 / tau) ** 2


@runtime_checkable
class Psi(Protocol):
    """A non-decreasing function of the probability that an answer wins."""

    def __call__(self, probability: Float[Tensor, " P"], /) -> Float[Tensor, " P"]: ...


def psi_identity(probability: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """p: with it `psi_po` is IPO, whose target is (2 p - 1) / (2 tau)."""
    return probability


def psi_log_odds(probability: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """log(p / (1 - p)): with it the target is log(p / (1 - p)) / tau, the optimum of DPO. Infinite at p = 0 and p = 1."""
    return torch.logit(probability)


def psi_po(margin: Float[Tensor, " P"], prefer: Float[Tensor, " P"], tau: float, psi: Psi) -> Float[Tensor, " P"]:
    """(margin - (psi(p) - psi(1 - p)) / (2 tau))^2, p = `prefer` the probability that the chosen answer wins. arXiv 2310.12036.

    How it comes about: the policy that maximises E psi(P(y beats y')) - tau KL(pi || ref) has the margin (E psi(P(y beats .)) -
    E psi(P(y' beats .))) / tau. With the opponent drawn from the pair itself, either answer with probability 1/2, the difference
    is (psi(p) + psi(1/2) - psi(1 - p) - psi(1/2)) / 2. For psi = identity it is linear in p, so that a drawn winner may stand in
    for p: `ipo`, which takes p = 1 for the pair as labelled, has the same gradient in expectation (eq. 17). For other psi it is
    not, and p itself is needed.
    """
    return (margin - (psi(prefer) - psi(1 - prefer)) / (2 * tau)) ** 2


def hinge(margin: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """max(0, 1 - beta margin): flat once the margin is large enough. SLiC, arXiv 2305.10425; with a reference, 2309.06657."""
    return relu(1 - beta * margin)


def exo(margin: Float[Tensor, " P"], beta: float, label_smoothing: float = 1e-3) -> Float[Tensor, " P"]:
    """KL((q, 1 - q) || (1 - e, e)) with q = sigmoid(beta margin), the reverse KL. arXiv 2402.00856 eq. 16.

    e = label_smoothing must be above 0. Its minimum is that of cDPO.
    """
    right = (beta * margin).sigmoid() * (logsigmoid(beta * margin) - math.log1p(-label_smoothing))
    wrong = (-beta * margin).sigmoid() * (logsigmoid(-beta * margin) - math.log(label_smoothing))
    return right + wrong


def discopop(margin: Float[Tensor, " P"], beta: float, temperature: float = 0.05) -> Float[Tensor, " P"]:
    """-(1 - m) log sigmoid(l) + m exp(-l) with l = beta margin and m = sigmoid(l / temperature). arXiv 2406.08414 eq. 5.

    Not convex: about l = 0 it rises, so that at the reference it pulls the margin down at first. m exp(-l) is taken as one
    exponential, as far below 0 the one factor is 0 and the other infinite.
    """
    logit = beta * margin
    return -(-logit / temperature).sigmoid() * logsigmoid(logit) + (logsigmoid(logit / temperature) - logit).exp()


def rpo(margin: Float[Tensor, " P"], reward_gap: Float[Tensor, " P"], beta: float, eta: float) -> Float[Tensor, " P"]:
    """KL(sigmoid(eta reward_gap) || sigmoid(beta margin)): the margin is to say what the rewards say. arXiv 2406.11704.

    Zero if and only if beta margin = eta reward_gap, reward_gap being r(chosen) - r(rejected).
    """
    ours, theirs = beta * margin, eta * reward_gap
    right = theirs.sigmoid() * (logsigmoid(theirs) - logsigmoid(ours))
    return right + (-theirs).sigmoid() * (logsigmoid(-theirs) - logsigmoid(-ours))


def dpop(margin: Float[Tensor, " P"], chosen: Float[Tensor, " P"], beta: float, weight: float) -> Float[Tensor, " P"]:
    """-log sigmoid(beta (margin - weight max(0, -chosen))): the chosen answer must not become rarer. arXiv 2402.13228."""
    return dpo(margin - weight * relu(-chosen), beta)


# ---- functions of the two log-ratios


def nca(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """-log sigmoid(beta c) - (log sigmoid(-beta c) + log sigmoid(-beta r)) / 2: c = log(2) / beta is best. arXiv 2402.05369."""
    return -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)


def bco(
    ratio: Float[Tensor, " P"], good: Bool[Tensor, " P"], beta: float, shift: float | Float[Tensor, ""] | Float[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """-log sigmoid(+-(beta ratio - shift)), + for a good answer and - for a bad one. arXiv 2404.04656.

    shift: the running mean of the rewards beta ratio; no gradient flows into it.
    """
    reward = beta * ratio - (shift.detach() if isinstance(shift, Tensor) else shift)
    return -logsigmoid(torch.where(good, reward, -reward))


def sppo(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2: SPPO with certain winners. arXiv 2405.00675 eq. 4.7."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """sigmoid(-beta c) + sigmoid(beta r): for chosen answers better than the policy's own. arXiv 2408.06266 eq. 7."""
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """sigmoid(beta c) + sigmoid(-beta (c - r)): for chosen answers worse than the policy's own. arXiv 2408.06266 eq. 8."""
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


# ---- of a whole batch


def aot(
    margin_policy: Float[Tensor, " P"], margin_reference: Float[Tensor, " P"], beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " P"]:
    """`dpo` of the sorted margins log pi(w) - log pi(l) less the sorted margins of the reference. arXiv 2406.05882.

    The sorts are over all pairs given, as in TRL 1.16: value i is of the i-th smallest margins and not of pair i, and a batch cut
    into pieces has another loss. Give it the pairs of the whole update.
    """
    return dpo(margin_policy.sort().values - margin_reference.sort().values, beta, label_smoothing)


def aot_unpaired(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " P"]:
    """`dpo` of the sorted log-ratios of the chosen less those of the rejected answers. arXiv 2406.05882.

    Sorted over all that is given, as `aot`; which chosen answer belongs to which rejected one doesn't matter.
    """
    return dpo(chosen.sort().values - rejected.sort().values, beta, label_smoothing)


# ---- f-divergences: what replaces the log-ratio log u, u = pi / ref, of each answer (f'(u), arXiv 2309.16240)


def f_reverse_kl(log_ratio: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """log u: DPO as it is."""
    return log_ratio


def f_forward_kl(log_ratio: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """1 - 1 / u. The exponent is clamped at 80, so that float32 does not overflow: below log u = -80 it is flat."""
    return f_alpha(log_ratio, 0.0)


def f_js(log_ratio: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """log(2 u / (1 + u)) = log 2 + log sigmoid(log u), the Jensen-Shannon divergence: at most log 2."""
    return math.log(2) + logsigmoid(log_ratio)


def f_alpha(log_ratio: Float[Tensor, " P"], alpha: float) -> Float[Tensor, " P"]:
    """(u^(alpha - 1) - 1) / (alpha - 1), and its limit log u at alpha = 1; alpha = 0 is the forward KL.

    The exponent (alpha - 1) log u is clamped at 80, so that float32 does not overflow: beyond it the function is flat.
    """
    if alpha == 1:
        return log_ratio
    return ((alpha - 1) * log_ratio).clamp(max=LARGEST_EXPONENT).expm1() / (alpha - 1)


# ---- unpaired answers


def kto(
    ratio: Float[Tensor, " P"],
    good: Bool[Tensor, " P"],
    reference_point: float | Float[Tensor, ""] | Float[Tensor, " P"],
    beta: float,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> Float[Tensor, " P"]:
    """good_weight sigmoid(-beta (ratio - z)) if good, bad_weight sigmoid(beta (ratio - z)) if not. arXiv 2402.01306.

    z = reference_point: max(0, mean log-ratio of answers to prompts that are not theirs) over the whole update; no gradient
    flows into it.
    """
    gain = beta * (ratio - (reference_point.detach() if isinstance(reference_point, Tensor) else reference_point))
    return torch.where(good, good_weight * (-gain).sigmoid(), bad_weight * gain.sigmoid())


# ---- functions of mean log-probabilities, without a reference


def log_odds_of_mean(mean_logp: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """log(p / (1 - p)) with p = exp(mean_logp), the geometric mean of an answer's token probabilities. arXiv 2403.07691.

    1 - p is -expm1(mean_logp), exact near p = 1; far from it nothing of log(1 - p) survives beside log p, so that log1p(-exp) is
    not needed there. p = 1 is taken as one rounding below.
    """
    log_p = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    return log_p - (-log_p.expm1()).log()


def orpo(chosen_mean_logp: Float[Tensor, " P"], rejected_mean_logp: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """-log sigmoid(log odds of the chosen - log odds of the rejected answer), beside the NLL of the chosen. arXiv 2403.07691."""
    return -logsigmoid(log_odds_of_mean(chosen_mean_logp) - log_odds_of_mean(rejected_mean_logp))


def simpo(
    chosen_mean_logp: Float[Tensor, " P"], rejected_mean_logp: Float[Tensor, " P"], beta: float, gamma: float
) -> Float[Tensor, " P"]:
    """-log sigmoid(beta (mean log p of the chosen - that of the rejected) - gamma). arXiv 2405.14734."""
    return -logsigmoid(beta * (chosen_mean_logp - rejected_mean_logp) - gamma)


def wpo_weight(chosen_mean: Float[Tensor, " P"], rejected_mean: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """min(1, exp(chosen_mean + rejected_mean)), a constant: how much the policy could have said this itself. arXiv 2406.11827.

    The arguments are means over an answer's tokens of log p(token) - log sum p^2, which is 0 for a token like those that the
    policy draws. Factor of any loss of the pair.
    """
    return (chosen_mean + rejected_mean).detach().exp().clamp(max=1.0)
