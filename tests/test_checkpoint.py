"""Checkpoints: every byte is verified, what is damaged is named and never loaded, and nothing of a save is ever half there."""

import ast
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from posttrain import faults
from posttrain.errors import CheckpointError, RunError
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.fit import Learner
from posttrain.training.optim import AdamW
from posttrain.training.record import optimizer_tensors, restore_optimizer

OWNER = "0123456789abcdef" * 4
FILES = ["weights.safetensors", "optimizer.safetensors", "waiting.safetensors", "state.json", "manifest.json"]
SOURCE = Path(checkpoint.__file__).parents[1]


def content(step: int) -> Checkpoint:
    draw = torch.Generator().manual_seed(step)
    weights = {"layer.weight": torch.randn(3, 4, generator=draw), "layer.bias": torch.randn(4, generator=draw)}
    moments = {"layer.weight|exp_avg": weights["layer.weight"] / 10, "layer.weight|step": torch.tensor(float(step))}
    waiting = {"tokens": torch.arange(step), "train": torch.tensor([False, True])}
    return Checkpoint(step, {"weights": weights, "optimizer": moments, "waiting": waiting}, {"drawn": [step], "best": None})


def saved(parent: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(parent, content(step), OWNER) for step in steps]


def assert_equal(found: Checkpoint, expected: Checkpoint) -> None:
    assert (found.step, found.state) == (expected.step, expected.state)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, group in expected.tensors.items():
        assert found.tensors[name].keys() == group.keys()
        for key, value in group.items():
            other = found.tensors[name][key]
            assert (other.dtype, other.shape) == (value.dtype, value.shape)
            assert torch.equal(other.view(torch.uint8) if other.ndim else other, value.view(torch.uint8) if value.ndim else value)


# ---- what comes back is what was saved


def test_tensors_of_every_type_and_shape_come_back_bit_for_bit(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    group: dict[str, Tensor] = {
        "bfloat16": torch.randn(5, 3, generator=draw).bfloat16(),
        "float16": torch.randn(7, generator=draw).half(),
        "float64": torch.randn(2, 2, generator=draw, dtype=torch.float64),
        "int64": torch.tensor([-1, 2**62]),
        "bool": torch.tensor([True, False, True]),
        "uint8": torch.arange(9, dtype=torch.uint8).view(3, 3),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "parameter": nn.Parameter(torch.randn(3, generator=draw)).detach(),
    }
    state = {"pending": [[1, 2], []], "value": 0.1 + 0.2, "text": "caf\u00e9 \u2028 \U0001f600", "none": None, "big": 2**60}
    written = Checkpoint(12, {"weights": group, "nothing": {}}, state)
    read = checkpoint.load(checkpoint.save(tmp_path, written, OWNER), OWNER)
    plain = {name: {key: value.contiguous() for key, value in each.items()} for name, each in written.tensors.items()}
    assert_equal(read, Checkpoint(12, plain, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_optimizer_that_was_saved_goes_on_as_if_it_had_never_stopped(dtype: torch.dtype, tmp_path: Path) -> None:
    def fresh() -> dict[str, nn.Parameter]:
        draw = torch.Generator().manual_seed(1)
        made = {"weight": torch.randn(4, 3, generator=draw), "bias": torch.randn(3, generator=draw)}
        return {name: nn.Parameter(value.to(dtype)) for name, value in made.items()}

    def step(run: "Standing", number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        for parameter in run.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(dtype)
        for learner in run.learners.values():
            learner.optimizer.step()

    class Standing:
        """Two roles that learn, each with an optimizer of its own."""

        def __init__(self) -> None:
            self.parameters = fresh()
            self.learners = {
                role: Learner.of({name: self.parameters[name]}, AdamW(learning_rate=rate, weight_decay=0.1))
                for role, name, rate in (("policy", "weight", 0.1), ("critic", "bias", 0.3))
            }

    first, second = Standing(), Standing()
    for number in range(3):
        step(first, number)
    groups = {"weights": dict(first.parameters), "optimizer": optimizer_tensors(first)}  # type: ignore[arg-type]
    found = checkpoint.load(checkpoint.save(tmp_path, Checkpoint(3, groups, {}), OWNER), OWNER)
    assert set(found.tensors["optimizer"]) == {f"{n}|{w}" for n in ("weight", "bias") for w in ("step", "exp_avg", "exp_avg_sq")}
    with torch.no_grad():
        for name, parameter in second.parameters.items():
            parameter.copy_(found.tensors["weights"][name])
    restore_optimizer(second, dict(found.tensors["optimizer"]))  # type: ignore[arg-type]
    for number in range(3, 6):
        step(first, number)
        step(second, number)
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)


def test_no_file_of_a_checkpoint_is_or_holds_a_pickle(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 1)
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    for file in folder.iterdir():
        data = file.read_bytes()
        if file.suffix == ".json":
            json.loads(data)
        else:
            header = data[8 : 8 + int.from_bytes(data[:8], "little")]
            assert all(set(each) <= {"dtype", "shape", "data_offsets"} for each in json.loads(header).values())
        assert not data.startswith((b"\x80", b"PK")), f"{file.name} begins like a pickle or a zip of pickles"


def test_no_code_of_the_package_reads_or_writes_pickles() -> None:
    banned = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert banned.isdisjoint(name.partition(".")[0] for name in names), f"{file.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "torch.save"}:
                raise AssertionError(f"{file.name}:{node.lineno}: {ast.unparse(node)}")


# ---- damage


def _cut(file: Path, _folder: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _halved(file: Path, _folder: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _emptied(file: Path, _folder: Path) -> None:
    file.write_bytes(b"")


def _deleted(file: Path, _folder: Path) -> None:
    file.unlink()


def _longer(file: Path, _folder: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def _swapped(file: Path, folder: Path) -> None:
    """With its neighbour in the same checkpoint."""
    other = folder / FILES[(FILES.index(file.name) + 1) % len(FILES)]
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def _older(file: Path, folder: Path) -> None:
    """The same file of the checkpoint before."""
    shutil.copy(folder.parent / "step-00000002" / file.name, file)


def _zeros(file: Path, _folder: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _a_folder(file: Path, _folder: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: list[Callable[[Path, Path], None]] = [
    _cut, _halved, _emptied, _deleted, _longer, _swapped, _older, _zeros, _a_folder,
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda each: each.__name__.strip("_"))
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file_and_the_one_before_is_taken(
    name: str, damage: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    _, folder = saved(tmp_path, 2, 40)
    damage(folder / name, folder)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(folder, OWNER)
    culprit = str(refused.value).partition(": ")[0]
    assert culprit in {str(folder / each) for each in FILES}
    assert culprit == str(folder / name) or damage in (_swapped, _older)  # a whole manifest of another save blames the files
    found, skipped = checkpoint.load_latest(tmp_path, OWNER)
    assert found is not None
    assert_equal(found, content(2))
    assert skipped == [str(refused.value)]


@pytest.mark.parametrize("name", FILES[:-1])
def test_one_flipped_bit_anywhere_in_a_file_is_found(name: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, 2, 4)
    whole, draw = (folder / name).read_bytes(), random.Random(name)
    places = {0, 8 * len(whole) - 1, *(draw.randrange(8 * len(whole)) for _ in range(40))}
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=rf"{name}: does not match its manifest"):
            checkpoint.load(folder, OWNER)


def test_one_flipped_bit_anywhere_in_a_manifest_is_found_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    """No bit may change what is loaded, crash, or keep the older checkpoint from being found. The step's are all tried."""
    _, folder = saved(tmp_path, 2, 4)
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    silent, crashed, stuck = [], [], []
    step = 8 * whole.index(b'"step": 4')
    places = {*random.Random(0).sample(range(8 * len(whole)), 1000), *range(step, step + 80)}
    for place in sorted(places):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        manifest.write_bytes(flipped)
        around = bytes(flipped[max(0, place // 8 - 12) : place // 8 + 4])
        try:
            found, skipped = checkpoint.load_latest(tmp_path, OWNER)
        except CheckpointError as error:
            stuck.append((around, str(error)))
        except Exception as error:
            crashed.append((around, type(error).__name__))
        else:
            if found is None or found.step != 2 or not skipped[0].startswith(f"{manifest}: "):
                silent.append((around, skipped))
    assert (silent[:5], crashed[:5], stuck[:5]) == ([], [], [])


def test_a_checkpoint_under_another_steps_name_is_not_loaded_as_that_step(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, 2, 4)
    folder.rename(checkpoint.folder_of(tmp_path, 7))
    found, skipped = checkpoint.load_latest(tmp_path, OWNER)
    assert found is not None
    assert found.step == 2
    assert "step-00000007" in skipped[0]


def test_where_no_checkpoint_is_whole_the_run_is_not_begun_anew_in_silence(tmp_path: Path) -> None:
    for folder in saved(tmp_path, 2, 4):
        _cut(folder / "optimizer.safetensors", folder)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load_latest(tmp_path, OWNER)
    assert refused.value.exit_status == 4
    newest = tmp_path / "step-00000004" / "optimizer.safetensors"
    assert str(refused.value).startswith(f"{newest}: has {newest.stat().st_size} bytes where its manifest says")
    assert f"no other checkpoint in {tmp_path} is whole; remove that folder to begin anew" in str(refused.value)


def test_where_there_is_no_checkpoint_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "none", OWNER) == (None, [])
    assert checkpoint.load_latest(tmp_path, OWNER) == (None, [])


def test_the_checkpoint_of_another_recipe_is_refused_and_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    refused = r"step-00000004: belongs to another recipe \(made with settings 0123456789ab, this is ffffffffffff\)"
    with pytest.raises(CheckpointError, match=refused) as error:
        checkpoint.load_latest(tmp_path, "f" * 64)
    assert error.value.exit_status == 4
    assert checkpoint.steps(tmp_path) == [2, 4]


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"format": manifest["format"] + 1, "blocks": {}}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: has a form that this version of posttrain does not read"):
        checkpoint.load(folder, OWNER)


# ---- the folder around


def test_what_crashed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    ours = ["step-00000004.tmp-811", "best-00000002.tmp-811", "step-00000002.tmp-9-old"]
    theirs = ["step-00000004.tmp", "notes.tmp-1", "backup-20261120.tmp-mine", "step-4.tmp-811", "step-00000004"]
    for name in (*ours, *theirs):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "step-00000006.tmp-1").symlink_to(tmp_path / "notes.tmp-1")
    checkpoint.remove_stale(tmp_path)
    left = {each.name for each in tmp_path.iterdir() if not each.is_symlink()}
    assert left == {"step-00000002", *theirs}
    assert (tmp_path / "notes.tmp-1" / "file").exists(), "a link is not followed"


def test_folders_that_are_no_checkpoints_of_ours_do_not_disturb(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    for name in ("step-final", "step-5", "step-00000003-copy", "steps-00000009", "best-00000007", "step-00000004.tmp-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    assert checkpoint.steps(tmp_path) == [2]
    assert checkpoint.steps(tmp_path, "best") == [7]
    found, skipped = checkpoint.load_latest(tmp_path, OWNER)
    assert (found and found.step, skipped) == (2, [])


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, 9, 10, 11, 100)
    checkpoint.save(tmp_path, content(3), OWNER, "best")
    checkpoint.rotate(tmp_path, 2)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["best-00000003", "step-00000011", "step-00000100"]
    checkpoint.rotate(tmp_path, 5)
    assert checkpoint.steps(tmp_path) == [11, 100]


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    again = Checkpoint(2, content(7).tensors, {"again": True})
    folder = checkpoint.save(tmp_path, again, OWNER)
    assert_equal(checkpoint.load(folder, OWNER), again)
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000002"]


# ---- a disk that refuses


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def set_fault(what: str) -> None:
        faults._seen.clear()
        monkeypatch.setenv("POSTTRAIN_FAULT", what)

    yield set_fault
    faults._seen.clear()


@pytest.mark.parametrize(
    ("call", "number", "file"), [("write", 2, FILES[1]), ("fsync", 4, FILES[3]), ("rename", 1, "step-00000004")]
)
def test_a_full_disk_is_told_with_the_file_and_what_is_still_whole(
    call: str, number: int, file: str, fault: Callable[[str], None], tmp_path: Path
) -> None:
    saved(tmp_path, 2)
    fault(f"{call}:{number}:ENOSPC")
    with pytest.raises(RunError) as error:
        checkpoint.save(tmp_path, content(4), OWNER)
    assert str(error.value).startswith("No space left on device while writing ")
    assert str(error.value).partition(";")[0].endswith(file)
    assert "step-00000002 is whole; make room, then run the same command again to resume" in str(error.value)
    assert error.value.exit_status == 3
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000002"], "nothing half-written remains"
    checkpoint.save(tmp_path, content(4), OWNER)
    assert checkpoint.steps(tmp_path) == [2, 4]


def test_the_message_names_a_checkpoint_that_is_whole_and_not_one_that_is_only_there(
    fault: Callable[[str], None], tmp_path: Path
) -> None:
    _, folder = saved(tmp_path, 2, 4)
    _cut(folder / "weights.safetensors", folder)
    fault("write:1:ENOSPC")
    with pytest.raises(RunError, match=r"; step-00000002 is whole; "):
        checkpoint.save(tmp_path, content(6), OWNER)


def test_a_folder_that_cannot_be_made_is_a_plain_message(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"File exists while writing .*checkpoints; no checkpoint was lost"):
        checkpoint.save(tmp_path / "checkpoints", content(1), OWNER)
