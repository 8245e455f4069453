"""Sampling in a process of its own: what it draws with, that nothing is lost or taken twice, and what ends it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest
import safetensors.torch
import tiny_runs
import torch
from pydantic import ValidationError
from tiny_runs import checkpoints, marks, parsed, text, train

from posttrain.errors import RecipeError, RunError
from posttrain.pipeline.run import Listener, run
from posttrain.pipeline.stage import Interrupted
from posttrain.rl.behind import Behind, serve
from posttrain.training.settings import TrainSettings

ONE_BEHIND = {"sampler": {"kind": "process", "threads": 1}, "checkpoint": {"every": 1}}


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def asked(folder):
    """The problems of each rollout, in the order in which it drew them."""
    found = {}
    for each in rows(folder, "samples.jsonl"):
        found.setdefault(each["step"], []).append(each["id"])
    return [list(dict.fromkeys(ids)) for ids in found.values()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(text("grpo", "lora", **ONE_BEHIND), tmp_path_factory.mktemp("behind"))


def samplers(parent=None):
    """The processes that sample for this one, or for another."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    found = [line.split(None, 2) for line in listed.splitlines() if "posttrain.training.apart" in line]
    return [int(pid) for pid, ppid, _ in found if int(ppid) == (parent or os.getpid())]


def test_each_rollout_but_the_first_is_drawn_with_the_weights_of_one_rollout_ago(unbroken):
    stale = [row.get("stale", 0.0) for row in rows(unbroken)]
    assert stale == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # one update a rollout
    ratios = [row["ratio"] for row in rows(unbroken)]
    assert abs(ratios[0] - 1) < 1e-4  # drawn with the very weights
    assert max(abs(ratio - 1) for ratio in ratios[1:]) > 1e-3  # drawn with others, and known to be
    assert samplers() == []


def test_the_same_problems_are_drawn_as_in_one_process_and_the_first_answers_too(unbroken, tmp_path):
    alone = train(text("grpo", "lora", checkpoint={"every": 1}), tmp_path)
    assert asked(unbroken) == asked(alone)
    first = [[row for row in rows(folder, "samples.jsonl") if row["step"] == 1] for folder in (unbroken, alone)]
    assert [row["text"] for row in first[0]] == [row["text"] for row in first[1]]


@pytest.mark.slow
def test_a_run_repeats_bit_for_bit_whoever_was_faster(unbroken, tmp_path):
    assert marks(train(text("grpo", "lora", **ONE_BEHIND), tmp_path)) == marks(unbroken)


def test_two_rollouts_ahead_are_two_rollouts_old_also_under_dynamic_sampling_and_full(tmp_path):
    changes = {"objective": {"kind": "dapo", "clip_high": 0.28}, "rollout": {**tiny_runs.ROLLOUT, "refill": 2}}
    folder = train(text("grpo", "full", **changes, sampler={"kind": "process", "threads": 1, "behind": 2}), tmp_path)
    assert [row.get("stale", 0.0) for row in rows(folder)] == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert all("filled" in row for row in rows(folder))


def test_a_sampler_that_is_killed_costs_no_rollout(unbroken, tmp_path):
    said = []

    def show(training, _metrics):
        if training.step == 3:
            (sampler,) = samplers()
            os.kill(sampler, signal.SIGKILL)

    recipe = parsed(text("grpo", "lora", **ONE_BEHIND))
    folder = run(recipe, tmp_path, Listener(show=show, say=said.append)).folders["train"]
    assert len([line for line in said if "it is started anew, and no rollout is lost" in line]) == 1
    assert asked(folder) == asked(unbroken)
    assert len(rows(folder)) == tiny_runs.STEPS
    assert max(row.get("stale", 0.0) for row in rows(folder)) == 1.0


@pytest.mark.slow
def test_a_trainer_that_is_stopped_goes_on_with_the_next_rollout(unbroken, tmp_path):
    recipe = text("grpo", "lora", **ONE_BEHIND)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path, {2: signal.SIGTERM})
    assert checkpoints(tmp_path)[-1] == "step-00000002"
    assert samplers() == []
    folder = train(recipe, tmp_path)
    assert asked(folder) == asked(unbroken)
    assert [row.get("stale", 0.0) for row in rows(folder)] == [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.slow
def test_a_sampler_whose_trainer_is_killed_ends(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tiny_runs import text, train;"
        "train(text('grpo', 'lora', sampler={'kind': 'process', 'threads': 1}, steps=500), Path(sys.argv[1]))"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=path) as trainer:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("tiny/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        (sampler,) = samplers(trainer.pid)
        trainer.kill()
    while time.monotonic() < deadline:
        if not Path(f"/proc/{sampler}").exists() or "Z" in Path(f"/proc/{sampler}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the sampler is still there")


class Failing:
    """A source of rollouts that does not work."""

    def take(self, rollout, version):
        raise RunError("16 of 16 samples could not be graded") if rollout == 1 else ValueError("broken")


def test_what_goes_wrong_in_the_process_is_said_as_if_it_were_here():
    ours, theirs = Pipe()
    threading.Thread(target=serve, args=(theirs, Failing(), {}), daemon=True).start()
    for rollout, why in ((1, "16 of 16 samples could not be graded"), (2, "ValueError: broken")):
        ours.send((rollout, 0))
        ours.send_bytes(safetensors.torch.save({}))
        found = ours.recv()
        assert isinstance(found, RunError)
        assert str(found) == why
    ours.close()


class Hanging:
    """A source whose grader never answers."""

    def __init__(self):
        self.began, self.until = threading.Event(), threading.Event()

    def take(self, rollout, version):
        self.began.set()
        self.until.wait(30)


def test_who_hangs_is_ended_when_nobody_is_there_any_more():
    ours, theirs = Pipe()
    source, alone = Hanging(), threading.Event()
    threading.Thread(target=serve, args=(theirs, source, {}, alone.set), daemon=True).start()
    ours.send((1, 0))
    ours.send_bytes(safetensors.torch.save({}))
    assert source.began.wait(20)
    ours.close()
    assert alone.wait(20)
    source.until.set()


class Large:
    """A source of rollouts that do not fit into a pipe."""

    def take(self, rollout, version):
        return "x" * 2_000_000

    def state(self):
        return {}


def test_who_asks_ahead_never_waits_for_who_answers():
    ours, theirs = Pipe()
    weights = torch.nn.Parameter(torch.zeros(500_000))
    threading.Thread(target=serve, args=(theirs, Large(), {"w": weights}), daemon=True).start()
    done = threading.Event()

    def ask():
        for rollout in range(3):
            ours.send((rollout, 0))
            ours.send_bytes(safetensors.torch.save({"w": weights.detach()}))
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    assert done.wait(20), "questions wait for answers that nobody takes"
    assert [len(ours.recv()[0]) for _ in range(3)] == [2_000_000] * 3
    ours.close()


def test_a_sampler_that_never_begins_is_given_up():
    said = []
    source = Behind("posttrain.nowhere", {}, {}, 1, said.append)
    with pytest.raises(RunError, match=r"the sampler's process has ended 4 times in a row \(exit status 1\)"):
        source.take(1, 0)
    assert len(said) == 3


def test_more_rollouts_ahead_than_a_run_has_are_refused():
    settings = {"model": "posttrain:tiny-base", "objective": "grpo", "task": "arithmetic", "steps": 6, "rollout": {"minibatches": 2}}
    for behind, steps in ((3, 6), (3, 5)):
        TrainSettings.model_validate({**settings, "steps": steps, "sampler": {"kind": "process", "behind": behind}}).check()
    with pytest.raises(RecipeError, match=r"sampler.behind: 4 rollouts ahead, and the whole run has 3"):
        TrainSettings.model_validate({**settings, "sampler": {"kind": "process", "behind": 4}}).check()


def test_an_objective_that_samples_from_the_reference_is_refused():
    settings = {"model": "posttrain:tiny-base", "objective": "xpo", "task": "arithmetic", "steps": 1, "sampler": "process"}
    with pytest.raises(ValidationError, match="also samples from the reference"):
        TrainSettings.model_validate(settings)
