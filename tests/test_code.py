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
    ],
)
def test_the_last_fenced_block_is_the_program(text, program):
    assert program_in(text) == program


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "is not a list of tests"),
        ({"tests": []}, "is not a list of tests"),
        ({"tests": ["assert f(1) == 2", {"input": "", "output": ""}]}, "of different forms"),
        ({"tests": [{"call": "f"}]}, "is no test"),
        ({"tests": ["assert f(1"]}, "is no Python"),
        ({"tests": ["assert f(1)"], "setup": "x ="}, "is no Python"),
        ({"tests": ["assert f(1)"], "setup": 5}, "`setup` is not text"),
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
    ],
)  # fmt: skip
def test_a_wrong_program_earns_0_whatever_it_says_of_itself(program, test):
    assert said(program, test).score == 0


def test_a_name_of_python_is_the_programs_where_a_test_calls_nothing_else():
    assert freed("assert sum(10, 15) == 25", "") == "sum"
    assert freed("assert gcd(10, 15) == 5", "") == "gcd"
    for test in ("assert f(2) == set([3])", "assert len(f(2)) == 1", "assert abs(s.f(2) - 5) < 1", "assert len(x) == 3"):
        assert freed(test, "") is None
    assert freed("assert len(dict) == 3", "dict = f()") is None


def test_a_function_of_the_tests_cannot_be_handed_over_and_that_is_said():
    found = CodeGrader(sandbox=TRUSTING).verdicts(problem("assert f(lambda x: x) == 1"), "def f(x):\n    return 1")
    assert "cannot be handed to the program" in found.why[0]


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
