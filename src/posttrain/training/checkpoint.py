"""Checkpoints with one commit point: a folder exists whole, or it does not exist.

All files are written into a staging folder beside the target and synced; then a manifest with the size and sha256 of each; then
the folder is renamed into place. A folder whose manifest does not verify is never loaded. Tensors are safetensors, everything
else is JSON: nothing is pickled. The latest checkpoint is computed, never stored.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import faults
from posttrain.errors import CheckpointError, RunError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
KINDS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
STALE = re.compile(r"[a-z]+-\d{8}\.tmp-\d+(-old)?")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: groups of tensors (one safetensors file each) and plain values."""

    step: int
    tensors: "Mapping[str, Mapping[str, Tensor]]"
    state: Mapping[str, Any]


def folder_of(parent: Path, step: int, prefix: str = "step") -> Path:
    return parent / f"{prefix}-{step:08d}"


def save(parent: Path, checkpoint: Checkpoint, owner: str, prefix: str = "step") -> Path:
    """Writes a checkpoint of the run named by `owner`. Raises RunError, leaving nothing half-written, where the disk refuses."""
    target = folder_of(parent, checkpoint.step, prefix)
    staging = parent / f"{target.name}.tmp-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_stale(parent)
        staging.mkdir()
        files = {}
        for name, group in checkpoint.tensors.items():
            files[f"{name}.safetensors"] = _write(staging / f"{name}.safetensors", safetensors_bytes(group))
        files[STATE] = _write(staging / STATE, [json.dumps(checkpoint.state).encode()])
        manifest = {"format": FORMAT, "owner": owner, "step": checkpoint.step, "files": files}
        _write(staging / MANIFEST, [json.dumps({**manifest, "seal": _seal(manifest)}, indent=1).encode()])
        commit(staging, target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        whole = next((folder_of(parent, each.step).name for each in _whole(parent, owner)), None)
        raise RunError(
            f"{error.strerror} while writing {error.filename or staging}; "
            f"{f'{whole} is whole' if whole else 'no checkpoint was lost'}; make room, then run the same command again to resume"
        ) from error
    return target


def commit(staging: Path, target: Path) -> None:
    """The commit point: the staged folder appears under its name, whole. An older folder of that name gives way."""
    _sync(staging)
    faults.point("rename", str(target))
    if target.exists():
        discard(target)
    staging.rename(target)
    _sync(target.parent)


def discard(folder: Path) -> None:
    """A folder is renamed before it is removed, so that a kill leaves no half of one under its name."""
    doomed = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-old")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def safetensors_bytes(group: "Mapping[str, Tensor]") -> "Iterator[bytes | memoryview]":
    """A safetensors file piece by piece: the library's own `save` holds a second copy of all tensors."""
    import torch

    order = sorted(group, key=lambda name: (-group[name].element_size(), name))  # the widest first: everything stays aligned
    header, place = {}, 0
    for name in order:
        value = group[name]
        end = place + value.numel() * value.element_size()
        kind = KINDS[str(value.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = group[name].detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield memoryview(flat.view(torch.uint8).numpy().data)


def _write(path: Path, content: "Iterable[bytes | memoryview]") -> dict[str, Any]:
    """Writes and syncs the pieces; returns their size and hash."""
    faults.point("write", str(path))
    size, digest = 0, hashlib.sha256()
    try:
        with path.open("wb") as stream:
            for piece in content:
                stream.write(piece)
                digest.update(piece)
                size += len(piece)
            stream.flush()
            faults.point("fsync", str(path))
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return {"size": size, "sha256": digest.hexdigest()}


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(folder: Path, owner: str) -> Checkpoint:
    """Reads and verifies every byte. Raises CheckpointError that names the file which is damaged, or the other run it is of."""
    from safetensors.torch import load as from_bytes

    manifest = _manifest(folder)
    if manifest["owner"] != owner:
        raise CheckpointError(
            f"{folder}: belongs to another recipe (made with settings {manifest['owner'][:12]}, this is {owner[:12]}); "
            "run the recipe that made it, or remove the folder"
        )
    contents = {name: _verified(folder / name, facts) for name, facts in manifest["files"].items()}
    state = json.loads(contents.pop(STATE))
    return Checkpoint(
        manifest["step"], {name.removesuffix(".safetensors"): from_bytes(data) for name, data in contents.items()}, state
    )


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(_read(path, "is missing; this checkpoint is not whole"))
        if manifest["format"] == FORMAT and manifest.pop("seal") != _seal(manifest):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: is damaged; this checkpoint is not whole") from None
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: has a form that this version of posttrain does not read")
    if not folder.name.endswith(f"-{manifest['step']:08d}"):
        raise CheckpointError(f"{path}: is of step {manifest['step']}; this folder was renamed, or its manifest is another's")
    return dict(manifest)


def _read(path: Path, missing: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {missing}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _verified(path: Path, facts: Mapping[str, Any]) -> bytes:
    content = _read(path, "is missing, though its manifest lists it")
    if len(content) != facts["size"]:
        raise CheckpointError(
            f"{path}: has {len(content)} bytes where its manifest says {facts['size']}; it was cut or overwritten"
        )
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise CheckpointError(f"{path}: does not match its manifest (sha256); it is damaged")
    return content


def steps(parent: Path, prefix: str = "step") -> list[int]:
    """The steps of the committed checkpoints, ascending; whether they are whole is seen when they are loaded."""
    if not parent.is_dir():
        return []
    pattern = re.compile(rf"{prefix}-(\d{{8}})")
    found = [pattern.fullmatch(each.name) for each in parent.iterdir() if each.is_dir()]
    return sorted(int(name[1]) for name in found if name)


def _whole(parent: Path, owner: str) -> "Iterator[Checkpoint]":
    """The whole checkpoints of this run, newest first."""
    for step in reversed(steps(parent)):
        with suppress(CheckpointError):
            yield load(folder_of(parent, step), owner)


def load_latest(parent: Path, owner: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a line for each damaged one that was passed over.

    Raises CheckpointError where there are checkpoints but none is whole: a run is never begun anew without being told to.
    """
    skipped: list[str] = []
    for step in reversed(steps(parent)):
        try:
            return load(folder_of(parent, step), owner), skipped
        except CheckpointError as error:
            if "another recipe" in str(error):
                raise
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(f"{skipped[0]}; no other checkpoint in {parent} is whole; remove that folder to begin anew")
    return None, []


def remove_stale(parent: Path) -> None:
    """Removes what crashed writers left behind: folders of our own staging pattern only."""
    for folder in parent.iterdir() if parent.is_dir() else ():
        if STALE.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def rotate(parent: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for step in steps(parent)[:-keep]:
        discard(folder_of(parent, step))
