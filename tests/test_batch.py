import json
from dataclasses import replace

import pytest
import torch
from example_batches import EXAMPLES
from tiny_fits import built_for

from posttrain.batch import Batch, Labelled, Pairs, Ranked, Rollouts, Sequences, Stepped, flattened, rebuilt
from posttrain.text import RenderedRow


def test_selecting_rows_keeps_their_tokens_marks_and_owners():
    seqs = Sequences.of([([1, 2, 3], [False, True, True]), ([4], [False]), ([5, 6], [False, True])])
    assert seqs.owner.tolist() == [0, 0, 2]
    assert seqs.trained_lengths.tolist() == [2, 0, 1]
    part = seqs.select([2, 0])
    assert part.rows() == [[1, 2, 3], [5, 6]]
    assert part.owner.tolist() == [0, 0, 1]


def test_a_rollouts_credit_goes_with_its_rows():
    seqs = Sequences.of([([1, 2], [False, True]), ([3, 4, 5], [False, True, True])])
    rollouts = Rollouts(seqs, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 8]))
    part = rollouts.select([1])
    assert part.advantage.tolist() == [2.0, 3.0]
    assert part.version.tolist() == [8]


# ---- every type of batch

BATCHES = list({each.batch: each for each in EXAMPLES}.values())
types = pytest.mark.parametrize("example", BATCHES, ids=lambda example: example.batch.__name__)


def contents(batch):
    """Every value of a batch that can be compared, by dotted name."""
    plain, tensors = flattened(batch)
    return plain, {name: value.tolist() for name, value in tensors.items()}


@types
def test_what_is_saved_of_a_batch_makes_it_whole_again(example):
    batch = example.batch(built_for(example, "llama", "float32", "full"))
    plain, tensors = flattened(batch)
    again = rebuilt(type(batch).__name__, json.loads(json.dumps(plain)), tensors)
    assert type(again) is type(batch)
    assert contents(again) == contents(batch)


@types
def test_selected_rows_are_those_of_the_whole_whatever_the_type(example):
    batch = example.batch(built_for(example, "llama", "float32", "full"))
    assert isinstance(batch, Batch)
    assert len(batch.row_tokens) == batch.count == 8
    part = batch.select([6, 2, 3])
    assert part.count == 3
    assert part.row_tokens == [batch.row_tokens[row] for row in (2, 3, 6)]
    assert contents(part.select([1])) == contents(batch.select([3]))
    assert contents(batch.select(range(8))) == contents(batch)
    assert contents(batch.to("cpu")) == contents(batch)
    assert sum(batch.select([row]).sequences[0].trained for row in range(8)) == batch.sequences[0].trained


def row(*answers, numbers=()):
    return RenderedRow(tuple(([1, 2, *answer], [False, False] + [True] * len(answer)) for answer in answers), numbers)


def test_rendered_rows_become_batches_with_their_numbers():
    pairs = Pairs.from_rows([row([3], [4, 5], numbers=(0.75, 2.0)), row([6, 7], [8], numbers=(1.0, 0.0))])
    assert (pairs.chosen.rows(), pairs.rejected.rows()) == ([[1, 2, 3], [1, 2, 6, 7]], [[1, 2, 4, 5], [1, 2, 8]])
    assert (pairs.prefer.tolist(), pairs.margin.tolist(), pairs.refs) == ([0.75, 1.0], [2.0, 0.0], ())
    labelled = Labelled.from_rows([row([3], numbers=(1.0,)), row([4], numbers=(0.0,))])
    assert (labelled.good.tolist(), labelled.ref, labelled.point) == ([True, False], None, None)
    ranked = Ranked.from_rows([row([3], [4], [5], numbers=(2.0, 0.5, 1.0)), row([6], numbers=(3.0,))])
    assert (ranked.sizes.tolist(), ranked.group.tolist(), ranked.score.tolist()) == ([3, 1], [0, 0, 0, 1], [2.0, 0.5, 1.0, 3.0])
    assert [len(each) for each in ranked.row_tokens] == [3, 1]
    stepped = Stepped.from_rows([row([3, 4], numbers=(1.0, 0.0)), row([5], numbers=(0.5,))])
    assert stepped.right.tolist() == [1.0, 0.0, 0.5]
    assert Sequences.from_rows([row([3])]).rows() == [[1, 2, 3]]


def test_what_a_reference_said_goes_with_its_rows_through_selection_and_back():
    pairs = Pairs.from_rows([row([3], [4], numbers=(1.0, 0.0)), row([5], [6], numbers=(1.0, 0.0))])
    known = pairs.with_refs(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0]))
    assert [each.tolist() for each in known.select([1]).refs] == [[-2.0], [-4.0]]
    weighted = replace(known, weight=torch.tensor([0.5, 1.0]), theirs=torch.tensor([True, False]))
    assert weighted.select([0]).weight.tolist() == [0.5]
    assert weighted.select([1]).theirs.tolist() == [False]
    labelled = Labelled.from_rows([row([3], numbers=(1.0,)), row([4], numbers=(0.0,))]).with_refs(torch.tensor([-1.0, -2.0]))
    assert replace(labelled, point=torch.tensor([0.1, 0.2])).select([1]).refs[0].tolist() == [-2.0]


def test_several_sequences_are_joined_in_order():
    one, other = Sequences.of([([1, 2], [False, True]), ([3], [False])]), Sequences.of([([4, 5, 6], [False, False, True])])
    both = Sequences.joined([one, other])
    assert both.rows() == [[1, 2], [3], [4, 5, 6]]
    assert both.owner.tolist() == [0, 2]
