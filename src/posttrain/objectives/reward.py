"""Reward models: a score for a whole answer, or for each of its steps, from comparisons, labels or grades.

The score is read at the last token of the sequence. The model is that of the stage with a new score head in place of its
vocabulary (or a reward model to go on with); under every tuner the head is trained in full.
"""

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat

from posttrain import losses
from posttrain.errors import DataError
from posttrain.objectives.objective import Loss, Objective
from posttrain.objectives.preference import agreement
from posttrain.text import Labelled as LabelledRow
from posttrain.text import Ranking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from posttrain.batch import Labelled, Pairs, Ranked, Stepped
    from posttrain.models.scalar import ScalarLM
    from posttrain.text import RenderedRow, Rendering, Row


class RewardObjective(Objective):
    """The part that all share."""

    measures = ("accuracy",)
    scores = True

    def exemplary(self, row: "RenderedRow") -> "tuple[Rendering, ...]":
        """The answers of a row that `normalise` brings to a mean of 0: all, or those that are known to be the better ones."""
        return row.sequences


class OfSeveral(RewardObjective):
    """Those that compare the answers to one prompt."""

    reads = "Ranked"
    rows = frozenset({"Ranking"})

    def check_rows(self, rows: "Sequence[Row]", learning: bool = True) -> None:
        for row in rows:
            if isinstance(row, Ranking) and len(row.completions) < 2:
                raise DataError(
                    f"{row.where}: one answer alone has nothing to be compared with; objective {self.kind} needs several of each "
                    "prompt (format ranking), or take score_regression"
                )


class BradleyTerry(RewardObjective, kind="bradley_terry"):
    """-log sigmoid(r(chosen) - r(rejected) - margin) + centring (r(chosen) + r(rejected))^2.

    arXiv 1909.08593, 2203.02155. A label of probability p (`prefer`) gives the cross-entropy with it; `margin` (a column of the
    data) is Llama 2's (arXiv 2307.09288: 3, 2, 1, 0 by strength of preference). Comparisons leave the mean of a prompt's scores
    open; centring (arXiv 2312.09244 takes 0.01) pins it.
    """

    centring: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's scores."""

    reads = "Pairs"
    rows = frozenset({"Preference"})

    def exemplary(self, row: "RenderedRow") -> "tuple[Rendering, ...]":
        return row.sequences[:1]

    def units(self, batch: "Pairs") -> dict[str, int]:
        return {"ranking": batch.count} | ({"centring": batch.count} if self.centring else {})

    def loss(self, policy: "ScalarLM", batch: "Pairs") -> Loss:
        chosen, rejected = policy.scores(batch.chosen, batch.rejected)
        prefer, margin = batch.prefer.to(chosen.dtype), batch.margin.to(chosen.dtype)
        terms = {"ranking": losses.bradley_terry(chosen - rejected, prefer, margin).sum()}
        if self.centring:
            terms["centring"] = self.centring * losses.centring(chosen, rejected).sum()
        gap = (chosen - rejected).detach()
        stats: dict[str, tuple[Tensor | float, int]] = {
            "accuracy": (agreement(gap, prefer).sum(), batch.count),
            "gap": (gap.sum(), batch.count),
            "chosen_score": (chosen.detach().sum(), batch.count),
            "rejected_score": (rejected.detach().sum(), batch.count),
        }
        return Loss(terms, stats)


class RankingReward(OfSeveral, kind="ranking_reward"):
    """-log sigmoid(r(better) - r(worse)), a mean over all pairs of answers to one prompt that differ in score.

    arXiv 2203.02155: all pairs of one prompt are one unit, in one forward of each answer; scattered over batches, each answer
    would be learned from K - 1 times an epoch.
    """

    def units(self, batch: "Ranked") -> dict[str, int]:
        return {"ranking": batch.count}

    def loss(self, policy: "ScalarLM", batch: "Ranked") -> Loss:
        import torch

        scores, group = policy.scores(batch.seqs), batch.group
        better, worse = ((group[:, None] == group[None]) & (batch.score[:, None] > batch.score[None])).nonzero(as_tuple=True)
        owner = group[better]
        gap = scores[better] - scores[worse]
        share = 1.0 / torch.bincount(owner, minlength=batch.count).clamp(min=1)[owner].to(gap.dtype)
        right = agreement(gap.detach(), torch.ones_like(gap))
        total = (share * losses.bradley_terry(gap)).sum()
        return Loss({"ranking": total}, {"accuracy": (right.sum(), len(gap)), "score": (scores.detach().sum(), len(scores))})


class BestOfK(OfSeveral, kind="best_of_k"):
    """-log softmax(r)[best] over the K answers to one prompt. arXiv 1909.08593 (K = 4). The best has the highest score."""

    def check_rows(self, rows: "Sequence[Row]", learning: bool = True) -> None:
        super().check_rows(rows, learning)
        for row in rows:
            if isinstance(row, Ranking) and row.scores.count(max(row.scores)) > 1:
                raise DataError(f"{row.where}: two answers share the highest score; objective best_of_k needs one best")

    def units(self, batch: "Ranked") -> dict[str, int]:
        return {"choice": batch.count}

    def loss(self, policy: "ScalarLM", batch: "Ranked") -> Loss:
        import torch

        scores, group = policy.scores(batch.seqs), batch.group
        top = torch.full((batch.count,), -torch.inf, device=scores.device).scatter_reduce(0, group, batch.score, "amax")
        best = batch.score == top[group]
        value = losses.choice(scores, group, best)
        highest = torch.full_like(value, -torch.inf).scatter_reduce(0, group, scores.detach(), "amax")
        return Loss({"choice": value.sum()}, {"accuracy": ((scores.detach()[best] == highest).sum(), batch.count)})


class ScoreRegression(RewardObjective, kind="score_regression"):
    """(r - score)^2, a mean over answers: graded data."""

    measures = ("absolute_error",)
    reads = "Ranked"
    rows = frozenset({"Ranking"})

    def units(self, batch: "Ranked") -> dict[str, int]:
        return {"error": batch.seqs.count}

    def loss(self, policy: "ScalarLM", batch: "Ranked") -> Loss:
        error = policy.scores(batch.seqs) - batch.score
        return Loss({"error": (error**2).sum()}, {"absolute_error": (error.detach().abs().sum(), batch.seqs.count)})


class LabelledReward(RewardObjective, kind="labelled_reward"):
    """-log sigmoid(r) for good answers, -log sigmoid(-r) for bad ones: the score is the log-odds that an answer is good."""

    reads = "Labelled"
    rows = frozenset({"Labelled"})

    def check_rows(self, rows: "Sequence[Row]", learning: bool = True) -> None:
        labelled = [row for row in rows if isinstance(row, LabelledRow)]
        if learning and labelled and len({row.good for row in labelled}) == 1:
            kind = "good" if labelled[0].good else "bad"
            raise DataError(f"{labelled[0].where}: all {len(rows):,} answers are {kind}; there is nothing to tell apart")

    def exemplary(self, row: "RenderedRow") -> "tuple[Rendering, ...]":
        return () if row.numbers == (0.0,) else row.sequences

    def units(self, batch: "Labelled") -> dict[str, int]:
        return {"label": batch.count}

    def loss(self, policy: "ScalarLM", batch: "Labelled") -> Loss:
        scores = policy.scores(batch.seqs)
        good = batch.good.to(scores.dtype)
        right = agreement(scores.detach(), good)
        return Loss({"label": losses.labelled(scores, good).sum()}, {"accuracy": (right.sum(), batch.count)})


class ProcessReward(RewardObjective, kind="process_reward"):
    """-p log sigmoid(r) - (1 - p) log sigmoid(-r) at the end of each step, p the probability that the step is right.

    The score is read at the token that ends a step (the line break behind it; behind the last step the end of the turn). A mean
    over steps, not over answers. arXiv 2305.20050, 2402.03300 section 4.1.3.
    """

    reads = "Stepped"
    rows = frozenset({"Steps"})

    def units(self, batch: "Stepped") -> dict[str, int]:
        return {"step": batch.seqs.trained}

    def loss(self, policy: "ScalarLM", batch: "Stepped") -> Loss:
        scores = policy.step_scores(batch.seqs)
        right = batch.right.to(scores.dtype)
        told = agreement(scores.detach(), right)
        return Loss({"step": losses.labelled(scores, right).sum()}, {"accuracy": (told.sum(), len(scores))})
