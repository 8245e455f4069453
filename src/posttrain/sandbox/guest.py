"""Runs inside of the sandbox: takes a program, then calls on what it defines, one line each.

Nothing here is trusted once the program runs: what it writes is read as data and no more.
"""

from __future__ import annotations

import os
import resource
import sys
import types

from posttrain.sandbox.wire import dumped, packed, parsed, unpacked

TYPE_CHECKING = False  # typing takes as long to import as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MOST = 20_000  # items of something that is iterated over
objects: list[Any] = []
numbers: dict[int, int] = {}


def limited(memory: int, processes: int, size: int, seconds: int) -> None:
    """Limits that the program cannot raise again."""
    for what, most in (
        ("AS", memory), ("NPROC", processes), ("FSIZE", size), ("CPU", seconds), ("NOFILE", 64), ("CORE", 0), ("MSGQUEUE", 0),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))


def keep(value: Any) -> int:
    if id(value) not in numbers:
        numbers[id(value)] = len(objects)
        objects.append(value)
    return numbers[id(value)]


def value_of(found: Any) -> Any:
    return unpacked(found, objects.__getitem__)


def answer(question: dict[str, Any], space: dict[str, Any]) -> dict[str, Any]:
    """What one question gives."""
    on = space[question["name"]] if "name" in question else objects[question["kept"]]
    match question["do"]:
        case "call":
            return called(on, value_of(question["arguments"]), value_of(question["named"]))
        case "read":
            return {"value": packed(on, keep)}
        case "get":
            return {"value": packed(getattr(on, question["attribute"]), keep)}
        case "set":
            setattr(on, question["attribute"], value_of(question["value"]))
            return {"value": None}
        case "item":
            return {"value": packed(on[value_of(question["key"])], keep)}
        case "length":
            return {"value": len(on)}
        case "text":
            return {"value": str(on)}
    return {"value": items(on)}


def called(fn: Any, arguments: list[Any], named: dict[str, Any]) -> dict[str, Any]:
    """What a call gives, and its arguments where it has changed them."""
    before = dumped(packed(arguments, keep))
    found = {"value": packed(fn(*arguments, **named), keep)}
    after = packed(arguments, keep)
    return found | ({"arguments": after} if dumped(after) != before else {})


def items(on: Any) -> list[Any]:
    found = []
    for each in on:
        found.append(packed(each, keep))
        if len(found) > MOST:
            raise ValueError(f"more than {MOST} items")
    return found


def guarded(fn: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What fn gives, or {"raised": [kind, what it says]}."""
    try:
        return fn(*arguments)
    except BaseException as error:
        kind = next(each.__name__ for each in type(error).__mro__ if each.__module__ == "builtins")
        try:
            said = str(error)[:300]
        except BaseException:
            said = ""
        return {"raised": [kind, said]}


def defined(code: str, space: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "<program>", "exec"), space)
    return {"names": sorted(name for name in space if isinstance(name, str) and not name.startswith("__"))[:1000]}


def as_input(text: str) -> None:
    """Standard input becomes a text, which another process writes."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.closerange(0, write)
        with os.fdopen(write, "wb") as given:
            given.write(text.encode(errors="surrogateescape"))
        os._exit(0)
    os.close(write)
    os.dup2(read, 0)


def main() -> None:
    control_in, control_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.write(1, b"ready\n")
    begin = parsed(control_in.readline().decode())
    whole = "input" in begin  # a program that reads and writes as at a terminal
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 2)
    module = types.ModuleType("__main__" if whole else "program")
    sys.modules[module.__name__] = module
    limited(*map(int, sys.argv[1:]))
    if whole:
        as_input(begin["input"])
        control_in.close()
        control_out.close()
        exec(compile(begin["code"], "<program>", "exec"), vars(module))
        return
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    found = guarded(defined, begin["code"], vars(module))
    while True:
        control_out.write(dumped(found).encode() + b"\n")
        control_out.flush()
        line = control_in.readline()
        if not line:
            return
        found = guarded(answer, parsed(line.decode()), vars(module))


if __name__ == "__main__":
    main()
