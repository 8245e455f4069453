"""Programs as answers: the problem's tests decide, in a sandbox that the verdict does not come from.

A program sees the arguments of calls on it, or a text on its standard input; what it should give back stays outside.
"""

import ast
import builtins
import json
import os
import symtable
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

from pydantic import Field, PositiveInt

from posttrain.answer import answer_of, fenced
from posttrain.data.source import Source
from posttrain.sandbox import Bubblewrap, Running, Sandbox, SandboxLost, slot
from posttrain.tasks.grader import Grader, checked, failed
from posttrain.tasks.task import Task, shipped
from posttrain.text import Grade, Problem, Sample

GRACE = 2.0  # seconds that the tests have after the program's time is up, to say so


def program_in(text: str) -> str:
    """The last fenced block of an answer, of those that say they are Python where one does, else all of it."""
    text = answer_of(text)
    blocks = fenced(text)
    named = [block for block in blocks if block.language.lower() in {"python", "py", "python3"}]
    return (named or blocks)[-1].text if blocks else text


@dataclass(frozen=True)
class Verdicts:
    """Why each test is not passed, None where it is; and how the program ended where it did not live to the end of them."""

    why: Sequence[str | None]
    ended: str | None = None

    @property
    def share(self) -> float:
        return sum(each is None for each in self.why) / len(self.why)


class CodeGrader(Grader, kind="code"):
    """1 where the program in the answer (its last fenced block, else all of it) passes all of the problem's tests.

    The problem's column `tests` is a list of one form: `assert f(1) == 2` (run in a process apart, after the column `setup`, on
    the program's functions by message), `{call: f, args: [1], expected: 2}` (value and type are compared, a tuple is a list), or
    `{input: "1", output: "2"}` (a whole program; white space at the ends of lines aside). A program that takes too long, fails at
    its end or says too much has not passed. Where all that the asserts call is called as something of Python's own is, the
    column `entry_point` says what of it the program defines. arXiv 2107.03374, 2108.07732.
    """

    sandbox: Sandbox = Field(default_factory=Bubblewrap)
    """Where programs run, and what they may take."""
    score: Literal["all", "share"] = "all"
    """all: 1 or 0. share: of the tests that are passed."""
    workers: PositiveInt | None = None
    """Programs that run at a time; by default as many as there are cores."""

    def check(self) -> None:
        self.sandbox.check()

    def gold_problem(self, problem: Problem) -> str | None:
        tests, setup = problem.facts.get("tests"), problem.facts.get("setup") or ""
        if tests is None:
            return f"it has no column `tests` (it has {', '.join(sorted(problem.facts)) or 'none but prompt and answer'})"
        if not isinstance(tests, list) or not tests:
            return "its column `tests` is not a list of tests"
        if not isinstance(setup, str):
            return "its column `setup` is not text"
        forms = {form_of(test) for test in tests}
        if len(forms) > 1:
            return "its tests are of different forms (assert, call, input and output)"
        if None in forms:
            return f"{json.dumps(next(test for test in tests if form_of(test) is None), default=str)[:80]} is no test"
        try:
            ast.parse(setup)
            empty = [test for test in tests if forms == {"assert"} and not ast.parse(test).body]
        except (SyntaxError, ValueError) as error:
            return f"one of its tests is no Python: {error}"
        if empty:
            return f"{empty[0][:80]!r} is no test"
        if foreign := _foreign([setup, *(tests if forms == {"assert"} else ())]):
            return f"its tests import {', '.join(foreign)}, and a sandbox has Python's own library alone"
        try:
            freed(problem) if forms == {"assert"} else None
        except ValueError as error:
            return str(error)
        return None

    def grade(self, problem: Problem, text: str) -> Grade:
        return self._grade(problem, text)

    def _grade(self, problem: Problem, text: str, judges: "Judges | None" = None) -> Grade:
        found = self.verdicts(problem, program_in(text), judges)
        parts = {"passed": found.share, "ended_early": float(found.ended is not None)}
        return Grade(float(found.share == 1) if self.score == "all" else found.share, parts)

    def verdicts(self, problem: Problem, program: str, judges: "Judges | None" = None) -> Verdicts:
        """What the problem's tests say of a program.

        Raises SandboxFailed where none could be run, ValueError where they cannot judge a program in another process.
        """
        tests, setup = problem.facts["tests"], problem.facts.get("setup") or ""
        free = freed(problem) if form_of(tests[0]) == "assert" else None
        with slot() as number:
            if form_of(tests[0]) == "output":
                return _by_output(self.sandbox, program, tests, number)
            if judges is not None:
                return _by_messages(judges, program, setup, tests, free, number)
            with Judges(self.sandbox) as own:
                return _by_messages(own, program, setup, tests, free, number)

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        with Judges(self.sandbox) as judges, ThreadPoolExecutor(self.workers or os.cpu_count()) as pool:
            return list(pool.map(lambda sample: self._guarded_by(judges, sample), samples))

    def _guarded_by(self, judges: "Judges", sample: Sample) -> Grade:
        try:
            return checked(self._grade(sample.problem, sample.text, judges))
        except Exception as error:
            return failed(f"the grader raised {type(error).__name__}: {error}".rstrip(": "))


class CodeTask(Task, kind="code"):
    """Python programs that must pass tests (arXiv 2108.07732); by default the 474 problems of MBPP that come with the package."""

    source: Source = Field(default_factory=shipped("mbpp_train.jsonl.gz"))
    grader: Grader = Field(default_factory=CodeGrader)


def form_of(test: Any) -> Literal["assert", "call", "output"] | None:
    if isinstance(test, str) and test.strip():
        return "assert"
    if isinstance(test, Mapping) and set(test) == {"call", "args", "expected"} and isinstance(test["args"], list):
        return "call"
    whole = isinstance(test, Mapping) and set(test) == {"input", "output"}
    return "output" if whole and all(isinstance(each, str) for each in test.values()) else None


class Judges:
    """The processes that run tests, one for each slot; they stay between programs, whose tests each run in a child of theirs."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.idle: dict[int, Running] = {}

    def __enter__(self) -> "Judges":
        return self

    def __exit__(self, *_: object) -> None:
        for judge in self.idle.values():
            judge.end()

    @contextmanager
    def judge(self, slot: int) -> Iterator[Running]:
        """The slot's; a new one where there is none. Where something goes wrong, it is ended."""
        running = self.idle.pop(slot, None)
        if running is not None and running.gone:  # somebody has ended it in the meantime
            running.end()
            running = None
        running = running or self.sandbox.start("judge", 2 * slot + 1)
        running.renew(self.sandbox.seconds + GRACE, self.sandbox.output)
        try:
            yield running
        except BaseException:
            running.end()
            raise
        if running.stays:
            self.idle[slot] = running
        else:
            running.end()


def _by_messages(
    judges: Judges, program: str, setup: str, tests: Sequence[Any], free: str | None, slot: int
) -> Verdicts:
    """The tests run in a sandbox of their own, and ask the program in the other one."""
    with _Program(judges.sandbox, program, slot) as running:
        try:
            libraries = used_exports([setup, *(test for test in tests if isinstance(test, str))])
            about = {"names": running.names, "setup": setup, "tests": list(tests), "free": free, "libraries": libraries}
            with judges.judge(slot) as judge:
                judge.send(about)
                while True:
                    message = json.loads(judge.line())
                    if "failed" in message:
                        raise SandboxLost(f"they ended with status {message['failed']}")
                    if message.get("unfit"):
                        raise ValueError(f"its tests cannot judge a program in another process: {message['unfit']}")
                    if "verdicts" in message:
                        return Verdicts([running.why or each for each in message["verdicts"]], running.ended)
                    judge.send(running.asked(message))
        except (SandboxLost, RecursionError) as error:  # what the program gave back was too much for the tests
            return Verdicts([running.why or f"the tests: {error}"] * len(tests), running.ended)


def freed(problem: Problem) -> str | None:
    """A name of Python's own that is the program's in the asserts of a problem: its `entry_point`, or the one that they name.

    `assert sum(10, 15) == 25` asks for a `sum`. In `assert f(2) == set([3])` there is an `f`, and `set` is Python's whatever the
    program defines; in `assert abs(sqrt(2) - 1.41) < 0.01` it is what a test would have to import. Raises ValueError where it is
    not clear.
    """
    if entry := problem.facts.get("entry_point"):
        if not isinstance(entry, str) or not entry.isidentifier():
            raise ValueError(f"its column `entry_point` is no name of a function: {entry!r}")
        return entry
    pieces = [problem.facts.get("setup") or "", *problem.facts["tests"]]
    used, defined, modules = map(_united, zip(*map(_names, pieces), strict=True))
    used -= defined
    always, imported = set(dir(builtins)), set(sys.stdlib_module_names) | set(exports())
    if used - always - imported:
        return None
    candidates = sorted(used - always - modules) or sorted(used & always)
    if not candidates:
        raise ValueError("its tests name nothing that a program would define")
    if len(candidates) > 1:
        raise ValueError(f"a column `entry_point` must say which is the program's, and not Python's: {' or '.join(candidates)}")
    return candidates[0]


def _foreign(sources: Sequence[str]) -> list[str]:
    """The modules that tests import and that are not Python's."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    return sorted({name.partition(".")[0] for name in names} - set(sys.stdlib_module_names))


def _united(sets: Iterable[set[str]]) -> set[str]:
    return set().union(*sets)


def _names(source: str) -> tuple[set[str], set[str], set[str]]:
    """The global names that are read, those that are defined, and the modules that are read for what is in them (`math.pi`)."""
    top = symtable.symtable(source, "<tests>", "exec")
    tables = [top]
    for table in tables:
        tables += table.get_children()
    named = [(name, table is top) for table in tables for name in table.get_symbols()]
    read = {name.get_name() for name, outside in named if name.is_referenced() and (outside or name.is_global())}
    defined = {name.get_name() for name, outside in named if name.is_assigned() and (outside or name.is_declared_global())}
    bases = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return read, defined, {base.id for base in bases if isinstance(base, ast.Name) and base.id in sys.stdlib_module_names}


def used_exports(tests: Sequence[str]) -> dict[str, str]:
    """{name in the tests: library of Python's that has it}, for names that a test would import if it were careful."""
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    alike = {name: name for name in called & {"copy", "datetime", "time", "bisect", "pprint", "array"}}  # that modules are called
    return alike | {name: exports()[name] for name in names & set(exports())}


@cache
def exports() -> dict[str, str]:
    """{name: library}, of the libraries from which programs import by name."""
    libraries = ("math", "cmath", "collections", "statistics", "itertools", "functools", "operator", "copy", "heapq", "bisect")
    return {name: library for library in libraries for name in dir(import_module(library)) if not name.startswith("_")}


def _by_output(sandbox: Sandbox, program: str, tests: Sequence[Mapping[str, str]], slot: int) -> Verdicts:
    why: list[str | None] = []
    ended = None
    until = time.monotonic() + sandbox.seconds  # of all tests together
    for test in tests:
        left = until - time.monotonic()
        if left <= 0:
            why.append(ended or "no answer in time")
            continue
        running = sandbox.start("guest", 2 * slot)
        running.renew(left, sandbox.output)
        try:
            running.send({"code": program, "input": test["input"]})
            written, status = running.everything().decode(errors="replace"), running.ended_with()
            wrong = None if _lines(written) == _lines(test["output"]) else f"writes {written[:200]!r}"
            why.append(wrong or (f"ends with status {status}" if status else None))
        except SandboxLost as error:
            ended = str(error)
            why.append(ended)
        finally:
            running.end()
    return Verdicts(why, ended)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


class _Program:
    """A program that has been read in a sandbox, and is asked things."""

    def __init__(self, sandbox: Sandbox, program: str, slot: int) -> None:
        self.running = sandbox.start("guest", 2 * slot)
        self.why: str | None = None  # it cannot be asked
        self.ended: str | None = None
        self.names: list[str] = []
        try:
            found = self._said({"code": program})
        except BaseException:
            self.running.end()
            raise
        names = found.get("names")
        if isinstance(names, list) and all(isinstance(each, str) for each in names):
            self.names = names
        else:
            self.why = self.ended or f"it does not run: {str(found.get('raised'))[:300]}"

    def __enter__(self) -> "_Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.running.end()

    def asked(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """{"value": ...}, with "arguments" that were changed in place; {"raised": [kind, what it says]}; {"gone": why}."""
        if self.ended is not None:
            return {"gone": self.ended}
        found = self._said(question)
        if self.ended is not None:
            return {"gone": self.ended}
        return {key: found[key] for key in ("value", "raised", "arguments", "same") if key in found}  # the rest is ours to say

    def _said(self, message: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self.running.send(message)
            found = json.loads(self.running.line(), parse_constant=_refused)
        except SandboxLost as error:
            self.ended = str(error)
            return {}
        except (ValueError, RecursionError):
            return {"raised": ["RuntimeError", "it writes what is no answer"]}
        return found if isinstance(found, dict) else {"raised": ["RuntimeError", "it writes what is no answer"]}


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
