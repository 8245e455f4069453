"""How far a model is from what it was, on rows of text."""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Sequences
from posttrain.evaluation import Figure
from posttrain.evaluation.intervals import ratio
from posttrain.losses.aggregate import sequence_sums
from posttrain.models import layout
from posttrain.models.head import rows_at_a_time, vocabulary_of
from posttrain.models.lm import LM, targets

AT_A_TIME = 4096  # tokens


def distance(before: LM, after: LM, seqs: Sequences) -> dict[str, Figure]:
    """Per trained token, with intervals over rows: `kl`, KL(before || after) in nats; `logit_mse`, the mean squared difference of
    the logits; `nll` after, and `nll_before`."""
    found = torch.empty(4, seqs.trained, dtype=torch.float64)
    with torch.no_grad():
        for rows in layout.micro_batches(seqs, AT_A_TIME):
            found[:, seqs.trained_tokens(rows)] = _of(before, after, seqs.select(rows)).cpu()
    names, sizes = ("kl", "logit_mse", "nll", "nll_before"), seqs.trained_lengths.tolist()
    return {
        name: ratio(sequence_sums(values, seqs.owner, seqs.count).tolist(), sizes)
        for name, values in zip(names, found, strict=True)
    }


def _of(before: LM, after: LM, seqs: Sequences) -> Float[Tensor, "4 N"]:
    old, new = before.hidden(seqs), after.hidden(seqs)
    wanted = targets(seqs, new)
    step = rows_at_a_time(vocabulary_of(after.head), new.device.type)
    parts = [torch.empty(4, 0, dtype=torch.float64, device=new.device)]
    for start in range(0, len(new), step):
        part = slice(start, start + step)
        theirs, ours = before.project(old[part]).to(new.device).double(), after.project(new[part]).double()  # KLs are small
        old_logp, new_logp = theirs.log_softmax(-1), ours.log_softmax(-1)
        kl = (old_logp.exp() * (old_logp - new_logp)).sum(-1)
        nll = [-each.gather(1, wanted[part, None])[:, 0] for each in (new_logp, old_logp)]
        parts.append(torch.stack([kl, (ours - theirs).square().mean(-1), *nll]).double())
    return torch.cat(parts, 1)
