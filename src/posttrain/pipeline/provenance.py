"""What a stage's folder is keyed by, and what is recorded beside it."""

import hashlib
import inspect
import json
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttrain.component import Component
from posttrain.pipeline.stage import Stage, fingerprints, parts

LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "datasets", "numpy", "safetensors", "math-verify")
SOURCE = Path(__file__).parents[1]


@cache
def own_code() -> str:
    """sha256 over posttrain's own Python files."""
    digest = hashlib.sha256()
    for file in sorted(SOURCE.rglob("*.py")):
        digest.update(file.relative_to(SOURCE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def user_code(stage: Stage) -> dict[str, str]:
    """sha256 of the files of kinds that do not come with posttrain."""
    found: dict[str, str] = {}
    for part in parts(stage):
        kind = type(part)
        if isinstance(part, Component) and not kind.__module__.startswith("posttrain."):
            file = Path(inspect.getfile(kind))
            found[f"{kind.__module__}:{kind.__name__}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def identity(stage: Stage, seed: int, inputs: dict[str, str]) -> dict[str, Any]:
    """Everything that decides a stage's result. Library versions are recorded, not keyed."""
    return {
        "settings": stage.model_dump(mode="json"),
        "seed": seed,
        "inputs": inputs,
        "fingerprints": fingerprints(stage),
        "code": own_code(),
        "user_code": user_code(stage),
    }


def key_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Of the folder that the command runs in, with `+` where there are uncommitted changes; None outside of a repository."""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changed else "")


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Why a stage must run again, in a few words."""
    old, new = flat(before.get("settings", {})), flat(now["settings"])
    changes = [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]
    if before.get("seed") != now["seed"]:
        changes.append(f"seed {before.get('seed')} -> {now['seed']}")
    changes += [f"stage {name} changed" for name, key in now["inputs"].items() if before.get("inputs", {}).get(name) != key]
    changes += [
        f"{name} changed" for name, mark in now["fingerprints"].items() if before.get("fingerprints", {}).get(name) != mark
    ]
    if before.get("code") != now["code"]:
        changes.append("posttrain's code changed")
    changes += [f"{name} changed" for name, mark in now["user_code"].items() if before.get("user_code", {}).get(name) != mark]
    return "; ".join(changes) or "its record differs"


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """{"a.b": 1} of nested settings."""
    if isinstance(value, dict):
        return {
            key: each for name, inner in value.items() for key, each in flat(inner, f"{path}.{name}" if path else name).items()
        }
    if isinstance(value, list):
        return {key: each for index, inner in enumerate(value) for key, each in flat(inner, f"{path}.{index}").items()}
    return {path: value}
