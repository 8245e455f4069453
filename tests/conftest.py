"""What holds in every test."""

import os
import random
import zlib

import numpy
import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What a test draws without a seed of its own is the same whichever tests ran before it, in whichever process."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


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
    from posttrain.sandbox import Bubblewrap

    sandbox = Bubblewrap(seconds=5)
    try:
        sandbox.check()
    except RecipeError as error:
        if os.environ.get("POSTTRAIN_NEEDS_SANDBOX"):
            raise
        pytest.skip(f"bubblewrap: {error}")
    return sandbox


# Grids of which `make test` takes every second to eighth case, by a hash of its name; `make test-all` takes them whole.
GRIDS = {
    "test_mutants.py::test_a_breakage_makes_its_named_test_fail": 8,
    "test_resume.py::test_a_run_stopped_after_any_step_ends_where_the_unbroken_run_ends": 4,
    "test_resume.py::test_a_kill_at_any_point_of_a_save_changes_nothing": 2,
    "test_resume.py::test_a_full_disk_at_any_point_of_a_save_ends_the_run_plainly_and_loses_nothing": 2,
    "test_properties.py::test_splitting_a_batch_does_not_change_the_gradient_or_the_figures": 7,
    "test_properties.py::test_two_updates_a_resume_and_two_more_are_four_updates_bit_for_bit": 6,
    "test_properties.py::test_the_order_of_the_rows_does_not_matter": 6,
    "test_properties.py::test_a_batch_of_no_rows_at_all_gives_a_zero_that_back_propagates_too": 5,
    "test_properties.py::test_the_gradient_is_the_finite_difference_of_the_loss": 3,
    "test_properties.py::test_in_the_first_update_every_ratio_is_one_and_nothing_is_clipped": 2,
    "test_properties.py::test_a_batch_with_nothing_to_train_gives_a_loss_without_gradient_that_back_propagates": 3,
    "test_properties.py::test_frozen_means_frozen_and_the_optimizer_holds_nothing_else": 3,
    "test_preference_objectives.py::test_at_the_start_every_margin_is_zero_and_the_loss_is_its_closed_form": 3,
    "test_sampling.py::test_a_prompt_that_is_kept_once_for_all_its_rows_gives_what_copies_of_it_give": 2,
    "test_tuned_stages.py::test_a_stage_goes_on_from_an_adapter_and_leaves_one_on_top_of_it": 3,
    "test_tuned_stages.py::test_a_stage_leaves_the_model_that_it_trained": 3,
    "test_online.py::test_pairs_that_wait_are_taken_up_again_bit_for_bit": 2,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        every = GRIDS.get(f"{item.path.name}::{item.originalname}", 1)
        if zlib.crc32(item.callspec.id.encode() if every > 1 else b"") % every:
            item.add_marker(pytest.mark.slow)
