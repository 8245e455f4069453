"""Direct preference objectives on pairs that the policy samples now, ranked by a grader: a reward model, a verifier, a judge."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat

from posttrain.objectives.objective import OnPolicy
from posttrain.objectives.preference import DPO

if TYPE_CHECKING:
    from posttrain.batch import Pairs
    from posttrain.models.roles import Roles
    from posttrain.text import Grade, Sample


class OnlineDPO(DPO, OnPolicy, kind="online_dpo"):
    """dpo on the best and the worst of the policy's own answers to each prompt. arXiv 2402.04792 (two answers, temperature 0.9).

    Prompts whose best and worst score are equal, or whose best and worst answer are the same, give no pair. The log-probabilities
    of the answers are computed anew with the gradient; those of the sampler are not used.
    """

    no_end_penalty: NonNegativeFloat = 0.0
    """Is taken from the score of an answer that was cut off, before answers are compared."""

    rows = frozenset()
    reference_per_row = False

    def check_rollout(self, problems: int, per_problem: int) -> None:
        if per_problem < 2 and not self.also_samples:
            raise ValueError(
                f"objective {self.kind} compares the answers to one problem, and rollout.per_problem is {per_problem}; "
                "set at least 2"
            )

    def credit(
        self, samples: "Sequence[Sample]", grades: "Sequence[Grade]", policy: Any, roles: "Roles", temperature: float
    ) -> "tuple[Pairs, list[str]]":
        import torch

        from posttrain.batch import Pairs, Sequences

        scored = [(one, grade.score) for one, grade in zip(samples, grades, strict=True) if grade.score is not None]
        pairs: list[tuple[Sample, Sample]] = []
        for _, group in groupby(sorted(scored, key=lambda each: each[0].problem.id), key=lambda each: each[0].problem.id):
            pairs += self._pairs([(score - self.no_end_penalty * (one.stop != "end"), one) for one, score in group])
        sides = [Sequences.of([(pair[side].tokens, pair[side].sampled) for pair in pairs]) for side in (0, 1)]
        batch = Pairs(sides[0], sides[1], torch.ones(len(pairs)), torch.zeros(len(pairs)), theirs=self._theirs(pairs))
        return batch, [best.problem.id for best, _ in pairs]

    def _pairs(self, members: "Sequence[tuple[float, Sample]]") -> "list[tuple[Sample, Sample]]":
        """(best, worst) of the scored answers to one prompt."""
        best, worst = (pick(members, key=lambda each: each[0]) for pick in (max, min))
        return [(best[1], worst[1])] if best[0] > worst[0] and best[1].tokens != worst[1].tokens else []

    def _theirs(self, pairs: "Sequence[tuple[Sample, Sample]]") -> Any:
        return None


class XPO(OnlineDPO, kind="xpo"):
    """online_dpo on one answer of the policy and one of the reference, + optimism log p(the reference's answer).

    arXiv 2405.21046. The added term lowers the probability of what the reference already says: exploration. It is the
    log-probability of the whole answer (a sum), a mean over pairs.
    """

    optimism: NonNegativeFloat = 1e-5
    """alpha, the weight of the added term."""

    @property
    def also_samples(self) -> frozenset[str]:
        return frozenset({"reference"})

    def _pairs(self, members: "Sequence[tuple[float, Sample]]") -> "list[tuple[Sample, Sample]]":
        """Of each draw the policy's answer and the reference's: with several draws a prompt, several pairs."""
        draws: dict[int, list[tuple[float, Sample]]] = {}
        for member in members:
            draws.setdefault(member[1].index, []).append(member)
        return [pair for draw in draws.values() for pair in super(XPO, self)._pairs(draw)]

    def _theirs(self, pairs: "Sequence[tuple[Sample, Sample]]") -> Any:
        import torch

        return torch.tensor([best.by == "reference" for best, _ in pairs], dtype=torch.bool)

    def units(self, batch: "Pairs") -> dict[str, int]:
        return super().units(batch) | {"optimism": batch.count}

    def extra_terms(self, sides: "Sequence[Any]", batch: "Pairs") -> "dict[str, Any]":
        assert batch.theirs is not None
        theirs = batch.theirs
        return {"optimism": self.optimism * (sides[0][theirs].sum() + sides[1][~theirs].sum())}
