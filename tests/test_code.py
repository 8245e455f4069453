"""Programs as answers: what earns, what does not, and what the verdict rests on."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from posttrain.component import Component
from posttrain.errors import RecipeError
from posttrain.sandbox import Bubblewrap, NoSandbox, Sandbox
from posttrain.sandbox.judge import same
from posttrain.tasks import CodeGrader, CodeTask
from posttrain.tasks.code import Judges, _Program, form_of, freed, program_in
from posttrain.text import Message, Problem, Sample

TRUSTING = NoSandbox(i_trust_this_code=True)


def problem(*tests, setup=None):
    return Problem("p", (Message("user", "?"),), None, {"tests": list(tests)} | ({} if setup is None else {"setup": setup}), "f:1")


def said(program, *tests, setup=None, sandbox=TRUSTING, **settings):
    grader = CodeGrader(sandbox=sandbox, **settings)
    asked = problem(*tests, setup=setup)
    assert grader.gold_problem(asked) is None
    return grader.grade(asked, program)


# ---- what is read


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nThat is it.", "x = 1\n"),
        ("```\nx = 1\n```\nbetter:\n```py\nx = 2\n```", "x = 2\n"),
        ("<think>\n```\nx = 0\n```\n</think>\nx = 3", "\nx = 3"),
        ("<think>\n```\nx = 0\n```\n", ""),
        ("```python\nx = 4\n```\nIt prints\n```\n4\n```", "x = 4\n"),
        ("1. So:\r\n   ```python\r\n   if x:\r\n       y = 5\r\n   ```\r\n", "if x:\n    y = 5\n"),
        ("````\n```\n````", "```\n"),
        ("~~~py\nx = 6\n~~~", "x = 6\n"),
        ("```python\nx = 7", "x = 7"),
        ("<answer>\n```python\nx = 8\n```\n</answer>", "x = 8\n"),
    ],
)
def test_the_last_fenced_block_is_the_program(text, program):
    assert program_in(text) == program


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "it has no column `tests` (it has none but prompt and answer)"),
        ({"test_list": ["assert f(1)"]}, "it has no column `tests` (it has test_list)"),
        ({"tests": ["import numpy as np\nassert f(np)"]}, "its tests import numpy, and a sandbox has Python's own library alone"),
        ({"tests": ["assert f(1)"], "setup": "from torch.nn import Linear"}, "its tests import torch, and"),
        ({"tests": []}, "is not a list of tests"),
        ({"tests": ["assert f(1) == 2", {"input": "", "output": ""}]}, "of different forms"),
        ({"tests": [{"call": "f"}]}, "is no test"),
        ({"tests": ["assert f(1"]}, "is no Python"),
        ({"tests": ["assert f(1)"], "setup": "x ="}, "is no Python"),
        ({"tests": ["assert f(1)"], "setup": 5}, "`setup` is not text"),
        ({"tests": ["assert f(1)", "# assert f(2)"]}, "is no test"),
        ({"tests": ["def check(candidate):\n    assert candidate(1) == 2"]}, "name nothing that a program would define"),
        ({"tests": ["assert f(1)"], "entry_point": 5}, "`entry_point` is no name of a function"),
    ],
)
def test_a_problem_without_tests_that_can_be_run_is_refused(facts, message):
    assert message in CodeGrader().gold_problem(Problem("p", (Message("user", "?"),), None, facts, "f:1"))


def test_the_three_forms_are_told_apart():
    assert form_of("assert f() == 1") == "assert"
    assert form_of({"call": "f", "args": [], "expected": None}) == "call"
    assert form_of({"input": "", "output": "a"}) == "output"
    assert form_of({"input": 1, "output": "a"}) is None
    assert form_of("  ") is None


# ---- asserts, run apart from the program


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x):\n    return (x, [x], {x: {x}})", "assert f(1) == (1, [1], {1: {1}})"),
        ("def f(x):\n    return x ** 300 * 1.5 if False else 2 ** x", "assert f(300) == 2 ** 300"),
        ("def f(x):\n    return float('inf') if x else -0.0", "assert f(1) == float('inf') and str(f(0)) == '-0.0'"),
        ("def f(x):\n    return x[::-1]", "assert f('h\\u00e9\\ud800\\n\"') == '\"\\n\\ud800\\u00e9h' and f(b'ab') == b'ba'"),
        ("def sort(rows):\n    rows.sort()", "rows = [3, 1, 2]\nsort(rows)\nassert rows == [1, 2, 3]"),
        ("def f(x):\n    if x < 0:\n        raise ValueError('below 0')\n    return x", "try:\n    f(-1)\nexcept ValueError as error:\n    assert str(error) == 'below 0'\nelse:\n    assert False"),
        ("class Node:\n    def __init__(self, x):\n        self.x, self.next = x, None\ndef last(n):\n    while n.next:\n        n = n.next\n    return n", "a, b = Node(1), Node(2)\na.next = b\nassert last(a) is b and last(a).x == 2"),
        ("from collections import Counter, deque\ndef f(x):\n    return Counter(x)\ndef g(x):\n    return deque(x)", "assert f('aab') == {'a': 2, 'b': 1} and list(g([1, 2])) == [1, 2] and len(g([1])) == 1 and g([7])[0] == 7"),
        ("def f(x):\n    return (each for each in x)", "assert list(f([1, 2])) == [1, 2]"),
        ("import math\ndef area(r):\n    return math.pi * r * r", "assert math.isclose(area(2), 12.566370614359172)"),
        ("def sum(a, b):\n    return a + b", "assert sum(10, 15) == 25"),
        ("def max(x):\n    return 0\ndef f(x):\n    return x", "assert f(2) == max([1, 2])"),
        ("def f(kinds, x):\n    return isinstance(x, kinds)", "assert f(int, 3) and not f(str, 3)"),
        ("from decimal import Decimal\nfrom fractions import Fraction\ndef f():\n    return Decimal('1.5'), Fraction(1, 3), 1j, range(3)", "from decimal import Decimal\nfrom fractions import Fraction\nassert f() == (Decimal('1.5'), Fraction(1, 3), 1j, range(3))"),
        ("print('x' * 100000)\ndef f():\n    print('hello')\n    return 1", "assert f() == 1"),
        ("LIMIT = 5\ndef f(*, x):\n    return x + LIMIT", "assert f(x=LIMIT) == 10"),
        ("def f():\n    yield 1\n    yield 2", "g = f()\nassert next(g) == 1 and list(g) == [2] and next(g, 5) == 5"),
        ("def f():\n    x = 0\n    while True:\n        yield x\n        x += 1", "assert list(zip('abc', f())) == [('a', 0), ('b', 1), ('c', 2)]"),
        ("from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\ndef f(x: 'int'):\n    return P(x), f.__annotations__['x']", "assert f(1) == ((1,), 'int')"),
        ("def f(x: int):\n    return isinstance(x, f.__annotations__['x'])", "assert f(1)"),
        ("class Stack(list):\n    def push(self, x):\n        self.append(x)", "s = Stack()\nassert not s\ns.push(3)\nassert s and len(s) == 1 and s[0] == 3 and list(s) == [3]"),
        ("from collections import OrderedDict\nclass LRU(OrderedDict):\n    def put(self, k, v):\n        self[k] = v", "c = LRU()\nc.put(1, 2)\nc[3] = 4\nassert c[1] == 2 and c[3] == 4 and repr(c) == 'LRU([(1, 2), (3, 4)])'"),
        ("def f(d, k):\n    return d[k]", "try:\n    f({}, 'a')\nexcept KeyError as error:\n    assert error.args == ('a',)\nelse:\n    assert False"),
        ("def f(x):\n    return b'\\xff'.decode()", "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False"),
        ("def f(a):\n    a.append(1)\n    return a", "a = []\nassert f(a) is a and a == [1]"),
        ("calls = 0\ndef f():\n    global calls\n    calls += 1", "assert calls == 0\nf()\nassert calls == 1"),
        ("from datetime import datetime\ndef f(x):\n    return x + 1", "assert f(datetime(2020, 1, 1).year) == 2021"),
        ("def f(x):\n    x.append(1)\n    return x", "x = bytearray(b'a')\nassert f(x) == bytearray(b'a\\x01')"),
    ],
)  # fmt: skip
def test_a_right_program_earns_1(program, test):
    assert said(program, test).score == 1
    assert said(program, test, "assert False").parts["passed"] == 0.5


def test_the_setup_runs_after_the_program_and_before_the_tests():
    program = "class Node:\n    def __init__(self, x):\n        self.x = x\ndef value(n):\n    return n.x"
    assert said(program, "assert value(root) == 4", setup="root = Node(4)").score == 1
    assert said(program, "assert value(root) == 4", setup="root = Nodes(4)").score == 0


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x):\n    return 0", "assert f(1) == 1"),
        ("def g(x):\n    return 1", "assert f(1) == 1"),
        ("def f(x:\n    return 1", "assert f(1) == 1"),
        ("raise ValueError", "assert f(1) == 1"),
        ("import sys\nsys.exit(0)", "assert f(1) == 1"),
        ("import os\ndef f(x):\n    os._exit(0)", "assert f(1) == 1"),
        ("class Same:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Same()", "assert f(1) == 1"),
        ("class Same:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Same()", "assert 1 == f(1)"),
        ("class Liar(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\ndef f(x):\n    return Liar(7)", "assert f(1) == 1"),
        ("class Liar(str):\n    def __str__(self):\n        return 'b'\n    __repr__ = __str__\ndef f(x):\n    return Liar('a')", "assert f(1) == 'b'"),
        ("def f(x):\n    return [9]\ndef set(x):\n    return [9]", "assert f(1) == set([3])"),
        ("import math\nmath.isclose = lambda *_, **__: True\ndef f(x):\n    return 9", "import math\nassert math.isclose(f(1), 1)"),
        ("class math:\n    isclose = staticmethod(lambda *_: True)\ndef f(x):\n    return 9", "assert math.isclose(f(1), 1)"),
        ("def f(x):\n    return 9\nabs = lambda x: 0", "assert abs(f(1) - 1) < 1e-9"),
        ("def f(x):\n    return 9\nisclose = lambda *_: True", "assert isclose(f(1), 1)"),
        ("def f(x):\n    return 9\nall = lambda _: True", "assert all([f(1) == 1])"),
        ("def f(*_):\n    raise StopIteration", "assert all(map(lambda x: f(*x) == 5, [(2, 3)]))"),
        ("import os\ndef f(x):\n    os._exit(0)", "ok = False\ntry:\n    f(1)\nexcept Exception:\n    ok = True\nassert ok"),
        ("import os\ndef f(x):\n    os._exit(0)", "try:\n    f(1)\nexcept BaseException:\n    pass"),
        ("import builtins\nbuiltins.all = lambda _: True\nall = builtins.all\ndef f(x):\n    return 9", "assert all([f(1) == 1])"),
        ("class Yes:\n    def __getattr__(self, name):\n        return lambda *_: True\ndef f(x):\n    return Yes()", "assert f(5).startswith('0b101')"),
        ("class Yes:\n    def __getattr__(self, name):\n        return lambda *_: True\ndef f(x):\n    return Yes()", "assert f(5).issubset({1, 2})"),
        ("class Yes:\n    __sub__ = lambda self, other: 0.0\ndef f(x):\n    return Yes()", "assert abs(f(2) - 1.41421) < 1e-4"),
        ("class Yes:\n    __contains__ = lambda self, other: True\n    __iter__ = lambda self: iter(())\ndef f(x):\n    return Yes()", "assert 3 in f(2)"),
        ("class Yes:\n    pass\ndef f(x):\n    return Yes()", "assert f(1).__eq__(5)"),
        ("def f(x):\n    return 1", "assert f.__doc__"),
        ("def f(x):\n    return x", "a = [[1], [2]]\nb = f(a)\nassert b == a and b is not a"),
        ("from collections import deque\ndef f(x):\n    return deque()", "assert f([1, 2])"),
    ],
)  # fmt: skip
def test_a_wrong_program_earns_0_whatever_it_says_of_itself(program, test):
    assert said(program, test).score == 0


# A test, the setup, and the name of Python's own that is the program's in them.
ASKED = [
    ("assert sum(10, 15) == 25", "", "sum"),
    ("assert gcd(10, 15) == 5", "import sys", "gcd"),
    ("xs = [3, 1, 2]\nassert median(xs) == 2", "", "median"),
    ("def check(candidate):\n    assert candidate(2, 3) == 5\ncheck(add)", "", "add"),
    ("assert [factorial(i) for i in range(4)] == [1, 1, 2, 6]", "", "factorial"),
    ("assert abs(sqrt(2) - 1.41421) < 1e-4", "from math import *", "sqrt"),
    ("assert sorted(permutations([1, 2])) == [(1, 2), (2, 1)]", "", "permutations"),
    ("for xs, want in [([1, 1, 2], 1)]:\n    assert mode(xs) == want", "", "mode"),
    ("assert math.isclose(mean([1, 2]), 1.5)", "", "mean"),
    ("assert filter([1, -1]) == [1]", "x = 1", "filter"),
    ("assert calendar([1]) == 1", "", "calendar"),
    ("assert f(2) == set([3])", "", None),
    ("assert len(f(2)) == 1", "", None),
    ("assert abs(s.f(2) - 5) < 1", "", None),
    ("assert len(dict) == 3", "dict = f()", None),
]


@pytest.mark.parametrize(("test", "setup", "name"), ASKED)
def test_a_name_of_python_is_the_programs_where_its_tests_name_nothing_else(test, setup, name):
    assert freed(problem(test, setup=setup)) == name


@pytest.mark.parametrize(("test", "setup", "name"), [each for each in ASKED if each[2]])
def test_pythons_own_function_does_not_stand_in_for_the_programs(test, setup, name):
    for program in (f"def {name}(*_):\n    return 'wrong'", f"def {name}(*_):\n    raise KeyError", "", f"{name}_ = 1"):
        assert said(program, test, setup=setup).score == 0, program


@pytest.mark.parametrize(
    ("facts", "program"),
    [
        ({"tests": ["assert abs(-5) == 5", "assert max(1, 2) == 2"], "entry_point": "max"}, "def max(*xs):\n    return sorted(xs)[-1]"),
        ({"tests": ["assert mean(list(accumulate([1, 1]))) == 1.5"], "entry_point": "mean"}, "from itertools import accumulate\ndef mean(n):\n    return sum(n) / len(n)"),
    ],
)  # fmt: skip
def test_a_column_says_which_of_several_names_of_python_is_the_programs(facts, program):
    grader = CodeGrader(sandbox=TRUSTING)
    asked = Problem("p", (Message("user", "?"),), None, facts, "f:1")
    assert grader.gold_problem(asked) is None
    assert grader.grade(asked, program).score == 1
    assert grader.grade(asked, "").score == 0
    unsaid = Problem("p", (Message("user", "?"),), None, {"tests": facts["tests"]}, "f:1")
    assert "`entry_point` must say which is the program's" in grader.gold_problem(unsaid)


def test_tests_that_a_program_in_another_process_cannot_meet_are_a_failure_and_no_score():
    asked = Sample(problem("assert f(lambda x: x) == 1"), 0, (), (), (), "end", "def f(x):\n    return 1")
    found = CodeGrader(sandbox=TRUSTING).grade_all([asked])[0]
    assert found.score is None
    assert "a function of the tests cannot be handed to the program" in found.failure


# ---- calls, and whole programs


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        (1, 1, True), (True, 1, False), (1, True, False), (1.0, 1, False), (1, 1.0, False), ((1, [2]), [1, [2]], True),
        ([1], [1, 2], False), ({"a": (1,)}, {"a": [1]}, True), ({"a": 1, "b": 2}, {"a": 1}, False), ({1: 2}, {"1": 2}, False),
        (float("nan"), float("nan"), False), (None, None, True), ("1", 1, False), (object(), None, False),
    ],
)  # fmt: skip
def test_values_are_compared_with_their_types(given, expected, right):
    assert same(given, expected) is right


def test_calls_give_values_that_are_compared_outside():
    program = "def f(x):\n    return (x, None, 2.5)\ndef g():\n    raise KeyError('no')\nh = 3"
    tests = [
        {"call": "f", "args": [1], "expected": [1, None, 2.5]}, {"call": "g", "args": [], "expected": None},
        {"call": "h", "args": [], "expected": 3}, {"call": "i", "args": [], "expected": 3},
    ]  # fmt: skip
    found = CodeGrader(sandbox=TRUSTING).verdicts(problem(*tests), program)
    assert found.why[0] is None
    assert "KeyError" in found.why[1]
    assert all(found.why[1:])


def test_a_process_of_tests_that_was_ended_costs_no_program_its_score(isolated):
    problem = Problem("p", (Message("user", "?"),), facts={"tests": ["assert f(1) == 2"]})
    grader = CodeGrader(sandbox=isolated)
    with Judges(isolated) as judges:
        for _ in range(2):
            assert grader.verdicts(problem, "def f(x):\n    return x + 1", judges).share == 1
            (idle,) = judges.idle.values()
            idle.process.kill()
            time.sleep(0.2)


def test_a_whole_program_is_judged_by_what_it_writes():
    program = "n = int(input())\nprint(n * 2)\nif __name__ == '__main__':\n    print('end')"
    assert said(program, {"input": "4\n", "output": "8\nend"}, {"input": "5", "output": "10  \nend\n\n"}).score == 1
    assert said(program, {"input": "4\n", "output": "8\nends"}).score == 0
    assert said("import sys\nprint(len(sys.stdin.read()))", {"input": "x" * 300_000, "output": "300000"}).score == 1
    assert said("raise SystemExit", {"input": "", "output": "1"}).score == 0
    assert said("try:\n    print(1)\n    exit()\nexcept Exception:\n    print(2)", {"input": "", "output": "1"}).score == 1
    assert said("print('a\\x0cb')", {"input": "", "output": "a\nb"}).score == 0


@pytest.mark.parametrize("end", ["raise ValueError", "import sys; sys.exit(3)", "import os; os.abort()"])
def test_a_program_that_fails_at_its_end_has_not_passed(end, isolated):
    for sandbox in (TRUSTING, isolated):
        assert said("print(1)", {"input": "", "output": "1"}, sandbox=sandbox).score == 1
        assert said(f"print(1, flush=True)\n{end}", {"input": "", "output": "1"}, sandbox=sandbox).score == 0


def test_the_time_is_that_of_all_tests_together():
    began = time.monotonic()
    tests = [{"input": "", "output": "1"}] * 20
    found = said("while True:\n    pass", *tests, sandbox=NoSandbox(i_trust_this_code=True, seconds=1))
    assert found.parts == {"passed": 0.0, "ended_early": 1.0}
    assert time.monotonic() - began < 10


def test_a_share_of_the_tests_can_be_the_score():
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 4", "assert f(4) == 4"]
    assert said("def f(x):\n    return x", *tests, score="share").score == 0.75
    assert said("def f(x):\n    return x", *tests).score == 0


# ---- limits


@pytest.mark.parametrize("program", ["while True:\n    pass", "def f(x):\n    while True:\n        pass"])
@pytest.mark.parametrize("test", ["assert f(1) == 1", {"call": "f", "args": [1], "expected": 1}])
def test_a_program_that_never_ends_is_ended(program, test):
    found = said(program, test, sandbox=NoSandbox(i_trust_this_code=True, seconds=1))
    assert found.score == 0
    assert found.parts["ended_early"] == 1


def test_a_program_that_says_too_much_is_ended():
    quiet = NoSandbox(i_trust_this_code=True, output=1)
    assert said("def f(x):\n    return 'a' * 5_000_000", "assert len(f(1)) == 5_000_000", sandbox=quiet).score == 0
    assert said("def f(x):\n    return 'a' * 5_000_00", "assert len(f(1)) == 5_000_00", sandbox=quiet).score == 1
    assert said("print('a' * 5_000_000)", {"input": "", "output": "a"}, sandbox=quiet).parts["ended_early"] == 1


def test_running_without_isolation_must_be_asked_for_by_name():
    with pytest.raises(ValidationError, match="i_trust_this_code: true"):
        NoSandbox()
    assert isinstance(Sandbox.model_validate({"kind": "none", "i_trust_this_code": True}), NoSandbox)


def test_a_machine_that_cannot_isolate_is_refused_before_anything_runs(monkeypatch, tmp_path):
    from posttrain.sandbox import sandbox as module

    module._what_is_missing.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match=r"bwrap is not installed.*apt install bubblewrap.*i_trust_this_code"):
        CodeGrader().check()
    module._what_is_missing.cache_clear()
    found = CodeGrader().grade_all([Sample(problem("assert f()"), 0, (1,), (False,), (), "end", "def f(): return 1")])
    assert found[0].score is None
    assert "SandboxFailed" in found[0].failure


def test_many_are_graded_at_a_time_each_with_its_own_slot(monkeypatch):
    seen, lock, most = set(), threading.Lock(), []
    start = NoSandbox.start

    def counted(self, script, slot):
        with lock:
            seen.add(slot)
            most.append(slot)
        return start(self, script, slot)

    monkeypatch.setattr(NoSandbox, "start", counted)
    samples = [
        Sample(problem(f"assert f({number}) == {number}"), 0, (1,), (False,), (), "end", f"def f(x):\n    return {number if number % 2 else -1}")
        for number in range(1, 9)
    ]
    grades = CodeGrader(sandbox=TRUSTING, workers=3).grade_all(samples)
    assert [each.score for each in grades] == [1, 0] * 4
    assert seen <= set(range(6))


# ---- MBPP


def test_the_shipped_problems_can_all_be_graded():
    assert len(CodeTask().problems()) == 474


@pytest.mark.parametrize("every", [pytest.param(6), pytest.param(1, marks=pytest.mark.slow)])
def test_the_reference_solutions_of_mbpp_pass(every, isolated):
    problems = CodeTask().problems()[::every]
    samples = [Sample(each, 0, (1,), (False,), (), "end", each.facts["solution"]) for each in problems]
    grades = CodeGrader(sandbox=isolated).grade_all(samples)
    assert [each.problem.id for each, grade in zip(samples, grades, strict=True) if grade.score != 1] == []


def test_the_grader_is_a_kind_with_its_sandbox_in_the_recipe():
    from posttrain.tasks import Grader

    grader = Grader.model_validate({"kind": "code", "sandbox": {"kind": "bubblewrap", "seconds": 3}})
    assert isinstance(grader.sandbox, Bubblewrap)
    assert json.loads(grader.model_dump_json())["sandbox"]["kind"] == "bubblewrap"
    assert issubclass(Sandbox, Component)


def test_a_program_that_is_interrupted_while_it_is_read_is_ended():
    ended = []

    class Running:
        def send(self, _message):
            raise KeyboardInterrupt

        def end(self):
            ended.append(True)

    sandbox = SimpleNamespace(start=lambda _what, _slot: Running())
    with pytest.raises(KeyboardInterrupt):
        _Program(sandbox, "x = 1", 0)
    assert ended == [True]
