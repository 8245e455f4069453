"""The policy-gradient family: answers that the policy drew, each with its score; better ones become likelier.

All share one path from scores to credit and one sum over sampled tokens; a kind is a loss for each token, or other defaults.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from posttrain import losses
from posttrain.component import Settings
from posttrain.objectives.objective import Loss, OnPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Rollouts, Sequences
    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles
    from posttrain.sampling import Sampling
    from posttrain.text import Grade, Sample

Level = Literal["token", "sequence_product", "sequence_mean"]
Baseline = Literal["group", "leave_one_out", "greedy", "none"]
Scale = Literal["group", "batch", "none"]
Aggregate = Literal["sequence", "token", "sum", "constant"]
Pull = Literal["loss", "weighted", "score", "reward"]


class Correction(Settings):
    """Weights for what another policy drew: a sampler that is behind, rounded, or another engine."""

    level: Level = "token"
    """The ratio of each token, of the whole answer, or its geometric mean over the answer's tokens."""
    mask: bool = False
    """Leave out what lies beyond `cap` and `floor`, in place of a weight of at most `cap`."""
    cap: PositiveFloat = 2.0
    """The largest weight (TRL with `mask` and whole answers: 3)."""
    floor: NonNegativeFloat = 0.0
    """With `mask`, the smallest."""

    @model_validator(mode="after")
    def _floor_is_used(self) -> Self:
        if self.floor and not self.mask:
            raise ValueError("floor: only what is masked has a smallest weight; set mask: true, or leave floor out")
        if self.floor >= self.cap:
            raise ValueError(f"floor: {self.floor:g} is not below the cap, {self.cap:g}, and would leave nothing")
        return self


class PolicyGradient(OnPolicy):
    """The part that all share."""

    baseline: Baseline = "group"
    """What a score is compared with: the mean of the answers to its problem, the mean of the others (unbiased), the score of the
    greedy answer (arXiv 2310.10505), or nothing."""
    scale: Scale = "group"
    """What the centred score is divided by: its group's deviation, the batch's, or nothing (arXiv 2503.20783)."""
    whiten: bool = False
    """Bring the advantages of all tokens of a rollout to mean 0 and variance 1."""
    aggregate: Aggregate = "sequence"
    """What the loss is a mean over: sequence: each answer's tokens, then answers; token: all tokens of the update; sum: answers,
    of each the sum over its tokens; constant: that sum over `length`."""
    length: PositiveInt | None = None
    """With `aggregate: constant`, what sums are divided by; by default rollout.sampling.max_tokens."""
    kl: NonNegativeFloat = 0.0
    """Weight of the divergence from the reference (the stage's starting model). 0 needs no reference."""
    kl_as: Pull = "loss"
    """loss: k3 of each token as a term (its gradient is that of the forward KL). weighted: k3 times the ratio (the gradient of
    the reverse KL). score: k1, summed over the answer, is taken from its score. reward: k1 of a token and of those after it is
    taken from its advantage (both: the gradient of the reverse KL)."""
    entropy: NonNegativeFloat = 0.0
    """Weight of the entropy bonus, a mean over all tokens; costs one more forward pass."""
    top_entropy: float = Field(default=1.0, gt=0, le=1)
    """The share of the update's tokens that learn, those of the highest entropy (arXiv 2506.01939: 0.2); below 1 it costs one
    more forward pass."""
    correction: Correction | None = None
    """Weights for a sampler that is not the trainer; null takes what was drawn as the policy's own."""
    learn_cut_off: bool = True
    """Whether answers that were cut off are learned from (arXiv 2503.14476 leaves them out); in their group's mean they stay."""

    reads = "Rollouts"

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.length is not None and self.aggregate != "constant":
            raise ValueError(f"length: aggregate {self.aggregate} divides by no constant; set aggregate: constant")
        if self.scale == "group" and self.baseline in {"greedy", "none"}:
            raise ValueError(f"scale: group goes with a baseline of the group, and this is {self.baseline}; take batch or none")
        return self

    def check_rollout(self, problems: int, per_problem: int) -> None:
        if per_problem < 2 and self.baseline in {"group", "leave_one_out"}:
            raise ValueError(
                f"rollout.per_problem: objective {self.kind} compares the answers to one problem with each other: take 2 or "
                "more, or a `baseline` of another sort"
            )

    def planned(self, sampling: "Sampling") -> Self:
        if self.aggregate == "constant" and self.length is None:
            return self.model_copy(update={"length": sampling.max_tokens})
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference"}) if self.kl else frozenset()

    @property
    def also_samples(self) -> frozenset[str]:
        return frozenset({"greedy"}) if self.baseline == "greedy" else frozenset()

    # ---- from scores to advantages

    def credit(
        self, samples: "Sequence[Sample]", grades: "Sequence[Grade]", policy: "LM", roles: "Roles", temperature: float
    ) -> "tuple[Rollouts, list[str]]":
        import torch

        from posttrain.batch import Rollouts, Sequences

        graded = [(sample, grade.score) for sample, grade in zip(samples, grades, strict=True) if grade.score is not None]
        greedy = {sample.problem.id: score for sample, score in graded if sample.by == "greedy"}
        scored = [
            (sample, score - greedy.get(sample.problem.id, 0.0))
            for sample, score in graded
            if sample.by == "policy" and (self.baseline != "greedy" or sample.problem.id in greedy)
        ]
        seqs = Sequences.of([(sample.tokens, sample.sampled) for sample, _ in scored])
        sampled_logp = torch.tensor([value for sample, _ in scored for value in sample.logp], dtype=torch.float32)
        ref_logp, old_logp = None, None
        if self.kl:
            assert roles.reference is not None
            ref_logp = roles.reference.logprobs(seqs, temperature).cpu()
        if self.correction is not None:
            with torch.no_grad():
                old_logp = policy.logprobs_of_many(seqs, roles.micro_tokens, temperature).cpu()
        numbers: dict[str, int] = {}
        groups = torch.tensor([numbers.setdefault(sample.problem.id, len(numbers)) for sample, _ in scored], dtype=torch.long)
        scores = torch.tensor([score for _, score in scored], dtype=torch.float32)
        rollouts = Rollouts(
            seqs,
            sampled_logp=sampled_logp,
            advantage=self._advantages(scores, groups, seqs, sampled_logp, ref_logp),
            version=torch.tensor([sample.version for sample, _ in scored], dtype=torch.long),
            old_logp=old_logp,
            ref_logp=ref_logp,
            temperature=temperature,
        )
        owners = [sample.problem.id for sample, _ in scored]
        if self.learn_cut_off:
            return rollouts, owners
        kept = [row for row, (sample, _) in enumerate(scored) if sample.stop == "end"]
        return rollouts.select(kept), [owners[row] for row in kept]

    def _advantages(
        self, scores: "Tensor", groups: "Tensor", seqs: "Sequences", logp: "Tensor", ref_logp: "Tensor | None"
    ) -> "Tensor":
        """[N]: of each sampled token."""
        if not seqs.count:
            return logp
        pull = None
        if ref_logp is not None and self.kl_as in {"score", "reward"}:
            pull = self.kl * losses.kl_k1(logp, ref_logp.to(logp.dtype))
        if pull is not None and self.kl_as == "score":
            scores = scores - losses.sequence_sums(pull, seqs.owner, seqs.count)
        if self.baseline in {"group", "leave_one_out"}:
            good = losses.group_advantages(scores, groups, self.scale, leave_one_out=self.baseline == "leave_one_out")
        else:
            good = scores / (scores.std() + 1e-4) if self.scale == "batch" and seqs.count > 1 else scores
        advantage = good[seqs.owner]
        if pull is not None and self.kl_as == "reward":
            advantage = advantage - losses.to_go(pull, seqs.owner)
        return losses.whiten(advantage) if self.whiten else advantage

    # ---- the update

    def annotate(self, batch: "Rollouts", policy: "LM", roles: "Roles") -> "Rollouts":
        from dataclasses import replace

        import torch

        if self.top_entropy == 1 or not batch.seqs.trained:
            return batch
        spread = policy.in_parts(lambda part: entropies(policy, part, batch.temperature), batch.seqs, roles.micro_tokens)
        return replace(batch, learns=(spread >= torch.quantile(spread, 1 - self.top_entropy)).cpu())

    def units(self, batch: "Rollouts") -> dict[str, int]:
        counted = {"policy": batch.seqs.trained if self.aggregate == "token" else batch.count}
        if self.entropy:
            counted["entropy"] = batch.seqs.trained if batch.learns is None else int(batch.learns.sum())
        return counted

    def loss(self, policy: "LM", batch: "Rollouts") -> Loss:
        pulled = self.kl > 0 and self.kl_as in {"loss", "weighted"}
        if not pulled and not self.entropy:  # samples without an advantage have no gradient; `units` has counted them
            batch = batch.select(batch.seqs.owner[batch.advantage != 0].unique().tolist())
        seqs, before = batch.seqs, batch.sampled_logp if batch.old_logp is None else batch.old_logp
        size, weights = self._sizes(seqs), [each for each in (self._corrections(batch), batch.learns) if each is not None]

        def per_token(logp: "Tensor", log_ratio: "Tensor", part: slice) -> "Tensor":
            value = self.surrogate(logp, log_ratio, batch.advantage[part])
            for weight in weights:
                value = value * weight[part]
            if pulled:
                assert batch.ref_logp is not None
                away = losses.kl_k3(logp, batch.ref_logp[part])
                value = value + self.kl * (away * log_ratio.exp() if self.kl_as == "weighted" else away)
            return value / size[part]

        if self.level == "token":
            total, logp = policy.token_sum(seqs, lambda logp, part: per_token(logp, logp - before[part], part), batch.temperature)
            log_ratio = logp - before
        else:  # the ratio of an answer is known once all of its tokens are
            logp = policy.logprobs(seqs, temperature=batch.temperature)
            log_ratio = levelled(logp - before, self.level, seqs)
            total = per_token(logp, log_ratio, slice(None)).sum()
        terms = {"policy": total}
        if self.entropy:
            spread = entropies(policy, seqs, batch.temperature)
            terms["entropy"] = -self.entropy * (spread if batch.learns is None else spread * batch.learns).sum()
        return Loss(terms, self._stats(logp.detach(), log_ratio.detach().exp(), batch))

    @property
    def level(self) -> Level:
        """Whose ratio a token has: its own, or its answer's."""
        return "token"

    def surrogate(self, logp: "Tensor", log_ratio: "Tensor", advantage: "Tensor") -> "Tensor":
        """[n]: the loss of some tokens. log_ratio: log p - log p of when they were drawn, at `level`."""
        raise NotImplementedError

    def clipped(self, ratio: "Tensor", advantage: "Tensor") -> "Tensor | None":
        """[n]: which tokens a bound on the ratio has touched; None where there is none."""
        return None

    def _sizes(self, seqs: "Sequences") -> "Tensor":
        """[N]: what the loss of a token is divided by, before the update's units."""
        import torch

        if self.aggregate == "sequence":
            return seqs.trained_lengths[seqs.owner]
        assert self.aggregate != "constant" or self.length is not None, "`planned` has not been called"
        return torch.full((seqs.trained,), (self.length or 1) if self.aggregate == "constant" else 1, device=seqs.owner.device)

    def _corrections(self, batch: "Rollouts") -> "Tensor | None":
        """[N]: what each token counts because of who drew it."""
        if self.correction is None:
            return None
        assert batch.old_logp is not None
        gap = levelled(batch.old_logp - batch.sampled_logp, self.correction.level, batch.seqs)
        return losses.importance_weight(gap, self.correction.cap, self.correction.floor, self.correction.mask)

    def _stats(self, logp: "Tensor", ratio: "Tensor", batch: "Rollouts") -> "dict[str, tuple[Tensor | float, int]]":
        """Of the update as it happens, over the tokens that have an advantage (under a pull or an entropy bonus, over all): the
        ratio, how much was clipped, the entropy of what was sampled, how far the sampler was from the trainer, the KL so far."""
        count, sampled = len(logp), batch.sampled_logp
        trainer = logp if batch.old_logp is None else batch.old_logp
        stats: dict[str, tuple[Tensor | float, int]] = {
            "ratio": (ratio.sum(), count),
            "entropy": (-sampled.sum(), count),
            "mismatch": ((trainer - sampled).abs().sum(), count),
            "mismatch_kl": (losses.kl_k3(sampled, trainer).sum(), count),
        }
        if (clipped := self.clipped(ratio, batch.advantage)) is not None:
            stats["clip_fraction"] = (clipped.sum(), count)
        if (weight := self._corrections(batch)) is not None:
            stats["correction"] = (weight.sum(), count)
        if batch.learns is not None:
            stats["learning_tokens"] = (batch.learns.sum(), count)
        if batch.ref_logp is not None:
            stats["kl"] = (losses.kl_k3(logp, batch.ref_logp).sum(), count)
        return stats


def levelled(log_ratio: "Tensor", level: Level, seqs: "Sequences") -> "Tensor":
    """[N]: the log-ratio of each token, or in its place the sum or the mean over the tokens of its sequence."""
    if level == "token":
        return log_ratio
    over = losses.sequence_sums if level == "sequence_product" else losses.sequence_means
    return over(log_ratio, seqs.owner, seqs.count)[seqs.owner]


def entropies(policy: "LM", seqs: "Sequences", temperature: float) -> "Tensor":
    """[N]: of the distribution that each trained token is drawn from."""
    return policy.over_vocab(seqs, lambda logits, _targets: losses.entropy(logits / temperature))


class GRPO(PolicyGradient, kind="grpo"):
    """-min(ratio A, clip(ratio) A) + kl k3 per token, with A = (score - group mean) / (group std + 1e-4).

    arXiv 2402.03300 eq. 3. The advantage of a sample is that of each of its tokens. `aggregate: sequence` is the paper's mean
    over each sample's tokens, then over samples (TRL: loss_type "grpo"); `aggregate: token` the mean over all tokens of the
    update (TRL: "dapo"). Sampling at temperature t is scored at temperature t. `ratio: sequence_product` is the formula of
    arXiv 2501.12948 read literally. `ratio: sequence_mean` with `aggregate: sum` is LUSPO (arXiv 2602.05261).
    """

    clip_low: float = Field(default=0.2, gt=0, le=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high (arXiv 2503.14476 takes 0.28)."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Where the advantage is negative, the loss is at most this times its size (arXiv 1912.09729: 3; 2505.07291: 4); null bounds
    nothing. The two-sided clip, TRL's delta."""
    ratio: Level = "token"
    """The ratio of a token: its own, its whole answer's, or the geometric mean over its answer's tokens (arXiv 2507.18071)."""

    @property
    def level(self) -> Level:
        return self.ratio

    def surrogate(self, logp: "Tensor", log_ratio: "Tensor", advantage: "Tensor") -> "Tensor":
        import torch

        return losses.clipped_surrogate(
            log_ratio, torch.zeros_like(log_ratio), advantage, self.clip_low, self.clip_high, self.dual_clip
        )

    def clipped(self, ratio: "Tensor", advantage: "Tensor") -> "Tensor":
        beyond = (ratio > 1 + self.clip_high) & (advantage > 0) | (ratio < 1 - self.clip_low) & (advantage < 0)
        return beyond if self.dual_clip is None else beyond | (ratio > self.dual_clip) & (advantage < 0)


class DrGRPO(GRPO, kind="dr_grpo"):
    """grpo without its two divisions: A = score - group mean, and sums over tokens divided by one constant.

    arXiv 2503.20783. Dividing by an answer's own length makes long wrong answers cheap for each of their tokens; dividing by the
    group's deviation weighs very easy and very hard problems more.
    """

    scale: Scale = "none"
    aggregate: Aggregate = "constant"


class DAPO(GRPO, kind="dapo"):
    """grpo with a higher upper clip, the mean over all tokens, and problems sampled anew where all answers score the same.

    arXiv 2503.14476. `rollout.refill` says how often further problems are drawn to fill the batch (10 here by default). Its soft
    punishment of overlong answers is a grader's matter. The mean is over the tokens of the whole update.
    """

    clip_high: float = Field(default=0.28, gt=0)
    aggregate: Aggregate = "token"

    refills = 10


class GSPO(GRPO, kind="gspo"):
    """grpo with one ratio for a whole answer, s = exp(mean of log ratio over its tokens), clipped within 3e-4 and 4e-4 of 1.

    arXiv 2507.18071. The ratio of a sequence is what importance sampling of sequences asks for; its mean keeps it near 1.
    """

    clip_low: float = Field(default=3e-4, gt=0, le=1)
    clip_high: float = Field(default=4e-4, gt=0)
    ratio: Level = "sequence_mean"


class RLOO(GRPO, kind="rloo"):
    """REINFORCE on whole answers, with the mean score of the others as the baseline: unbiased.

    arXiv 2402.14740. A = R - mean of the other answers' R, R = score - kl sum over tokens of k1. Where samples are learned from
    more than once the ratio of the whole answer is clipped, as in TRL's RLOOTrainer.
    """

    baseline: Baseline = "leave_one_out"
    scale: Scale = "none"
    kl: NonNegativeFloat = 0.05
    kl_as: Pull = "score"
    ratio: Level = "sequence_product"


class ReinforcePP(GRPO, kind="reinforce_pp"):
    """REINFORCE++: no group; a token's return is the score less kl k1 of it and the tokens after it, whitened over the rollout.

    arXiv 2501.03262, with PPO's clip. `baseline: group` subtracts the group's mean first (REINFORCE++-baseline).
    """

    baseline: Baseline = "none"
    scale: Scale = "none"
    whiten: bool = True
    aggregate: Aggregate = "token"
    kl: NonNegativeFloat = 0.01
    kl_as: Pull = "reward"


class ReMax(GRPO, kind="remax"):
    """REINFORCE with the score of the greedy answer as the baseline: one more answer to each problem, and no group is needed.

    arXiv 2310.10505 algorithm 1.
    """

    baseline: Baseline = "greedy"
    scale: Scale = "none"


class CISPO(PolicyGradient, kind="cispo"):
    """-min(ratio, cap) A log p, the weight without gradient: what a clip would silence goes on learning. Mean over all tokens.

    arXiv 2506.13585; the cap of 5 is ScaleRL's (arXiv 2510.13786).
    """

    aggregate: Aggregate = "token"
    cap: PositiveFloat = 5.0
    """The largest weight of a token."""

    def surrogate(self, logp: "Tensor", log_ratio: "Tensor", advantage: "Tensor") -> "Tensor":
        return losses.cispo(logp, log_ratio, advantage, self.cap)

    def clipped(self, ratio: "Tensor", advantage: "Tensor") -> "Tensor":
        return ratio > self.cap


class SAPO(PolicyGradient, kind="sapo"):
    """-(4 / t) sigmoid(t (ratio - 1)) A: a gate that closes softly on both sides, in place of a clip.

    arXiv 2511.20347. t is the steepness; it is higher for what is pushed down, which spreads over the whole vocabulary.
    """

    up: PositiveFloat = 1.0
    """Steepness where the advantage is positive."""
    down: PositiveFloat = 1.05
    """Steepness where it is not."""

    def surrogate(self, logp: "Tensor", log_ratio: "Tensor", advantage: "Tensor") -> "Tensor":
        return losses.soft_surrogate(log_ratio, advantage, self.up, self.down)


class VESPO(PolicyGradient, kind="vespo"):
    """-w^k exp(l (1 - w)) A log p, w the ratio of the whole answer, the weight without gradient. Mean over all tokens.

    arXiv 2602.10693. The weight is 1 at w = 1 and falls on both sides, smoothly.
    """

    aggregate: Aggregate = "token"
    power: tuple[PositiveFloat, PositiveFloat] = (2.0, 3.0)
    """k, where the advantage is not negative and where it is."""
    decay: tuple[PositiveFloat, PositiveFloat] = (3.0, 2.0)
    """l, likewise."""

    @property
    def level(self) -> Level:
        return "sequence_product"

    def surrogate(self, logp: "Tensor", log_ratio: "Tensor", advantage: "Tensor") -> "Tensor":
        return -losses.gamma_weight(log_ratio, advantage, self.power, self.decay) * advantage * logp
