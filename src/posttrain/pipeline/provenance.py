"""What a stage's folder is keyed by, and what is recorded beside it."""

import ast
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
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
    """{module: sha256 of its file}, of all that the stage names (kinds, and functions as `module:name`) and what those import, as
    far as it is the user's own: neither Python's, nor installed, nor posttrain's."""
    kinds = [type(part).__module__ for part in parts(stage) if isinstance(part, Component)]
    named = [each.partition(":")[0] for each in flat(stage.model_dump(mode="json")).values() if _NAMED.fullmatch(str(each))]
    found: dict[str, str] = {}
    waiting = list(dict.fromkeys([*kinds, *named]))
    for module in waiting:
        file = None if module.partition(".")[0] in {"posttrain", *sys.stdlib_module_names} else _file_of(module)
        if file is not None and module not in found:
            code = file.read_bytes()
            found[module] = hashlib.sha256(code).hexdigest()
            waiting += _imported(code, module, file.name == "__init__.py")
    return found


_NAMED = re.compile(r"[A-Za-z_][\w.]*:[\w.-]+")


def _file_of(module: str) -> Path | None:
    """A module's file, where it is the user's own. Of others nothing is imported: to find `a.b`, Python imports `a`."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    for name in dict.fromkeys((module.partition(".")[0], module)):
        try:
            spec = importlib.util.find_spec(name)
        except Exception:  # no such module; or a package of the user's that does not load
            return None
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
        if not places or any(Path(place).resolve().is_relative_to(folder) for place in places if place for folder in installed):
            return None
    return Path(spec.origin).resolve() if spec is not None and spec.origin is not None and spec.origin.endswith(".py") else None


def _imported(code: bytes, module: str, package: bool) -> list[str]:
    """The modules that a file imports; for `from a import b`, `a` and `a.b`, which may be one."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError):
        return []
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in found if name]


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
        f"{name} changed" for name, mark in now["fingerprints"].items()
        if before.get("fingerprints", {}).get(name) != mark and not (name.startswith("task ") and changes)  # of settings, too
    ]  # fmt: skip
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
