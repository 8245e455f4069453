"""Group relative policy optimisation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat

from posttrain import losses
from posttrain.objectives.objective import Loss, OnPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Rollouts
    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles
    from posttrain.text import Grade, Sample


class GRPO(OnPolicy, kind="grpo"):
    """-min(ratio A, clip(ratio) A) + kl k3 per token, with A = (score - group mean) / (group std + 1e-4).

    arXiv 2402.03300 eq. 3. The advantage of a sample is that of each of its tokens. `aggregate: sequence` is the paper's mean
    over each sample's tokens, then over samples (TRL: loss_type "grpo"); `aggregate: token` the mean over all tokens of the
    update (TRL: "dapo"). Sampling at temperature t is scored at temperature t.
    """

    clip_low: float = Field(default=0.2, gt=0, le=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high (arXiv 2503.14476 takes 0.28)."""
    scale: Literal["group", "batch", "none"] = "group"
    """What the centred score is divided by: its group's deviation, the batch's, or nothing (arXiv 2503.20783)."""
    aggregate: Literal["sequence", "token"] = "sequence"
    """What the loss is a mean over."""
    kl: NonNegativeFloat = 0.0
    """Weight of the k3 term to the reference (the stage's starting model). 0 needs no reference."""

    reads = "Rollouts"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference"}) if self.kl else frozenset()

    def credit(
        self, samples: "Sequence[Sample]", grades: "Sequence[Grade]", policy: "LM", roles: "Roles", temperature: float
    ) -> "tuple[Rollouts, list[str]]":
        import torch

        from posttrain.batch import Rollouts, Sequences

        scored = [(sample, grade.score) for sample, grade in zip(samples, grades, strict=True) if grade.score is not None]
        numbers: dict[str, int] = {}
        groups = torch.tensor([numbers.setdefault(sample.problem.id, len(numbers)) for sample, _ in scored], dtype=torch.long)
        scores = torch.tensor([score for _, score in scored], dtype=torch.float32)
        seqs = Sequences.of([(sample.tokens, sample.sampled) for sample, _ in scored])
        advantage = losses.group_advantages(scores, groups, self.scale) if scored else scores
        ref_logp = None
        if self.kl:
            assert roles.reference is not None
            ref_logp = roles.reference.logprobs(seqs, temperature).cpu()
        rollouts = Rollouts(
            seqs,
            sampled_logp=torch.tensor([value for sample, _ in scored for value in sample.logp], dtype=torch.float32),
            advantage=advantage[seqs.owner],
            version=torch.tensor([sample.version for sample, _ in scored], dtype=torch.long),
            ref_logp=ref_logp,
            temperature=temperature,
        )
        return rollouts, [sample.problem.id for sample, _ in scored]

    def units(self, batch: "Rollouts") -> dict[str, int]:
        return {"policy": batch.seqs.trained if self.aggregate == "token" else batch.count}

    def loss(self, policy: "LM", batch: "Rollouts") -> Loss:
        import torch

        if not self.kl:  # samples without an advantage have no gradient; they are counted in `units`, and need no forward
            batch = batch.select(batch.seqs.owner[batch.advantage != 0].unique().tolist())
        before = batch.sampled_logp if batch.old_logp is None else batch.old_logp
        owner = batch.seqs.owner
        size = torch.ones_like(owner) if self.aggregate == "token" else batch.seqs.trained_lengths[owner]

        def per_token(logp: "Tensor", part: slice) -> "Tensor":
            value = losses.clipped_surrogate(logp, before[part], batch.advantage[part], self.clip_low, self.clip_high)
            if self.kl:
                assert batch.ref_logp is not None
                value = value + self.kl * losses.kl_k3(logp, batch.ref_logp[part])
            return value / size[part]

        total, logp = policy.token_sum(batch.seqs, per_token, batch.temperature)
        return Loss({"policy": total}, self._stats(logp, before, batch))

    def _stats(self, logp: "Tensor", before: "Tensor", batch: "Rollouts") -> "dict[str, tuple[Tensor | float, int]]":
        """Of the update as it happens, over the tokens that have an advantage (with `kl`, over all): the ratio, how much was
        clipped, the entropy of what was sampled, the difference between sampler and trainer, the KL so far."""
        count, ratio = len(logp), (logp - before).exp()
        clipped = (ratio > 1 + self.clip_high) & (batch.advantage > 0) | (ratio < 1 - self.clip_low) & (batch.advantage < 0)
        stats: dict[str, tuple[Tensor | float, int]] = {
            "ratio": (ratio.sum(), count),
            "clip_fraction": (clipped.sum(), count),
            "entropy": (-batch.sampled_logp.sum(), count),
            "mismatch": ((logp - batch.sampled_logp).abs().sum(), count),
        }
        if batch.ref_logp is not None:
            stats["kl"] = (losses.kl_k3(logp, batch.ref_logp).sum(), count)
        return stats
