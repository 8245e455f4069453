"""What models say of data: scores of pairs, from a reward model or a policy; nats of texts; classes of texts."""

import torch

from posttrain.batch import Sequences
from posttrain.data.dataset import Data
from posttrain.data.render import Template
from posttrain.evaluation import Figure
from posttrain.evaluation.classes import Told
from posttrain.evaluation.intervals import ratio
from posttrain.evaluation.preferences import Judged
from posttrain.losses.aggregate import sequence_sums
from posttrain.models.load import refuse_other_tokenizer
from posttrain.models.roles import Frozen
from posttrain.models.source import ModelSource
from posttrain.text import Classes, Classified, RenderedRow
from posttrain.tuners.load import load, load_classifier, load_scalar

AT_A_TIME = 4096  # tokens


def judged_pairs(model: ModelSource, reference: ModelSource | None, beta: float, data: Data) -> tuple[list[Judged], list[str]]:
    """Each pair with its scores, and what there is to say of the data."""
    if reference is None:
        scorer = load_scalar(model)
        rows, sides, summary = _sides(data, Template(scorer.tokenizer), scorer.lm.context)
        with torch.no_grad():
            scores = [scorer.lm.scores_of_many(each, AT_A_TIME) for each in sides]
    else:
        loaded = load(model)
        refuse_other_tokenizer("reference", reference, loaded.tokenizer)
        rows, sides, summary = _sides(data, Template(loaded.tokenizer), loaded.lm.context)
        policy, other = (Frozen(lm, micro_tokens=AT_A_TIME) for lm in (loaded.lm, load(reference).lm))
        scores = [beta * (ours - theirs) for ours, theirs in zip(policy.sums(*sides), other.sums(*sides), strict=True)]
    (chosen, rejected), lengths = [each.tolist() for each in scores], [each.trained_lengths.tolist() for each in sides]
    prefer = [row.numbers[0] for row in rows]
    return [Judged(*each) for each in zip(chosen, rejected, lengths[0], lengths[1], prefer, strict=True)], summary


def text_nll(model: ModelSource, data: Data) -> tuple[Figure, list[str]]:
    """-log p per trained token, over rows; and what there is to say of the data."""
    loaded = load(model)
    rendered = data.render(data.read(), Template(loaded.tokenizer))
    rendered.refuse_beyond(loaded.lm.context)
    rows = Sequences.of(rendered.sequences)
    with torch.no_grad():
        logp = loaded.lm.logprobs_of_many(rows, AT_A_TIME).cpu()
    totals = sequence_sums(-logp.double(), rows.owner, rows.count).tolist()
    return ratio(totals, rows.trained_lengths.tolist()), rendered.summary()


def told_apart(model: ModelSource, data: Data) -> tuple[Classes, list[Classified], list[Told], list[str]]:
    """What a classifier tells apart, the texts that can be used, what it says of each, and what there is to say of the data.

    Raises DataError for a label that it does not know.
    """
    loaded = load_classifier(model)
    classes, parsed = loaded.classes, data.read()
    rendered = data.render(parsed, Template(loaded.tokenizer, parsed.needs_chat))
    rendered.refuse_beyond(loaded.lm.context)
    known = [{row.where: row for row in rows if isinstance(row, Classified)} for rows in parsed.rows]  # places are a source's own
    rows = [found[where] for found, places in zip(known, rendered.places, strict=True) for where in places]
    targets = [classes.numbers(row.label, row.where) for row in rows]
    with torch.no_grad():
        logits = loaded.lm.logits_of_many(Sequences.of(rendered.sequences), AT_A_TIME).double().tolist()
    told = [Told(target, tuple(each)) for target, each in zip(targets, logits, strict=True)]
    return classes, rows, told, rendered.summary()


def _sides(data: Data, template: Template, context: int | None) -> tuple[list[RenderedRow], list[Sequences], list[str]]:
    rendered = data.render(data.read(), template)
    rendered.refuse_beyond(context)
    rows = [row for source in rendered.rows for row in source]
    return rows, [Sequences.of([row.sequences[side] for row in rows]) for side in (0, 1)], rendered.summary()
