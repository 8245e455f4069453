"""Preference objectives on single answers, each labelled good or bad."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat

from posttrain import losses
from posttrain.errors import DataError
from posttrain.objectives.objective import Loss, Objective
from posttrain.objectives.preference import answer_sums
from posttrain.text import Labelled as LabelledRow
from posttrain.text import RenderedRow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from posttrain.batch import Labelled, Sequences
    from posttrain.models.lm import LM
    from posttrain.models.roles import Roles
    from posttrain.text import Row


class UnpairedObjective(Objective):
    """The part that both share: the log-ratio of each answer to the reference. Of a pair, each side is an answer of its own."""

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""

    reads = "Labelled"
    rows = frozenset({"Labelled", "Preference"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference"})

    def check_rows(self, rows: "Sequence[Row]", learning: bool = True) -> None:
        labelled = [row for row in rows if isinstance(row, LabelledRow)]
        if learning and labelled and len(labelled) == len(rows) and len({row.good for row in labelled}) == 1:
            kind = "good" if labelled[0].good else "bad"
            raise DataError(
                f"{labelled[0].where}: all {len(rows):,} answers are {kind}; objective {self.kind} learns from good and bad "
                "ones: add the others, or take sft for good ones alone"
            )

    def split(self, row: "RenderedRow") -> "tuple[RenderedRow, ...]":
        if len(row.sequences) == 1:
            return (row,)
        chosen, rejected = row.sequences
        return RenderedRow((chosen,), (float(row.numbers[0] >= 0.5),)), RenderedRow((rejected,), (float(row.numbers[0] < 0.5),))

    def units(self, batch: "Labelled") -> dict[str, int]:
        return {"preference": batch.count}

    def per_answer(self, ratio: "Tensor", good: "Tensor", point: "Tensor") -> "Tensor":
        """[B]: the loss of each answer."""
        raise NotImplementedError

    def loss(self, policy: "LM", batch: "Labelled") -> Loss:
        assert batch.ref is not None
        assert batch.point is not None
        sums = answer_sums(policy.logprobs(batch.seqs), batch.seqs)
        ratio = sums - batch.ref.to(sums.dtype)
        value = self.per_answer(ratio, batch.good, batch.point.to(sums.dtype))
        seen, good = ratio.detach(), batch.good
        stats: dict[str, tuple[Tensor | float, int]] = {
            "good_ratio": (seen[good].sum(), int(good.sum())),
            "bad_ratio": (seen[~good].sum(), int((~good).sum())),
            "point": (batch.point.sum(), batch.count),
        }
        return Loss({"preference": value.sum()}, stats)

    def _with_reference(self, batch: "Labelled", roles: "Roles") -> "Labelled":
        if batch.refs:
            return batch
        assert roles.reference is not None
        return batch.with_refs(*roles.reference.sums(*batch.sequences))


class KTO(UnpairedObjective, kind="kto"):
    """weight_good (1 - s(beta (ratio - z))) for good answers, weight_bad (1 - s(beta (z - ratio))) for bad ones, s the sigmoid.

    arXiv 2402.01306. z, without gradient and never negative, estimates the KL to the reference: the mean log-ratio of answers to
    other prompts than their own, each prompt of the update with the answer of the next that differs. The update, and not a
    micro-batch, is what z is estimated from. With unequal numbers of good and bad rows, weights for which
    weight_good * good is 1 to 4/3 times weight_bad * bad are advised.
    """

    weight_good: PositiveFloat = 1.0
    """lambda_D, of good answers."""
    weight_bad: PositiveFloat = 1.0
    """lambda_U, of bad answers."""

    def annotate(self, batch: "Labelled", policy: "LM", roles: "Roles") -> "Labelled":
        """Raises DataError where all prompts of the update are the same: no answer is then another prompt's."""
        import torch

        assert roles.reference is not None
        batch = self._with_reference(batch, roles)
        crossed = mismatched(batch.seqs, policy.context)
        if crossed is None:
            raise DataError(
                "objective kto compares each prompt with another one's answer, and this update has one prompt only, or answers "
                "that fit no other prompt into the model's context; raise batch.rows"
            )
        logp = policy.logprobs_of_many(crossed, roles.micro_tokens).cpu().double()
        (ref,) = roles.reference.sums(crossed)
        gap = losses.sequence_sums(logp, crossed.owner, crossed.count) - ref.double()
        point = gap.mean().clamp(min=0).float()
        return replace(batch, point=torch.full((batch.count,), float(point)))

    def per_answer(self, ratio: "Tensor", good: "Tensor", point: "Tensor") -> "Tensor":
        return losses.kto(ratio, good, point, self.beta, self.weight_good, self.weight_bad)


def mismatched(seqs: "Sequences", context: int | None = None) -> "Sequences | None":
    """Each prompt with the answer of the next sequence whose prompt differs and whose answer fits; None where none has one."""
    from posttrain.batch import Sequences

    train, edges = seqs.train.tolist(), seqs.starts.tolist()
    parts = []
    for tokens, start, stop in zip(seqs.rows(), edges, edges[1:], strict=False):
        begin = next((place for place, mark in enumerate(train[start:stop]) if mark), len(tokens))
        parts.append((tokens[:begin], tokens[begin:], train[start + begin : stop]))
    rows = []
    for index, (prompt, _, _) in enumerate(parts):
        room = math.inf if context is None else context - len(prompt)
        others = (parts[(index + step) % len(parts)] for step in range(1, len(parts)))
        fitting = ((answer, marks) for other, answer, marks in others if other != prompt and 0 < len(answer) <= room)
        if prompt and (found := next(fitting, None)) is not None:
            answer, marks = found
            rows.append((prompt + answer, [False] * len(prompt) + marks))
    return Sequences.of(rows) if rows else None


class BCO(UnpairedObjective, kind="bco"):
    """-log s(beta ratio - shift) for good answers, -log s(shift - beta ratio) for bad ones, s the sigmoid. arXiv 2404.04656.

    shift is a running mean of the rewards beta ratio, half from good and half from bad answers. It is that of the updates
    before this one, so that it does not depend on micro-batches (TRL's contains the micro-batch itself). The paper's density
    ratio for different prompts of good and bad answers is left out.
    """

    reference_per_row = True

    decay: float = Field(default=0.9, ge=0, lt=1)
    """What of the running mean is kept at each update."""

    def controls(self) -> dict[str, float]:
        return {"bco_shift": 0.0}

    def annotate(self, batch: "Labelled", policy: "LM", roles: "Roles") -> "Labelled":
        import torch

        return replace(self._with_reference(batch, roles), point=torch.full((batch.count,), roles.controls["bco_shift"]))

    def learned(self, figures: "Mapping[str, float]", controls: dict[str, float]) -> None:
        means = [figures[name] for name in ("good_ratio", "bad_ratio") if name in figures]
        reward = self.beta * sum(means) / len(means)
        controls["bco_shift"] = self.decay * controls["bco_shift"] + (1 - self.decay) * reward

    def per_answer(self, ratio: "Tensor", good: "Tensor", point: "Tensor") -> "Tensor":
        return losses.bco(ratio, good, self.beta, point)
