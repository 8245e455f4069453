"""YAML with line numbers: recipe text and `key=value` overrides become one plain tree that remembers where each value stands."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import RecipeError

Path_ = tuple[str | int, ...]
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")}
ROWS = ("data", "measure")  # sections of rows, of which sources alone may be given
SHORT = dict.fromkeys(("model", "kl_to", "teacher", "of", "source", "sources"), "path") | dict.fromkeys(ROWS, "sources")
MAX_NODES = 100_000  # aliases are expanded; a bomb of aliases stops here


@dataclass
class Document:
    """A parsed recipe: plain values, and for each path the place it came from."""

    value: dict[str, Any]
    file: str
    places: dict[Path_, str] = field(default_factory=dict)

    def where(self, path: Path_) -> str:
        """`file:line` of the value at `path`, or of the nearest section around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.file


class _Reader:
    def __init__(self, file: str) -> None:
        self.file, self.places, self.nodes = file, {}, 0  # type: ignore[var-annotated]

    def fail(self, node: yaml.Node, what: str) -> RecipeError:
        mark = node.start_mark
        return RecipeError(f"{self.file}:{mark.line + 1}: column {mark.column + 1}: {what}")

    def read(self, node: yaml.Node, path: Path_) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.fail(node, f"more than {MAX_NODES:,} values; a recipe is never that large (aliases that multiply?)")
        self.places.setdefault(path, f"{self.file}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        return self.scalar(node)

    def mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, child in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                for each in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                    merged = {**self.read(each, path), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.fail(key_node, "a key must be a word")
            key = str(key_node.value)
            if key in found:
                raise self.fail(key_node, f"the key {key!r} stands twice in one section; keep one of them")
            self.places[(*path, key)] = f"{self.file}:{key_node.start_mark.line + 1}"
            found[key] = self.read(child, (*path, key))
        return {**merged, **found}

    def scalar(self, node: yaml.Node) -> Any:
        if node.tag not in TAGS:
            raise self.fail(node, f"the tag {node.tag!r} is not allowed in a recipe; write a plain value")
        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            raise self.fail(node, str(error)) from None
        if isinstance(value, int | float) and ":" in node.value:
            return str(node.value)  # 2:4 is no number to us, as to YAML 1.1, which counts in sixties
        if isinstance(value, str) and node.style is None:  # type: ignore[attr-defined]
            try:
                return float(value) if value[:1] in "0123456789+-." else value  # YAML 1.1 reads 1e-4 as text
            except ValueError:
                return value
        return value


def parse(text: str, file: str) -> Document:
    """Raises RecipeError with file, line and column for anything that is not one plain YAML mapping."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{mark.line + 1}: column {mark.column + 1}" if mark else "1"
        raise RecipeError(f"{file}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}:1: not valid YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{file}:1: nested too deeply") from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{file}:1: a recipe is a mapping of settings (`key: value` lines)")
    reader = _Reader(file)
    try:
        return Document(reader.read(node, ()), file, reader.places)
    except RecursionError:
        raise RecipeError(f"{file}:1: an alias contains itself, or the nesting is too deep") from None


def load(path: str | Path) -> Document:
    """Reads a recipe file. Raises RecipeError where it is missing, not text, or not YAML."""
    file = Path(path)
    if file.is_dir():
        raise RecipeError(f"{path}: is a directory; name a recipe file (.yaml)")
    try:
        return parse(file.read_text(encoding="utf-8-sig"), str(path))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file; `posttrain init` writes a starter") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); is this a recipe?") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None


def override(document: Document, setting: str) -> None:
    """Applies one `a.b.c=value`; the value is YAML. Raises RecipeError where the path does not lead anywhere."""
    path_text, equals, value_text = setting.partition("=")
    if not equals or not path_text:
        raise RecipeError(f"command line: {setting!r} is not `key=value` (for example objective.beta=0.2)")
    place = f"command line `{setting}`"
    value = parse(f"value: {value_text}", place).value["value"]
    path: Path_ = ()
    section: Any = document.value
    *parents, last = path_text.split(".")
    for part, below in pairwise([*parents, last]):
        step = int(part) if isinstance(section, list) and part.isdigit() else part
        path = (*path, step)
        if isinstance(section, dict) and part not in section:
            section[part] = {}
            document.places[path] = place
        try:
            if isinstance(section[step], str):  # `objective: sft` is short for `{kind: sft}`, `model: x` for `{path: x}`
                listed = isinstance(step, int) and path[-2] in ("sources", *ROWS)
                section[step] = {"path" if listed else SHORT.get(part, "kind"): section[step]}
            elif part in ROWS and isinstance(section[step], list) and not below.isdigit():
                section[step] = {"sources": section[step]}
            section = section[step]
        except (IndexError, KeyError, TypeError):
            raise RecipeError(f"{place}: {'.'.join(map(str, path))}: there is no such section") from None
    if isinstance(section, list) and last.isdigit() and int(last) < len(section):
        section[int(last)] = value
        document.places[(*path, int(last))] = place
    elif isinstance(section, dict):
        section[last] = value
        document.places[(*path, last)] = place
    else:
        raise RecipeError(f"{place}: {'.'.join(map(str, path))} holds a plain value, not a section")
