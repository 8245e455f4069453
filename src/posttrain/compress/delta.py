"""What a delta takes and what it loses: exact bytes, what remains of the difference, the distance between predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from posttrain.batch import Sequences
from posttrain.compress.distance import apart
from posttrain.evaluation import Figure
from posttrain.evaluation.intervals import ratio
from posttrain.losses import sequence_sums
from posttrain.models.delta import Delta, Signs, difference, parameters, switched
from posttrain.models.head import over_rows, vocabulary_of
from posttrain.models.layout import micro_batches
from posttrain.models.linears import below_head, matrix_of
from posttrain.models.lm import LM

HALF, SCALE = 2, 4  # bytes of a number in 16 bits, and of a scale


@dataclass(frozen=True)
class Sizes:
    """Bytes of a fine-tuned model in 16 bits, and of its delta: of the blocks' matrices, and of all. A tied head counts once."""

    matrices: int
    matrices_delta: int
    whole: int
    whole_delta: int

    @property
    def matrices_ratio(self) -> float:
        return self.matrices / self.matrices_delta

    @property
    def ratio(self) -> float:
        return self.whole / self.whole_delta

    def as_dict(self) -> dict[str, float]:
        return {
            "matrices_bytes": self.matrices, "matrices_delta_bytes": self.matrices_delta, "matrices_ratio": self.matrices_ratio,
            "bytes": self.whole, "delta_bytes": self.whole_delta, "ratio": self.ratio,
        }  # fmt: skip


def sizes(model: PreTrainedModel, delta: Delta) -> Sizes:
    """Of a delta as it is stored; model: its base, or the model that was fine-tuned from that."""
    stored = sum(each.numel() * each.element_size() for part in delta.parts.values() for each in part.tensors().values())
    whole = sum(each.numel() * each.element_size() for each in delta.whole.values())
    return Sizes(_in_matrices(model), stored, _in_all(model), stored + whole)


def sizes_of(config: Any) -> Sizes:
    """Of signs for a model of this configuration, if everything outside of the matrices differs; no weight is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = 0
    for layer in below_head(model).values():
        outputs, words = Signs.shapes(*matrix_of(layer).shape)["signs"]
        stored += 4 * outputs * words + SCALE
    return Sizes(_in_matrices(model), stored, _in_all(model), stored + _in_all(model) - _in_matrices(model))


def _in_matrices(model: PreTrainedModel) -> int:
    return HALF * sum(int(matrix_of(layer).numel()) for layer in below_head(model).values())


def _in_all(model: PreTrainedModel) -> int:
    return HALF * sum(each.numel() for each in parameters(model).values())


def remaining(base: PreTrainedModel, fine: PreTrainedModel, delta: Delta) -> dict[str, float | None]:
    """{matrix: ||difference - delta||^2 / ||difference||^2}. For signs 0.363 where differences are normal (1 - 2 / pi), 0.5 where
    they follow Laplace's distribution, 0.25 where they are uniform. None where there is no difference."""
    layers, made, found = below_head(base), below_head(fine), dict[str, float | None]()
    with torch.no_grad():
        for path, part in delta.parts.items():
            gap = difference(layers[path], made[path])
            size = float(gap.square().sum(dtype=torch.float64))
            left = float((gap - part.dense()).square().sum(dtype=torch.float64))
            found[path] = left / size if size else None
    return found


@dataclass(frozen=True)
class Distance:
    """From the fine-tuned model, a token: KL(fine-tuned || it) in nats, and the mean squared difference of their logits."""

    kl: Figure
    logit_gap: Figure


def distances(
    lm: LM, fine: LM, names: Sequence[str | None], seqs: Sequences, micro_tokens: int = 4096
) -> dict[str | None, Distance]:
    """{name: the distance of the base under the delta of that name}; None: of the base itself. Intervals are over sequences."""
    found = {name: torch.zeros(seqs.trained, 2, dtype=torch.float64) for name in names}

    def gaps(rows: Tensor, theirs: Tensor) -> Tensor:
        return apart(lm.project(rows), fine.project(theirs))

    with torch.no_grad():
        for rows in micro_batches(seqs, micro_tokens):
            part, places = seqs.select(rows), seqs.trained_tokens(rows)
            theirs = fine.hidden(part)
            for name in names:
                with switched(lm.model, name):
                    found[name][places] = over_rows(gaps, vocabulary_of(lm.head), lm.hidden(part), theirs).double().cpu()
    counts = seqs.trained_lengths.tolist()

    def figure(values: Tensor) -> Figure:
        return ratio(sequence_sums(values, seqs.owner, seqs.count).tolist(), counts)

    return {name: Distance(*(figure(column) for column in values.unbind(1))) for name, values in found.items()}
