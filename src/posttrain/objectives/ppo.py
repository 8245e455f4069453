"""Reinforcement learning from human feedback by proximal policy optimisation, with a critic."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from posttrain import losses
from posttrain.objectives.objective import Loss, OnPolicy
from posttrain.objectives.policy_gradient import stepwise

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Rollouts, Sequences, Valued
    from posttrain.models.actor_critic import ActorCritic
    from posttrain.models.roles import Roles
    from posttrain.text import Grade, Sample

ESTIMATORS = {"k1": "kl_k1", "k2": "kl_k2", "k3": "kl_k3"}


class PPO(OnPolicy, kind="ppo"):
    """-min(ratio A, clip(ratio) A) + value_weight max((V - R)^2, (clip(V) - R)^2) / 2 per token; A by GAE.

    arXiv 1707.06347, 1506.02438; for language models 1909.08593, 2203.02155, 2403.17031. The reward of a token is -kl times the
    divergence of the sampling policy from the reference there (a constant in the update), and the score stands on the last
    token. An answer that did not end by itself gets `no_end_score`. R = A + V before A is whitened. Means are over all tokens of
    the minibatch. docs/ppo.md goes through the known implementation details.
    """

    kl: NonNegativeFloat = 0.05
    """Weight of the KL penalty in the reward; with `kl_target`, what the controller begins with. 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """The penalty of a token: k1 = log p - log p_reference (unbiased as a reward), k2 = k1^2 / 2, k3 = exp(-k1) - 1 + k1."""
    kl_target: PositiveFloat | None = None
    """Nats an answer that the adaptive controller aims at (arXiv 1909.08593: 6); null keeps the weight."""
    kl_horizon: PositiveInt = 10_000
    """The controller's: answers in which a KL of 20% off target moves the weight by 20%."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """lambda of generalised advantage estimation."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped to 1 - clip and 1 + clip."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Where the advantage is negative, the loss is at most this times its size (arXiv 1912.09729: 3); null bounds nothing."""
    value_clip: PositiveFloat | None = 0.2
    """The new value is kept this close to the old one in the second of the two errors; null takes the first alone."""
    value_weight: PositiveFloat = 0.1
    """Weight of the critic's loss; matters with `critic.shared`, and for gradient clipping."""
    entropy: NonNegativeFloat = 0.0
    """Weight of the entropy bonus; costs one more forward pass."""
    whiten_advantages: bool = True
    """Bring the advantages of a rollout to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Bring the rewards of a rollout's tokens to variance 1, keeping their mean."""
    no_end_score: float | None = -1.0
    """Replaces the score of an answer that was cut off; null leaves it."""
    no_end_penalty: NonNegativeFloat = 0.0
    """Is taken from the score of an answer that was cut off."""

    supervision: Literal["outcome", "process"] = "outcome"
    """What is made of the steps of an answer (turns of an episode, lines of a solution). outcome: nothing; the score stands on
    the last token. process: in its place each step's reward stands on the step's last token, and `no_end_score` and
    `no_end_penalty` are not used."""

    @model_validator(mode="after")
    def _controls_something(self) -> "PPO":
        if self.kl_target is not None and not self.kl:
            raise ValueError("kl_target: the controller multiplies the weight `kl`, and that is 0; give it a value to begin with")
        return self

    def check_rollout(self, problems: int, per_problem: int) -> None:
        if self.kl_target is not None and self.kl_horizon < problems * per_problem:
            raise ValueError(
                f"objective.kl_horizon: {self.kl_horizon} is less than the {problems * per_problem} answers of a rollout, so "
                "the controller would jump; take at least as many"
            )

    reads = "Valued"
    trains = frozenset({"critic"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference"}) if self.kl else frozenset()

    def controls(self) -> dict[str, float]:
        return {"kl_weight": self.kl}

    def credit(
        self, samples: "Sequence[Sample]", grades: "Sequence[Grade]", policy: "ActorCritic", roles: "Roles", temperature: float
    ) -> "tuple[Valued, list[str]]":
        import torch

        from posttrain.batch import Rollouts, Sequences, Valued

        graded = [(one, grade) for one, grade in zip(samples, grades, strict=True) if grade.score is not None]
        scored = [(one, self._score(one, grade.score or 0.0)) for one, grade in graded]
        seqs = Sequences.of([(one.tokens, one.sampled) for one, _ in scored])
        sampled_logp = torch.tensor([value for one, _ in scored for value in one.logp], dtype=torch.float32)
        ref_logp = None
        if self.kl:
            assert roles.reference is not None
            ref_logp = roles.reference.logprobs(seqs, temperature).cpu().float()
        earned = self._earned([grade for _, grade in graded], [score for _, score in scored], seqs)
        reward = self._rewards(sampled_logp, ref_logp, earned, seqs, roles)
        with torch.no_grad():
            value = policy.in_parts(policy.values, seqs, roles.micro_tokens).cpu().float()
        edges = torch.cat([seqs.starts[:1], seqs.trained_lengths.cumsum(0)])
        advantage = losses.gae(reward, value, self.gamma, self.lam, edges)
        rollouts = Rollouts(
            seqs,
            sampled_logp=sampled_logp,
            advantage=losses.whiten(advantage) if self.whiten_advantages else advantage,
            version=torch.tensor([one.version for one, _ in scored], dtype=torch.long),
            ref_logp=ref_logp,
            temperature=temperature,
        )
        return Valued(rollouts, value, advantage + value), [one.problem.id for one, _ in scored]

    def _score(self, one: "Sample", score: float) -> float:
        """The score of an answer, with what is done to one that did not end by itself."""
        if one.stop == "end":
            return score
        return (score if self.no_end_score is None else self.no_end_score) - self.no_end_penalty

    def _earned(self, grades: "Sequence[Grade]", scores: "Sequence[float]", seqs: "Sequences") -> "Tensor":
        """[N]: what each sampled token earns: its step's reward on the last of a step, or the score on the last of an answer."""
        import torch

        earned = torch.zeros(seqs.trained)
        if self.supervision == "process":
            rewards, ends = stepwise(grades, seqs)
            return earned.index_add(0, ends, rewards)
        written = seqs.trained_lengths > 0
        earned[seqs.trained_lengths.cumsum(0)[written] - 1] += torch.tensor(scores)[written]
        return earned

    def _rewards(
        self, logp: "Tensor", ref_logp: "Tensor | None", earned: "Tensor", seqs: "Sequences", roles: "Roles"
    ) -> "Tensor":
        """[N]: the reward of each sampled token. Moves the controller, after its weight was used."""
        reward = earned.to(logp.dtype)
        if ref_logp is not None:
            reward = reward - roles.controls["kl_weight"] * getattr(losses, ESTIMATORS[self.kl_estimator])(logp, ref_logp)
            if self.kl_target is not None:
                divergence = float((logp - ref_logp).double().sum()) / max(1, seqs.count)
                roles.controls["kl_weight"] = losses.adaptive_kl(
                    roles.controls["kl_weight"], divergence, self.kl_target, seqs.count, self.kl_horizon
                )
        return losses.whiten(reward, shift_mean=False) if self.whiten_rewards else reward

    def units(self, batch: "Valued") -> dict[str, int]:
        tokens = batch.rollouts.seqs.trained
        return {"policy": tokens, "value": tokens} | ({"entropy": tokens} if self.entropy else {})

    def loss(self, policy: "ActorCritic", batch: "Valued") -> Loss:
        rollouts = batch.rollouts
        before = rollouts.sampled_logp if rollouts.old_logp is None else rollouts.old_logp

        def per_token(logp: "Tensor", part: slice) -> "Tensor":
            return losses.clipped_surrogate(logp, before[part], rollouts.advantage[part], self.clip, self.clip, self.dual_clip)

        total, logp, value = policy.token_sum_and_values(rollouts.seqs, per_token, rollouts.temperature)
        error = losses.clipped_value(value, batch.value, batch.returns, self.value_clip)
        terms = {"policy": total, "value": self.value_weight * error.sum()}
        if self.entropy:
            spread = policy.over_vocab(rollouts.seqs, lambda logits, _: losses.entropy(logits / rollouts.temperature))
            terms["entropy"] = -self.entropy * spread.sum()
        return Loss(terms, self._stats(logp, before, value.detach(), batch))

    def _stats(
        self, logp: "Tensor", before: "Tensor", value: "Tensor", batch: "Valued"
    ) -> "dict[str, tuple[Tensor | float, int]]":
        """Of the update as it happens: ratios, what was clipped, the entropy of what was sampled, the divergence from the policy
        that sampled and from the reference (nats an answer), and how far the critic is off."""
        rollouts: Rollouts = batch.rollouts
        count, gap = len(logp), logp - before
        ratio, good = gap.exp(), rollouts.advantage
        clipped = (ratio > 1 + self.clip) & (good > 0) | (ratio < 1 - self.clip) & (good < 0)
        stats: dict[str, tuple[Tensor | float, int]] = {
            "ratio": (ratio.sum(), count),
            "clip_fraction": (clipped.sum(), count),
            "step_kl": ((0.5 * gap**2).sum(), count),
            "entropy": (-rollouts.sampled_logp.sum(), count),
            "mismatch": ((logp - rollouts.sampled_logp).abs().sum(), count),
            "value": (value.sum(), count),
            "value_error": (((value - batch.returns) ** 2).sum(), count),
            "return": (batch.returns.sum(), count),
        }
        if self.value_clip is not None:
            stats["value_clip_fraction"] = (((value - batch.value).abs() > self.value_clip).sum(), count)
        if rollouts.ref_logp is not None:
            stats["kl"] = ((rollouts.sampled_logp - rollouts.ref_logp).sum(), batch.count)
        return stats
