"""Direct preference objectives: two answers to one prompt, of which one is better.

All of them see a pair through the log-ratios log p(answer) - log p_reference(answer) of its two sides and their difference,
the margin. A pair whose label is uncertain (`prefer` below 1) is learned from in both orders, weighted by its probability.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from posttrain import losses
from posttrain.component import imported
from posttrain.errors import DataError
from posttrain.objectives.objective import Loss, Objective
from posttrain.text import Preference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from posttrain.batch import Pairs, Sequences
    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles
    from posttrain.text import Row

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class PreferenceObjective(Objective):
    """The part that all share: log-ratios of both sides in one forward, which computes their common prompt once."""

    length: Literal["sum", "mean"] = "sum"
    """The log-probability of an answer: the sum over its tokens, or their mean (strengths are then per token)."""
    nll: NonNegativeFloat = 0.0
    """Weight of -log p(chosen) per token, added for each pair (arXiv 2404.19733 takes 1)."""

    reads = "Pairs"
    rows = frozenset({"Preference"})
    measures = ("accuracy", "margin")
    reference_per_row = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference"})

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        """[P]: the loss of pairs whose first side is the better one, from the log-ratios of both."""
        raise NotImplementedError

    def per_pair(self, chosen: "Tensor", rejected: "Tensor", prefer: "Tensor") -> "Tensor":
        """[P]: `preferred`, in expectation over which side is the better one."""
        if bool((prefer == 1).all()):
            return self.preferred(chosen, rejected)
        return prefer * self.preferred(chosen, rejected) + (1 - prefer) * self.preferred(rejected, chosen)

    def annotate(self, batch: "Pairs", policy: "LM", roles: "Roles") -> "Pairs":
        if "reference" not in self.needs or batch.refs:
            return batch
        assert roles.reference is not None
        return batch.with_refs(*roles.reference.sums(*batch.sequences))

    def units(self, batch: "Pairs") -> dict[str, int]:
        return {"preference": batch.count} | ({"nll": batch.count} if self.nll else {})

    def loss(self, policy: "LM", batch: "Pairs") -> Loss:
        logp = policy.logprobs(batch.chosen, batch.rejected)
        sides = [answer_sums(each, seqs) for each, seqs in zip(logp, batch.sequences, strict=True)]
        sizes = [seqs.trained_lengths.clamp(min=1) for seqs in batch.sequences]
        refs = (batch.chosen_ref, batch.rejected_ref)
        ratios = [side if ref is None else side - ref.to(side.dtype) for side, ref in zip(sides, refs, strict=True)]
        if self.length == "mean":
            ratios = [ratio / size for ratio, size in zip(ratios, sizes, strict=True)]
        value = self.per_pair(ratios[0], ratios[1], batch.prefer.to(ratios[0].dtype))
        if batch.weight is not None:
            value = value * batch.weight.to(value.dtype)
        terms = {"preference": value.sum()}
        if self.nll:
            prefer = batch.prefer.to(sides[0].dtype)
            terms["nll"] = self.nll * -(prefer * sides[0] / sizes[0] + (1 - prefer) * sides[1] / sizes[1]).sum()
        terms |= self.extra_terms(sides, batch)
        return Loss(terms, pair_stats(ratios, sides, batch))

    def extra_terms(self, sides: "Sequence[Tensor]", batch: "Pairs") -> "dict[str, Tensor]":
        """Further terms, from the log-probabilities of both sides."""
        return {}


def answer_sums(logp: "Tensor", seqs: "Sequences") -> "Tensor":
    """[B]: log p of each answer, float64: a float32 holds a thousand nats to 6e-5 only, and margins are differences of them."""
    return losses.sequence_sums(logp.double(), seqs.owner, seqs.count)


def pair_stats(ratios: "Sequence[Tensor]", sides: "Sequence[Tensor]", batch: "Pairs") -> "dict[str, tuple[Tensor | float, int]]":
    """Of the policy as it is: how often it is right, by how much, and what became of each side's probability: that of the chosen
    answers may fall while the margin grows."""
    chosen, rejected = (ratio.detach() for ratio in ratios)
    stats: dict[str, tuple[Tensor | float, int]] = {
        "accuracy": (agreement(chosen - rejected, batch.prefer).sum(), batch.count),
        "margin": ((chosen - rejected).sum(), batch.count),
        "chosen_logp": (sides[0].detach().sum(), batch.count),
        "rejected_logp": (sides[1].detach().sum(), batch.count),
    }
    if batch.refs:
        stats |= {"chosen_ratio": (chosen.sum(), batch.count), "rejected_ratio": (rejected.sum(), batch.count)}
    return stats


def agreement(margin: "Tensor", prefer: "Tensor") -> "Tensor":
    """[P]: 1 where the margin has the sign of the label, 1/2 where it is zero (as at the start)."""
    return 0.5 + 0.5 * margin.sign() * (prefer.to(margin.dtype) - 0.5).sign()


class MarginObjective(PreferenceObjective):
    """Those that see only the margin."""

    def per_margin(self, margin: "Tensor") -> "Tensor":
        """[P]: the loss of pairs whose first side is the better one."""
        raise NotImplementedError

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        return self.per_margin(chosen - rejected)


class DPO(MarginObjective, kind="dpo"):
    """-log sigmoid(beta margin), with label smoothing: -(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin).

    arXiv 2305.18290 eq. 7; smoothing (cDPO) expects a share e of wrong labels and makes the best margin finite. `length: mean`
    is the length-normalised form of arXiv 2411.15124 (beta 5 there). `nll: 1` with it is iterative RPO's loss (arXiv 2404.19733).
    beta is the strength of the KL penalty of the problem that it solves: a higher one stays closer to the reference. TRL's
    `sigmoid` ignores label smoothing.
    """

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: Smoothing = 0.0
    """The share of labels that may be wrong."""

    def per_margin(self, margin: "Tensor") -> "Tensor":
        return losses.dpo(margin, self.beta, self.label_smoothing)


class RobustDPO(MarginObjective, kind="robust_dpo"):
    """[-(1 - e) log sigmoid(beta margin) + e log sigmoid(-beta margin)] / (1 - 2 e).

    arXiv 2403.00409: unbiased for the loss of clean labels where a share e of them is flipped. It has no lower bound.
    """

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: Smoothing = 0.1
    """The share of labels that is wrong."""

    def per_margin(self, margin: "Tensor") -> "Tensor":
        return losses.robust_dpo(margin, self.beta, self.label_smoothing)


class IPO(MarginObjective, kind="ipo"):
    """(margin - 1 / (2 tau))^2: the margin is pulled to a finite target, also where every label is certain.

    arXiv 2310.12036 eq. 17. Its text has log-probabilities of whole answers, so sums (as the DPO reference repository); TRL
    takes means over tokens, which its authors confirmed for their runs. The target is 1 / (2 tau) nats an answer in the one case
    and nats a token in the other, so a tau of one does not fit the other: `length` must be given.
    """

    length: Literal["sum", "mean"]
    """Whether the margin, and with it tau, is of whole answers (sum: the paper's text) or per token (mean: TRL)."""
    tau: PositiveFloat = 0.1
    """Strength of the pull to the reference; TRL calls it beta."""

    def per_margin(self, margin: "Tensor") -> "Tensor":
        return losses.ipo(margin, self.tau)


class PsiPO(PreferenceObjective, kind="psi_po"):
    """(margin - (Psi(p) - Psi(1 - p)) / (2 tau))^2 with p the probability that chosen wins: the sampled form of PsiPO.

    arXiv 2310.12036 eq. 6. Psi identity is IPO (target (2p - 1) / (2 tau)); log_odds is the RLHF and DPO optimum where
    preferences are Bradley-Terry (target logit(p) / tau), infinite for certain labels; any other Psi is a function of one's own,
    tensor -> tensor. p is the column `prefer`.
    """

    psi: str = "identity"
    """identity, log_odds, or `my_package.module:my_function`."""
    tau: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    most_certain: float = Field(default=1.0, gt=0.5, le=1)
    """A label counts as at most this certain: p is kept within [1 - most_certain, most_certain]."""

    @model_validator(mode="after")
    def _psi_is_known(self) -> "PsiPO":
        if self.psi not in ("identity", "log_odds"):
            imported(self.psi, "identity, log_odds, or `my_package.module:my_function`")
        return self

    def check_rows(self, rows: "Sequence[Row]", learning: bool = True) -> None:
        import torch

        prefer = torch.tensor([row.prefer for row in rows if isinstance(row, Preference)])
        targets = self.per_pair(torch.zeros_like(prefer), torch.zeros_like(prefer), prefer)
        endless = (~targets.isfinite()).nonzero()
        if len(endless):
            row = [row for row in rows if isinstance(row, Preference)][int(endless[0])]
            raise DataError(
                f"{row.where}: objective psi_po with psi {self.psi} has no finite target where a preference is as certain as "
                f"{row.prefer:g}; give the column `prefer` (a probability), or set objective.most_certain below 1"
            )

    def per_pair(self, chosen: "Tensor", rejected: "Tensor", prefer: "Tensor") -> "Tensor":
        known: dict[str, Callable[[Tensor], Tensor]] = {"identity": losses.psi_identity, "log_odds": losses.psi_log_odds}
        psi = known[self.psi] if self.psi in known else imported(self.psi)
        return losses.psi_po(chosen - rejected, prefer.clamp(1 - self.most_certain, self.most_certain), self.tau, psi)


class Hinge(MarginObjective, kind="hinge"):
    """max(0, 1 - beta margin): flat once the margin is 1 / beta. arXiv 2305.10425 (SLiC), 2309.06657 (RSO, beta 0.05)."""

    beta: PositiveFloat = 0.05
    """The margin at which a pair is learned is 1 / beta."""

    def per_margin(self, margin: "Tensor") -> "Tensor":
        return losses.hinge(margin, self.beta)


class EXO(MarginObjective, kind="exo"):
    """KL(softmax(beta margin, 0) || (1 - e, e)): the reverse KL to the smoothed label. arXiv 2402.00856, TRL `exo_pair`."""

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: float = Field(default=1e-3, gt=0, lt=0.5)
    """e; the best margin is log((1 - e) / e) / beta."""

    def per_margin(self, margin: "Tensor") -> "Tensor":
        return losses.exo(margin, self.beta, self.label_smoothing)


class NCA(PreferenceObjective, kind="nca"):
    """-log s(beta c) - 1/2 log s(-beta c) - 1/2 log s(-beta r), s the sigmoid, c and r the log-ratios of the sides.

    arXiv 2402.05369 (pairs; beta 0.01 there): the chosen answer's own probability is kept from falling.
    """

    beta: PositiveFloat = 0.01
    """Strength of the pull to the reference."""

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        return losses.nca(chosen, rejected, self.beta)


class SPPO(PreferenceObjective, kind="sppo"):
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2 for hard labels. arXiv 2405.00675, TRL `sppo_hard`."""

    beta: PositiveFloat = 0.001
    """The log-ratio aimed at is 1 / (2 beta) nats."""

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        return losses.sppo(chosen, rejected, self.beta)


class APOZero(PreferenceObjective, kind="apo_zero"):
    """1 - s(beta c) + s(beta r): raises the chosen, lowers the rejected. For chosen answers better than the policy's own.

    arXiv 2408.06266.
    """

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        return losses.apo_zero(chosen, rejected, self.beta)


class APODown(PreferenceObjective, kind="apo_down"):
    """s(beta c) + 1 - s(beta margin): lowers both sides, the rejected more. For chosen answers worse than the policy's own.

    arXiv 2408.06266.
    """

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        return losses.apo_down(chosen, rejected, self.beta)


class FDPO(PreferenceObjective, kind="f_dpo"):
    """-log sigmoid(beta (f'(t_c) - f'(t_r))) with t = p / p_reference of each side: DPO under another divergence.

    arXiv 2309.16240. forward_kl: f'(t) = 1 - 1/t; js: log 2 + log sigmoid(log t); alpha: (t^(alpha - 1) - 1) / (alpha - 1). The
    reverse KL (f' = log t) is dpo. The divergences that are not the reverse KL see the sides' own ratios, not only the margin.
    """

    divergence: Literal["forward_kl", "js", "alpha"] = "js"
    """What holds the policy to the reference."""
    alpha: float = Field(default=0.5, gt=0, lt=1)
    """Of the alpha divergence, between the forward (0) and the reverse KL (1)."""
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""

    @model_validator(mode="after")
    def _alpha_is_used(self) -> "FDPO":
        if self.alpha != type(self).model_fields["alpha"].default and self.divergence != "alpha":
            raise ValueError(f"alpha is of divergence: alpha, and this is {self.divergence}; remove it")
        return self

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        moved = {"forward_kl": losses.f_forward_kl, "js": losses.f_js, "alpha": self._alpha}[self.divergence]
        return losses.dpo(moved(chosen) - moved(rejected), self.beta)

    def _alpha(self, ratio: "Tensor") -> "Tensor":
        return losses.f_alpha(ratio, self.alpha)


class WPO(DPO, kind="wpo"):
    """dpo, each pair weighted by how likely the policy itself is to write it.

    arXiv 2406.11827: the weight is exp(mean over tokens of log p - log sum_v p(v)^2), of both sides, at most 1, without gradient.
    """

    def annotate(self, batch: "Pairs", policy: "LM", roles: "Roles") -> "Pairs":
        import torch

        def relative(logits: "Tensor", target: "Tensor") -> "Tensor":
            logp = logits.log_softmax(-1)
            return logp.gather(1, target[:, None])[:, 0] - torch.logsumexp(2 * logp, -1)

        means = []
        for seqs in batch.sequences:
            values = policy.in_parts(lambda part: policy.over_vocab(part, relative), seqs, roles.micro_tokens)
            means.append(losses.sequence_means(values, seqs.owner.to(values.device), seqs.count).cpu())
        return replace(super().annotate(batch, policy, roles), weight=losses.wpo_weight(means[0], means[1]))


class ReferenceFree(PreferenceObjective):
    """Those that need no reference: their ratios are the policy's own log-probabilities."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()


class SimPO(ReferenceFree, kind="simpo"):
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma), means over tokens. arXiv 2405.14734."""

    length: Literal["mean"] = "mean"
    """Always per token."""
    beta: PositiveFloat = 2.0
    """Scale of the difference; the paper takes 2 to 10."""
    gamma: NonNegativeFloat = 1.0
    """The margin to reach; about half of beta."""

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        return losses.simpo(chosen, rejected, self.beta, self.gamma)


class CPO(ReferenceFree, kind="cpo"):
    """-log sigmoid(beta (log p(chosen) - log p(rejected))) + nll (-log p(chosen) per token). arXiv 2401.08417.

    The second term is a mean over each answer's tokens, then over pairs; TRL's is a mean over all tokens of a micro-batch.
    """

    beta: PositiveFloat = 0.1
    """Scale of the difference."""
    label_smoothing: Smoothing = 0.0
    """The share of labels that may be wrong."""
    nll: NonNegativeFloat = 1.0
    """Weight of -log p(chosen) per token."""

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        return losses.dpo(chosen - rejected, self.beta, self.label_smoothing)


class ORPO(ReferenceFree, kind="orpo"):
    """nll (-log p(chosen) per token) - weight log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p).

    arXiv 2403.07691, with p = exp(mean log p of the tokens): supervised fine-tuning and preference in one, from a base model.
    Only answers are trained; TRL's first term covers the prompt too.
    """

    length: Literal["mean"] = "mean"
    """Always per token."""
    weight: PositiveFloat = 0.1
    """lambda, the weight of the odds ratio; TRL calls it beta."""
    nll: NonNegativeFloat = 1.0
    """Weight of -log p(chosen) per token."""

    def preferred(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        return self.weight * losses.orpo(chosen, rejected)
