"""What holds in every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """As under `make test`: two test processes share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
