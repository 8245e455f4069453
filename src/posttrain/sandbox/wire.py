"""Values as one line, so that they come back as what they were: shared by the processes at both ends of a sandbox's pipe.

Only plain data crosses. Anything else stays where it is and is known by a number. This file stands in the scripts that run
inside, which begin anew for every program, so it imports what costs no time: `json` alone would take as long as the interpreter.
`_json` is the part of it that is written in C.
"""

from __future__ import annotations

import builtins
import sys
from _json import encode_basestring_ascii, make_scanner

TYPE_CHECKING = False  # typing takes as long to import as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LONG = 1 << 53  # larger integers are written in hexadecimal, which has no limit of digits
LIBRARIES = (("decimal", "Decimal"), ("fractions", "Fraction"))
KINDS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
TYPES = {name: each for name, each in vars(builtins).items() if isinstance(each, type)}
SINGLE: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "range": lambda parts: range(*parts),
    "Decimal": lambda text: __import__("decimal").Decimal(text),
    "Fraction": lambda text: __import__("fractions").Fraction(text),
    "type": TYPES.__getitem__,
}


def packed(value: Any, keep: Callable[[Any], int]) -> Any:
    """What stands for a value in JSON; keep(value) gives the number of one that does not cross."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value) if -LONG < value < LONG else {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, list | dict | set) and type(value).__module__ not in ("builtins", "collections"):
        return {"kept": keep(value)}  # a class of somebody's own, with methods that change it
    if isinstance(value, list):
        return [packed(each, keep) for each in value]
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            return {name: [packed(each, keep) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[packed(key, keep), packed(each, keep)] for key, each in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    for library, name in LIBRARIES:
        if library in sys.modules and isinstance(value, getattr(sys.modules[library], name)):
            return {name: str(value)}
    if isinstance(value, type) and value in TYPES.values():
        return {"type": value.__name__}
    return {"kept": keep(value)}


def unpacked(found: Any, kept: Callable[[int], Any]) -> Any:
    """The value that stands in JSON, of built-in types alone; kept(number) for one that stayed.

    Raises whatever what is none happens to raise: KeyError, TypeError, ValueError.
    """
    if isinstance(found, list):
        return [unpacked(each, kept) for each in found]
    if not isinstance(found, dict):
        return found
    ((kind, content),) = found.items()
    if kind in KINDS:
        return KINDS[kind]([unpacked(each, kept) for each in content])
    if kind == "dict":
        return {unpacked(key, kept): unpacked(each, kept) for key, each in content}
    return kept(int(content)) if kind == "kept" else SINGLE[kind](content)


def dumped(found: Any) -> str:
    """JSON of None, booleans, integers, text, lists, and dicts by text."""
    if found is None:
        return "null"
    if isinstance(found, bool):
        return "true" if found else "false"
    if isinstance(found, str):
        return encode_basestring_ascii(found)
    if isinstance(found, list):
        return f"[{','.join(map(dumped, found))}]"
    if isinstance(found, dict):
        return f"{{{','.join(f'{dumped(key)}:{dumped(each)}' for key, each in found.items())}}}"
    return int.__repr__(found)


class _Plain:
    """What `json` makes of numbers and objects, when it is asked for nothing else."""

    strict, object_hook, object_pairs_hook, parse_float, parse_int, parse_constant = True, None, None, float, int, float


_Plain.memo = {}  # type: ignore[attr-defined]
_scan = make_scanner(_Plain)  # type: ignore[arg-type]


def parsed(line: str) -> Any:
    return _scan(line, 0)[0]
