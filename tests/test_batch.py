import torch

from posttrain.batch import Rollouts, Sequences


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
