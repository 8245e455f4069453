"""How far a model is from what it was, on rows of text."""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Sequences
from posttrain.evaluation import Figure
from posttrain.evaluation.intervals import ratio
from posttrain.losses import logit_gap, sequence_sums, vocabulary_kl
from posttrain.models.head import over_rows, vocabulary_of
from posttrain.models.layout import micro_batches
from posttrain.models.lm import LM, targets

NAMES = ("kl", "logit_gap", "nll", "nll_before")


def apart(ours: Float[Tensor, "n V"], theirs: Float[Tensor, "n W"]) -> Float[Tensor, "n 2"]:
    """KL(theirs || ours) in nats and the mean squared difference, of two models' logits at the same tokens; float64, since those
    of 8 bits are small. Where one has a longer table, the rest of it is left out."""
    both = min(ours.shape[1], theirs.shape[1])
    ours, theirs = ours[:, :both].double(), theirs[:, :both].double().to(ours.device)
    return torch.stack([vocabulary_kl(theirs, ours), logit_gap(ours, theirs)], 1)


def distance(before: LM, after: LM, seqs: Sequences, micro_tokens: int = 4096) -> dict[str, Figure]:
    """Per trained token, with intervals over rows: `kl`, KL(before || after) in nats; `logit_gap`, the mean squared difference of
    the logits; `nll` after, and `nll_before`."""

    def gaps(new: Tensor, old: Tensor, wanted: Tensor) -> Tensor:
        ours, theirs = after.project(new).double(), before.project(old).double().to(new.device)
        nll = [-each.log_softmax(-1).gather(1, wanted[:, None])[:, 0] for each in (ours, theirs)]
        return torch.cat([apart(ours, theirs), torch.stack(nll, 1)], 1)

    found = torch.zeros(seqs.trained, len(NAMES), dtype=torch.float64)
    with torch.no_grad():
        for rows in micro_batches(seqs, micro_tokens):
            part = seqs.select(rows)
            new, old = after.hidden(part), before.hidden(part)
            values = over_rows(gaps, vocabulary_of(after.head), new, old, targets(part, new))
            found[seqs.trained_tokens(rows)] = values.cpu()
    sums = (sequence_sums(each, seqs.owner, seqs.count).tolist() for each in found.unbind(1))
    counts = seqs.trained_lengths.tolist()
    return {name: ratio(each, counts) for name, each in zip(NAMES, sums, strict=True)}
