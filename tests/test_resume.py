"""Crash and resume: whatever ends a run, the same command goes on, and ends bit for bit where the unbroken run ends."""

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    COMPARED,
    DATA,
    OBJECTIVES,
    OTHERS,
    REUSED,
    ROLLOUT,
    STEPS,
    TASK,
    TUNERS,
    WHOLE_PPO,
    Nursery,
    checkpoints,
    marks,
    parsed,
    settings,
    stage_folder,
    text,
    train,
)

from posttrain.errors import InputError
from posttrain.objectives import Objective
from posttrain.pipeline.run import Listener, locked, plan, run
from posttrain.pipeline.stage import Interrupted
from posttrain.training.record import Lines
from posttrain.tuners import Tuner

NLL = {"data": DATA, "best": "nll", "every": 1}
OTHER = {"sources": {"kind": "inline", "items": [{"prompt": "What is 9 + 9?", "completion": "Nobody here knows that now."}]}}
WORSE = {"validation": {"data": OTHER, "best": "nll", "every": 1, "patience": 2}, "optim": {"learning_rate": 0.03, "warmup": 0.0}}
TWO = {"samples": 2, "greedy": False, "sampling": {"max_tokens": 6}}
SAMPLED = {"task": TASK, "best": "score", "every": 2, "evaluation": TWO}
CACHED = {"reference": {"cache": True}}
REFILLED = {"objective": "dapo", "rollout": {**REUSED["rollout"], "refill": 3, "curriculum": {}}}
PLAYED = {"task": {"kind": "guess_number", "limit": 8}, "rollout": {**ROLLOUT, "sampling": {"max_tokens": 12}}}
FOLLOWED = {"reference": {"refresh": {"every": 2, "mix": 0.6}}}
EVERY: dict[str, tuple[str, str, dict[str, Any]]] = {  # stopped after every one of their steps
    **{f"{objective}-{tuner}": (objective, tuner, {}) for objective in OBJECTIVES for tuner in TUNERS},
    **{f"grpo-reused-{tuner}": ("grpo", tuner, REUSED) for tuner in TUNERS},
    "sft-patience": ("sft", "full", WORSE),
    "grpo-validated": ("grpo", "lora", {"validation": SAMPLED}),
}
TWICE: dict[str, tuple[str, str, dict[str, Any]]] = {  # after two of them
    **{f"dpo-cached-{tuner}": ("dpo", tuner, CACHED) for tuner in TUNERS},
    **{f"dpo-followed-{tuner}": ("dpo", tuner, FOLLOWED) for tuner in TUNERS},
    **{f"ppo-whole-{tuner}": ("ppo", tuner, WHOLE_PPO) for tuner in TUNERS},
    "dapo-refilled-lora": ("grpo", "lora", REFILLED),
    "grpo-played-full": ("grpo", "full", PLAYED),
}
ONCE: dict[str, tuple[str, str, dict[str, Any]]] = {  # after one
    **{f"bradley_terry-{tuner}": ("bradley_terry", tuner, {}) for tuner in TUNERS},
    **{
        f"{objective}-{tuner}": (objective, "full", {"tuner": OTHERS[tuner]})
        for objective, tuner in zip(cycle(("sft", "grpo", "dpo")), OTHERS, strict=False)
    },
    "dpo-full": ("dpo", "full", {}),
    "kto-lora": ("kto", "lora", {}),
    "bco-full": ("bco", "full", {}),
    "bco-cached-lora": ("bco", "lora", CACHED),
    "ranking_reward-full": ("ranking_reward", "full", {}),
    "process_reward-lora": ("process_reward", "lora", {}),
    "match_logits-lora": ("match_logits", "lora", {}),
    "ppo-shared-lora": ("ppo", "lora", {}),
    "classify-lora": ("classify", "lora", {}),
}
CASES = {**EVERY, **TWICE, **ONCE}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


def test_every_type_of_batch_every_controller_and_every_tuner_is_resumed_here() -> None:
    """And every objective in test_properties.py, whose updates come from a fixed batch."""
    here = {objective for objective, _, _ in CASES.values()}
    assert here == set(OBJECTIVES | COMPARED)
    kinds = {kind: cls for kind, cls in Objective.kinds.items() if ":" not in kind}
    assert {cls.reads for cls in kinds.values()} == {kinds[kind].reads for kind in here}
    assert {kind for kind, cls in kinds.items() if cls.model_construct().controls()} <= here
    assert {kind for kind in Tuner.kinds if ":" not in kind} == set(TUNERS | OTHERS)


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_after_any_step_ends_where_the_unbroken_run_ends(case: str, tmp_path: Path) -> None:
    objective, tuner, changes = CASES[case]
    recipe = text(objective, tuner, **changes)
    unbroken = train(recipe, tmp_path / "unbroken")
    made = json.loads((unbroken / "done.json").read_text())["steps"]
    assert made == STEPS if "patience" not in case else 2 < made < STEPS
    expected = marks(unbroken)
    rare = text(objective, tuner, **{**changes, "checkpoint": {"every": 1000}})  # only the signal makes it save
    for step in range(1, made + 1) if case in EVERY else (2, 5) if case in TWICE else (3,):
        root, number = tmp_path / f"stopped-{step}", (signal.SIGTERM, signal.SIGINT)[step % 2]
        with pytest.raises(Interrupted) as stopped:
            train(rare, root, {step: number})
        assert stopped.value.signal == number.name
        assert [name for name in checkpoints(root) if "step" in name] == [f"step-{step:08d}"]
        assert not (stage_folder(root) / "done.json").exists()
        assert [each.action for each in plan(parsed(rare), root)] == ["resume"]
        assert marks(train(rare, root)) == expected, f"stopped after step {step}"


@pytest.mark.parametrize("case", ["sft-full", "grpo-reused-lora", "sft-patience"])
def test_a_run_stopped_after_every_single_step_ends_where_the_unbroken_run_ends(case: str, tmp_path: Path) -> None:
    objective, tuner, changes = CASES[case]
    recipe = text(objective, tuner, **changes)
    expected = marks(train(recipe, tmp_path / "unbroken"))
    made = len((stage_folder(tmp_path / "unbroken") / "metrics.jsonl").read_text().splitlines())
    for step in range(1, made + 1):
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "often", {step: signal.SIGTERM})
    assert marks(train(recipe, tmp_path / "often")) == expected


def test_the_handlers_of_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted):
        train(text(), tmp_path, {1: signal.SIGINT})
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_killed_while_it_wrote_its_model_writes_it_again(tmp_path: Path) -> None:
    folder = train(text(tuner="lora"), tmp_path)
    expected = marks(folder)
    (folder / "done.json").unlink()
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "adapter" / "adapter_config.json").unlink()
    assert marks(train(text(tuner="lora"), tmp_path)) == expected


def test_lines_written_after_the_last_checkpoint_are_taken_back_also_a_half_one(tmp_path: Path) -> None:
    rare = text("grpo", checkpoint={"every": 1000})
    expected = marks(train(rare, tmp_path / "unbroken"))
    with pytest.raises(Interrupted):
        train(rare, tmp_path / "cut", {2: signal.SIGTERM})
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (stage_folder(tmp_path / "cut") / name).open("ab") as stream:
            stream.write(b'{"step": 3, "nll": 1.0}\n{"step": 4, "text": "\xe2\x82')  # a kill within a letter of three bytes
    assert marks(train(rare, tmp_path / "cut")) == expected


def test_a_sample_with_a_line_separator_in_it_stays_one_line(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "samples.jsonl")
    for step, letter in enumerate(["\u2028", "\x85", "\u2029", "plain"], 1):
        lines.add({"step": step, "text": f"a{letter}b"})
    before = lines.path.read_bytes()
    lines.cut_after(4)
    assert lines.path.read_bytes() == before


def test_patience_that_ends_on_the_step_of_a_signal_ends_the_run_all_the_same(tmp_path: Path) -> None:
    unbroken = train(text(**WORSE), tmp_path / "unbroken")
    made = json.loads((unbroken / "done.json").read_text())["steps"]
    with pytest.raises(Interrupted):
        train(text(**WORSE), tmp_path / "stopped", {made: signal.SIGTERM})
    resumed = json.loads((train(text(**WORSE), tmp_path / "stopped") / "done.json").read_text())
    assert resumed["steps"] == made
    assert "has not improved" in resumed["stopped"]


def test_the_best_weights_and_not_the_last_are_what_a_resumed_run_exports(tmp_path: Path) -> None:
    """The best validation, step 2, comes before the stop and is no checkpoint of a step: its weights come back from disk."""
    recipe = text(**WORSE, checkpoint={"every": 1000})
    with pytest.raises(Interrupted):
        train(recipe, tmp_path, {3: signal.SIGTERM})
    folder = train(recipe, tmp_path)
    record = json.loads((folder / "done.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {row["step"]: row["validation"]["nll"] for row in rows}
    best = min(values, key=lambda step: values[step])
    assert record["best"] == {"step": best, "value": values[best]}
    assert best < record["steps"]
    exported = load_file(folder / "model" / "model.safetensors")
    kept = load_file(folder / "checkpoints" / f"best-{best:08d}" / "weights.safetensors")
    last = load_file(folder / "checkpoints" / f"step-{record['steps']:08d}" / "weights.safetensors")
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    assert not any(torch.equal(exported[name], last[name]) for name in kept)


# ---- one run, one folder


def test_a_second_run_in_the_same_folder_is_refused_and_told_who_works_there(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with locked(tmp_path / "tiny"), pytest.raises(InputError, match=rf"another run is working here \(process {os.getpid()}\)"):
        train(text(), tmp_path)
    assert not [each for each in (tmp_path / "tiny").iterdir() if each.is_dir()], "a refused run leaves nothing"
    assert json.loads((train(text(), tmp_path) / "done.json").read_text())["steps"] == STEPS


def test_the_lock_of_a_killed_run_is_taken_over(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.run(text(), tmp_path, kill=(2, 0.0))["status"] == -signal.SIGKILL
    assert (tmp_path / "tiny" / ".lock").read_text().isdigit()
    assert nursery.run(text(), tmp_path)["status"] == 0


def test_a_finished_run_is_reused_and_its_files_are_not_touched(tmp_path: Path) -> None:
    folder = train(text(), tmp_path)
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert [each.action for each in plan(parsed(text()), tmp_path)] == ["reuse"]
    train(text(), tmp_path)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == times


# ---- killed from outside


@pytest.mark.parametrize(
    ("case", "kills"),
    [("grpo-reused-lora", 6), *(pytest.param(case, 20, marks=pytest.mark.slow) for case in ("sft-full", "grpo-reused-lora"))],
)
def test_kills_at_random_moments_change_nothing(case: str, kills: int, nursery: Nursery, tmp_path: Path) -> None:
    """Some while it loads, most while it trains and saves; each run begins where the last checkpoint is."""
    objective, tuner, changes = CASES[case]
    recipe = text(objective, tuner, **{**changes, "steps": 6 * kills, "checkpoint": {"every": 2}})
    assert nursery.run(recipe, tmp_path / "unbroken")["status"] == 0
    draw, reached, repeated = random.Random(case), 0, 0
    for _ in range(kills):
        steps = draw.choice((0, 3, 4, 5))  # 0: while it loads; else past its first new checkpoint
        ended = nursery.run(recipe, tmp_path / "killed", kill=(steps, draw.random() * (0.03 if steps else 0.3)))
        assert ended["status"] == -signal.SIGKILL, "the run is too short for so many kills"
        if ended["steps"]:
            repeated = max(repeated, reached - ended["steps"][0] + 1)
            reached = max(ended["steps"])
    assert reached > kills, "the kills must not all come before the first checkpoint"
    assert repeated <= 2, "a kill costs at most one interval between checkpoints"
    assert nursery.run(recipe, tmp_path / "killed")["status"] == 0
    assert marks(stage_folder(tmp_path / "killed")) == marks(stage_folder(tmp_path / "unbroken"))
    assert not list(tmp_path.glob("killed/**/*.tmp-*")), "nothing half-written is left"


@pytest.mark.parametrize("case", ["dpo-cached-full", "bradley_terry-lora", "ppo-whole-lora", "dapo-refilled-lora"])
def test_a_killed_run_goes_on_from_its_last_checkpoint(case: str, nursery: Nursery, tmp_path: Path) -> None:
    """With pairs, scores, and samples that wait: the kill comes one step after a save."""
    objective, tuner, changes = CASES[case]
    recipe = text(objective, tuner, **{**changes, "checkpoint": {"every": 3}})
    assert nursery.run(recipe, tmp_path / "unbroken")["status"] == 0
    killed = nursery.run(recipe, tmp_path / "killed", signals={"4": [int(signal.SIGKILL)]})
    assert (killed["status"], killed["steps"]) == (-signal.SIGKILL, [1, 2, 3, 4])
    assert nursery.run(recipe, tmp_path / "killed")["steps"] == [4, 5, 6]
    assert marks(stage_folder(tmp_path / "killed")) == marks(stage_folder(tmp_path / "unbroken"))


def test_a_second_signal_ends_the_run_at_once_and_it_can_be_resumed(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.run(text(), tmp_path / "unbroken")["status"] == 0
    twice = {"signals": {"3": [int(signal.SIGTERM)] * 2}}
    assert nursery.run(text(), tmp_path / "ended", **twice) == {"status": -signal.SIGTERM, "steps": [1, 2, 3], "error": None}
    assert nursery.run(text(), tmp_path / "ended") == {"status": 0, "steps": [3, 4, 5, 6], "error": None}
    assert marks(stage_folder(tmp_path / "ended")) == marks(stage_folder(tmp_path / "unbroken"))


# ---- a fault at every write, fsync and rename of every save

SHORT = {"steps": 2, "validation": {**NLL, "every": 2}}  # saves: step 1; best 2 and step 2
POINTS = [("write", 13), ("fsync", 13), ("rename", 3)]
FILES = ["weights", "optimizer", "waiting", "state", "manifest", "weights", "state", "manifest"]


def fault_points() -> list[tuple[str, int]]:
    return [(call, number) for call, count in POINTS for number in range(1, count + 1)]


@pytest.fixture(scope="module")
def short(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    recipe, root = text(**SHORT), tmp_path_factory.mktemp("short")
    for call, count in POINTS:  # the lists above are whole: one more point is never reached
        assert nursery.run(recipe, root, fault=f"{call}:{count + 1}:kill")["status"] == 0
        expected = marks(stage_folder(root))
        shutil.rmtree(root / "tiny")
    return recipe, expected


@pytest.mark.parametrize(("call", "number"), fault_points())
def test_a_kill_at_any_point_of_a_save_changes_nothing(
    call: str, number: int, nursery: Nursery, short: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    recipe, expected = short
    assert nursery.run(recipe, tmp_path, fault=f"{call}:{number}:kill")["status"] == -signal.SIGKILL
    whole = [name for name in checkpoints(tmp_path) if "tmp" not in name]
    second = number > (1 if call == "rename" else 5)
    assert ("step-00000001" in whole) == second, "what was whole before the save is whole after the kill"
    resumed = nursery.run(recipe, tmp_path)
    assert (resumed["status"], resumed["steps"]) == (0, [2] if second else [1, 2])
    assert marks(stage_folder(tmp_path)) == expected
    assert not list(tmp_path.glob("**/*.tmp-*"))


@pytest.mark.parametrize(("call", "number"), fault_points())
def test_a_full_disk_at_any_point_of_a_save_ends_the_run_plainly_and_loses_nothing(
    call: str, number: int, nursery: Nursery, short: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    recipe, expected = short
    ended = nursery.run(recipe, tmp_path, fault=f"{call}:{number}:ENOSPC")
    first = number <= (1 if call == "rename" else 5)
    file = "checkpoints" if call == "rename" else (FILES * 2)[number - 1 if number <= 5 else (number - 6 + 5) % 8]
    assert ended["status"] == 3
    assert "No space left on device while writing" in ended["error"]
    assert file in ended["error"].partition(";")[0]
    assert ("no checkpoint was lost" if first else "step-00000001 is whole") in ended["error"]
    assert "run the same command again" in ended["error"]
    assert not list(tmp_path.glob("**/*.tmp-*")), "nothing half-written remains"
    resumed = nursery.run(recipe, tmp_path)
    assert (resumed["status"], resumed["steps"]) == (0, [1, 2] if first else [2])
    assert marks(stage_folder(tmp_path)) == expected


@pytest.mark.parametrize("what", ["EDQUOT", "EIO", "EROFS", "EMFILE"])
def test_other_errors_of_the_disk_are_told_alike(what: str, nursery: Nursery, tmp_path: Path) -> None:
    ended = nursery.run(text(), tmp_path, fault=f"fsync:7:{what}")
    assert (ended["status"], ended["steps"]) == (3, [1, 2])
    assert ended["error"].startswith(f"{os.strerror(getattr(errno, what))} while writing ")
    assert "optimizer.safetensors; step-00000001 is whole" in ended["error"]
    assert nursery.run(text(), tmp_path)["steps"] == [2, 3, 4, 5, 6]


def test_a_pipeline_goes_on_in_the_stage_that_was_stopped(tmp_path: Path) -> None:
    """Stage two starts from stage one's model; only the stopped stage goes on, the finished one is reused."""
    second = {**settings("grpo"), "model": {"stage": "first"}}
    recipe = parsed(json.dumps({"stages": {"first": settings(), "second": second}}))
    expected = {name: marks(folder) for name, folder in run(recipe, tmp_path / "unbroken").folders.items()}

    def stop(training: Any, _metrics: dict[str, float]) -> None:
        if training.updates.state()[0].get("rollout") and training.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "stopped", Listener(show=stop))
    assert [each.action for each in plan(recipe, tmp_path / "stopped")] == ["reuse", "resume"]
    assert {name: marks(folder) for name, folder in run(recipe, tmp_path / "stopped").folders.items()} == expected


def test_what_a_kill_left_half_written_beside_a_file_of_lines_goes_when_it_is_cut_again(tmp_path):
    from posttrain.training.record import Lines

    lines = Lines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        lines.add({"step": step})
    (tmp_path / "metrics.jsonl.tmp-1").write_text("half")
    lines.cut_after(2)
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
