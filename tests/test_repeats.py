"""With several threads a gradient is the same bit for bit, too: nothing is added up in an order that depends on who was faster."""

import tiny_models
import torch

from posttrain.batch import Sequences


def test_gradients_of_states_that_several_ask_for_repeat_with_two_threads(monkeypatch):
    """The state behind a shared prompt is asked for by every answer: so many that both threads add to each of them."""
    lm = tiny_models.make("llama")
    rows = [([7 + prompt] * 40 + [2 + answer % 90], [False] * 40 + [True]) for answer in range(600) for prompt in range(16)]
    made = torch.randn(2 * len(rows), 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    monkeypatch.setattr(lm, "states", lambda tree, _plan: made[: len(tree.tokens)])
    torch.set_num_threads(2)  # put back by conftest.py
    states = lm.hidden(Sequences.of(rows))
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    first, *others = (torch.autograd.grad((states * weight).sum(), made, retain_graph=True)[0] for _ in range(8))
    assert int((first != 0).any(1).sum()) == 16
    assert all(torch.equal(first, other) for other in others)
