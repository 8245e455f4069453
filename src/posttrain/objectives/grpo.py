"""The policy-gradient family: answers that the policy drew, each with its score; better ones become likelier."""

from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeFloat, PositiveFloat

from posttrain import losses
from posttrain.objectives.policy_gradient import Aggregate, Baseline, Level, PolicyGradient, Pull, Scale

if TYPE_CHECKING:
    from torch import Tensor


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
