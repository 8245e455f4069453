"""Runs inside of the sandbox: takes a program, then calls on what it defines, one line each.

Nothing here is trusted once the program runs: what it writes is read as data and no more.
"""

from __future__ import annotations

import builtins
import os
import resource
import sys
import types

from posttrain.sandbox.wire import dumped, packed, parsed, unpacked

TYPE_CHECKING = False  # typing takes as long to import as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

NOTHING = object()
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
        case "truth":
            return {"value": bool(on)}
        case "text":
            return {"value": str(on)}
        case "printable":
            return {"value": repr(on)}
        case "replace":
            on[value_of(question["key"])] = value_of(question["value"])
            return {"value": None}
        case "iterate":
            return {"value": {"kept": keep(iter(on))}}
    after = next(on, NOTHING)
    return {"value": [] if after is NOTHING else [packed(after, keep)]}


def called(fn: Any, arguments: list[Any], named: dict[str, Any]) -> dict[str, Any]:
    """What a call gives, which of its arguments that is, and all of them where it has changed any."""
    before = dumped(packed(arguments, keep))
    value = fn(*arguments, **named)
    found = {"value": packed(value, keep)}
    given = [place for place, each in enumerate(arguments) if each is value and isinstance(value, list | dict | set)]
    if given:
        found["same"] = given[0]
    after = packed(arguments, keep)
    return found | ({"arguments": after} if dumped(after) != before else {})


def guarded(fn: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What fn gives, or {"raised": [kind, what it says]}."""
    try:
        return fn(*arguments)
    except BaseException as error:
        kind = next(each.__name__ for each in type(error).__mro__ if each.__module__ == "builtins")
        try:
            said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)[:300]
        except BaseException:
            said = ""
        return {"raised": [kind, said]}


def defined(code: str, space: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "<program>", "exec", dont_inherit=True), space)
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
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # which -S leaves out
    limited(*map(int, sys.argv[1:]))
    if whole:
        as_input(begin["input"])
        control_in.close()
        control_out.close()
        exec(compile(begin["code"], "<program>", "exec", dont_inherit=True), vars(module))
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
