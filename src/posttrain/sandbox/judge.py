"""Runs inside of a sandbox of its own: the tests, which call the program in the other one by message.

The tests are the data set's and say the truth about a program, so the program must not reach them: it sees the arguments of
calls, one call at a time, and what it gives back arrives as plain data. Its objects are compared by identity alone, never by
their own operators, and are not asked whether they are what a test hopes for.
"""

from __future__ import annotations

import builtins
import os
import resource
import sys

from posttrain.sandbox.wire import dumped, packed, parsed, unpacked

TYPE_CHECKING = False  # typing takes as long to import as all the rest
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

channel = sys.stdout
ENDINGS = (StopIteration, StopAsyncIteration, UnicodeError)  # that would end a loop of the tests; that take more than a text
AGREEING = {  # methods of text, sets and numbers that say yes or no
    name for kind in (str, bytes, set, float) for name in dir(kind) if name.startswith("is") or name.endswith("swith")
}


class Gone(BaseException):
    """The program has ended, or says nothing any more. No test is passed from then on, whatever it catches."""


def ask(**question: Any) -> dict[str, Any]:
    say(question)
    found: dict[str, Any] = parsed(sys.stdin.readline())
    if "gone" in found:
        gone.append(found["gone"])
        raise Gone(found["gone"])
    if "raised" in found:
        kind, said = found["raised"]
        known: Any = getattr(builtins, str(kind), None)
        proper = isinstance(known, type) and issubclass(known, Exception)
        raise next(each for each in known.__mro__ if not issubclass(each, ENDINGS))(said) if proper else RuntimeError(said)
    return found


def say(message: dict[str, Any]) -> None:
    channel.write(dumped(message) + "\n")
    channel.flush()


class Remote:  # something in the program's process, by its number there (a docstring would be that of its functions)
    __slots__ = ("_number",)
    _number: int

    def __init__(self, number: int) -> None:
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        found = ask(do="call", arguments=packed(list(arguments), sent), named=packed(named, sent), kept=self._number)
        for given, now in zip(arguments, received(found.get("arguments", [])), strict=False):  # changed in place by the program
            if isinstance(given, list):
                given[:] = now
            elif isinstance(given, dict | set):
                given.clear()
                given.update(now)
        return arguments[found["same"]] if "same" in found else received(found["value"])

    def __getattr__(self, name: str) -> Any:
        if name in AGREEING:
            raise AttributeError(f"{name} is asked of an object of the program's, which would say what it likes")
        return received(ask(do="get", attribute=name, kept=self._number)["value"])

    def __setattr__(self, name: str, value: Any) -> None:
        ask(do="set", attribute=name, value=packed(value, sent), kept=self._number)

    def __getitem__(self, key: Any) -> Any:
        return received(ask(do="item", key=packed(key, sent), kept=self._number)["value"])

    def __setitem__(self, key: Any, value: Any) -> None:
        ask(do="replace", key=packed(key, sent), value=packed(value, sent), kept=self._number)

    def __iter__(self) -> Iterator[Any]:
        found: Iterator[Any] = received(ask(do="iterate", kept=self._number)["value"])
        return found

    def __next__(self) -> Any:
        for found in received(ask(do="next", kept=self._number)["value"]):
            return found
        raise StopIteration

    def __len__(self) -> int:
        return int(ask(do="length", kept=self._number)["value"])

    def __bool__(self) -> bool:
        return bool(ask(do="truth", kept=self._number)["value"])

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __str__(self) -> str:
        return str(ask(do="text", kept=self._number)["value"])

    def __repr__(self) -> str:
        return str(ask(do="printable", kept=self._number)["value"])


remotes: dict[int, Remote] = {}
gone: list[str] = []
unfit: list[str] = []  # why the tests cannot judge any program from here


def received(found: Any) -> Any:
    return unpacked(found, lambda number: remotes.setdefault(number, Remote(number)))


def sent(value: Any) -> int:
    """The number of something of the program's. Raises TypeError for what is the tests' own and cannot cross."""
    if isinstance(value, Remote):
        return value._number
    unfit.append(f"a {type(value).__name__} of the tests cannot be handed to the program, which runs in another process")
    raise TypeError(unfit[-1])


class Names(dict):
    """What the tests see: their own names, then the program's. What Python has stays Python's but for `free`."""

    def __init__(self, names: list[str], libraries: dict[str, str], free: str | None) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self.names, self.libraries, self.free = set(names), libraries, free

    def __missing__(self, name: str) -> Any:
        if name != self.free:
            if name not in self.names or hasattr(builtins, name):
                raise KeyError(name)  # it is Python's, or nobody's
            if name in self.libraries:
                return getattr(__import__(self.libraries[name]), name)
            if name in sys.stdlib_module_names:
                return __import__(name)
        try:
            return received(ask(do="read", name=name)["value"])
        except KeyError:  # of which Python would make its own of that name
            raise NameError(f"name {name!r} is not defined") from None


def run(test: Any, space: Names) -> None:
    """Raises where a test is not passed."""
    if isinstance(test, str):
        exec(compile(test, "<test>", "exec", dont_inherit=True), space, space)
        return
    space.free = test["call"]
    given = space[test["call"]](*test["args"])
    if not same(given, test["expected"]):
        raise AssertionError(f"{given!r:.200}")


def same(given: Any, expected: Any) -> bool:
    """Whether a value is what JSON says it should be, of the same type all through; a tuple is a list."""
    if isinstance(expected, list):
        return isinstance(given, list | tuple) and len(given) == len(expected) and all(map(same, given, expected))
    if isinstance(expected, dict):
        return isinstance(given, dict) and set(given) == set(expected) and all(same(given[key], expected[key]) for key in given)
    return type(given) is type(expected) and bool(given == expected)


def outcome(test: Any, space: Names) -> str | None:
    """None where a test is passed, else why not."""
    try:
        run(test, space)
    except BaseException as error:
        return gone[0] if gone else f"{type(error).__name__}: {error}"[:300]
    return gone[0] if gone else None


def judged(begin: dict[str, Any]) -> None:
    """One program's tests, under limits."""
    for name, most in zip(("AS", "NPROC", "FSIZE", "CPU"), sys.argv[1:], strict=True):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(most), int(most)))
    space = Names(begin["names"], begin["libraries"], begin["free"])
    wrong = outcome(begin["setup"], space)
    if begin["free"] is not None:
        space.pop(begin["free"], None)  # what the setup imports by that name is not what is tested
    verdicts = [outcome(test, space) if wrong is None else wrong for test in begin["tests"]]
    say({"verdicts": verdicts, "unfit": unfit[0] if unfit else None})


def main() -> None:
    sys.stdout = sys.stderr  # where tests print
    channel.write("ready\n")
    channel.flush()
    while line := sys.stdin.readline():
        child = os.fork()  # so that no program's tests know of another's
        if child == 0:
            status = 1
            try:
                judged(parsed(line))
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            say({"failed": status})
            return


if __name__ == "__main__":
    main()
