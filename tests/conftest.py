"""What holds in every test."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """As under `make test`: two test processes share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def isolated():
    """A sandbox that isolates. Skips by name where the machine has none, unless that is forbidden, as it is in CI."""
    from posttrain.errors import RecipeError
    from posttrain.tasks.sandbox import Bubblewrap

    sandbox = Bubblewrap(seconds=5)
    try:
        sandbox.check()
    except RecipeError as error:
        if os.environ.get("POSTTRAIN_NEEDS_SANDBOX"):
            raise
        pytest.skip(f"bubblewrap: {error}")
    return sandbox
