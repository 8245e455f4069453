"""What the policy-gradient family shares: one path from scores to credit, and one sum over sampled tokens.

A kind (`objectives/grpo.py`) is a loss for each token, or other defaults.
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
    from posttrain.text import Grade, Sample

Level = Literal["token", "sequence_product", "sequence_mean"]
Baseline = Literal["group", "leave_one_out", "greedy", "none"]
Scale = Literal["group", "batch", "none"]
Aggregate = Literal["sequence", "token", "sum", "constant"]
Pull = Literal["loss", "weighted", "score", "reward"]
Supervision = Literal["outcome", "process", "to_go"]


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
    rewards: Literal["sum", "each"] = "sum"
    """How the parts of a `weighted` reward come together. sum: as one score. each: every part is brought to mean 0 and deviation
    1 in its group, then their weighted sum over the batch (GDPO, arXiv 2601.05242): none drowns in another's scale."""
    supervision: Supervision = "outcome"
    """What is made of the steps of an answer (turns of an episode, lines of a solution). outcome: nothing; the score is each
    token's. process: a token has the normalised rewards of its step and of those after it (arXiv 2402.03300). to_go: what is
    still to come from its step on, against the others' from the same step on."""
    whiten: bool = False
    """Bring the advantages of all tokens of a rollout to mean 0 and variance 1."""
    aggregate: Aggregate = "sequence"
    """What the loss is a mean over: sequence: each answer's tokens, then answers; token: all tokens of the update; sum: answers,
    of each the sum over its tokens; constant: that sum over `length`."""
    length: PositiveInt | None = None
    """With `aggregate: constant`, what sums are divided by; by default `rollout.sampling.max_tokens`."""
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
        if self.supervision != "outcome" and (self.baseline not in {"group", "leave_one_out"} or self.kl_as == "score"):
            raise ValueError(
                f"supervision: {self.supervision} compares steps with those of the group; set baseline: group or leave_one_out, "
                "and kl_as to anything but score"
            )
        if self.rewards == "each" and (self.baseline != "group" or self.supervision != "outcome" or self.kl_as == "score"):
            raise ValueError(
                "rewards: each normalises the parts of a score in their group; set baseline: group, supervision: outcome, "
                "and kl_as to anything but score"
            )
        if self.scale == "group" and self.baseline in {"greedy", "none"}:
            raise ValueError(f"scale: group goes with a baseline of the group, and this is {self.baseline}; take batch or none")
        return self

    def check_rollout(self, problems: int, per_problem: int) -> None:
        if per_problem < 2 and self.baseline in {"group", "leave_one_out"}:
            raise ValueError(
                f"rollout.per_problem: objective {self.kind} compares the answers to one problem with each other: take 2 or "
                "more, or a `baseline` of another sort"
            )

    def planned(self, max_tokens: int) -> Self:
        if self.aggregate == "constant" and self.length is None:
            return self.model_copy(update={"length": max_tokens})
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

        graded = [
            (sample, grade, grade.score) for sample, grade in zip(samples, grades, strict=True) if grade.score is not None
        ]
        greedy = {sample.problem.id: score for sample, _, score in graded if sample.by == "greedy"}
        kept = [
            (sample, grade, score - greedy.get(sample.problem.id, 0.0))
            for sample, grade, score in graded
            if sample.by == "policy" and (self.baseline != "greedy" or sample.problem.id in greedy)
        ]
        scored = [(sample, score) for sample, _, score in kept]
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
        if self.rewards == "each":
            scores = of_each([grade for _, grade, _ in kept], groups)
        steps = None if self.supervision == "outcome" else stepwise([grade for _, grade, _ in kept], seqs)
        rollouts = Rollouts(
            seqs,
            sampled_logp=sampled_logp,
            advantage=self._advantages(scores, groups, seqs, sampled_logp, ref_logp, steps),
            version=torch.tensor([sample.version for sample, _ in scored], dtype=torch.long),
            old_logp=old_logp,
            ref_logp=ref_logp,
            temperature=temperature,
        )
        owners = [sample.problem.id for sample, _ in scored]
        if self.learn_cut_off:
            return rollouts, owners
        whole = [row for row, (sample, _) in enumerate(scored) if sample.stop == "end"]
        return rollouts.select(whole), [owners[row] for row in whole]

    def _advantages(
        self, scores: "Tensor", groups: "Tensor", seqs: "Sequences", logp: "Tensor", ref_logp: "Tensor | None",
        steps: "tuple[Tensor, Tensor] | None" = None,
    ) -> "Tensor":  # fmt: skip
        """[N]: of each sampled token."""
        if not seqs.count:
            return logp
        pull = None
        if ref_logp is not None and self.kl_as in {"score", "reward"}:
            pull = self.kl * losses.kl_k1(logp, ref_logp.to(logp.dtype))
        if pull is not None and self.kl_as == "score":
            scores = scores - losses.sequence_sums(pull, seqs.owner, seqs.count)
        alone = self.baseline == "leave_one_out"
        if steps is not None:
            of_steps = losses.step_advantages if self.supervision == "process" else losses.return_advantages
            advantage = of_steps(*steps, seqs.owner, groups, self.scale, leave_one_out=alone)
        elif self.rewards == "each":  # whose parts have been compared in their groups
            advantage = losses.group_advantages(scores, 0 * groups)[seqs.owner]
        elif self.baseline in {"group", "leave_one_out"}:
            advantage = losses.group_advantages(scores, groups, self.scale, leave_one_out=alone)[seqs.owner]
        else:
            alike = seqs.count < 2 or bool((scores == scores[0]).all())  # nothing to divide by
            good = scores if self.scale != "batch" or alike else scores / (scores.std() + 1e-4)
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
                value = value + self.kl * (away * ratio_of(log_ratio) if self.kl_as == "weighted" else away)
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
        return Loss(terms, self._stats(logp.detach(), ratio_of(log_ratio.detach()), batch))

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
        ratio, the advantage that the policy as it is would have, what was clipped, the entropy of what was sampled, how far the
        sampler was from the trainer, the KL so far."""
        count, sampled = len(logp), batch.sampled_logp
        trainer = logp if batch.old_logp is None else batch.old_logp
        stats: dict[str, tuple[Tensor | float, int]] = {
            "ratio": (ratio.sum(), count),
            "gain": ((ratio * batch.advantage).sum(), count),
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


def of_each(grades: "Sequence[Grade]", groups: "Tensor") -> "Tensor":
    """[B]: the weighted sum of the parts of each score, each normalised in its group. A score without parts is one."""
    import torch

    weights: dict[str, float] = {name: weight for grade in grades for name, weight in grade.weights.items()} or {"score": 1.0}
    total = torch.zeros(len(grades))
    for name, weight in weights.items():
        part = torch.tensor([grade.parts.get(name, grade.score or 0.0) for grade in grades], dtype=torch.float32)
        total += weight * losses.group_advantages(part, groups)
    return total


def stepwise(grades: "Sequence[Grade]", seqs: "Sequences") -> "tuple[Tensor, Tensor]":
    """[S], [S]: what each step earns, and its last token (of all N). A grade without steps is one step: its score, at the end."""
    import torch

    starts = (seqs.trained_lengths.cumsum(0) - seqs.trained_lengths).tolist()
    rewards: list[float] = []
    ends: list[int] = []
    for grade, start, length in zip(grades, starts, seqs.trained_lengths.tolist(), strict=True):
        for end, reward in grade.steps or ((length, grade.score or 0.0),):
            if 0 < end <= length:
                rewards.append(reward)
                ends.append(start + end - 1)
    return torch.tensor(rewards, dtype=torch.float32), torch.tensor(ends, dtype=torch.long)


def levelled(log_ratio: "Tensor", level: Level, seqs: "Sequences") -> "Tensor":
    """[N]: the log-ratio of each token, or in its place the sum or the mean over the tokens of its sequence."""
    if level == "token":
        return log_ratio
    over = losses.sequence_sums if level == "sequence_product" else losses.sequence_means
    return over(log_ratio, seqs.owner, seqs.count).index_select(0, seqs.owner)


def ratio_of(log_ratio: "Tensor") -> "Tensor":
    """exp, within what still says something: the product over a long answer overflows."""
    from posttrain.losses.policy_gradient import LARGEST_LOG_RATIO

    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def entropies(policy: "LM", seqs: "Sequences", temperature: float) -> "Tensor":
    """[N]: of the distribution that each trained token is drawn from."""
    return policy.over_vocab(seqs, lambda logits, _targets: losses.entropy(logits / temperature))
