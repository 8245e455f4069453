"""Graders: one rule for where the answer is, exact comparison, and no way to be paid for a guess. A failure is not a score."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.expressions import expression
from posttrain.paths import ASSETS
from posttrain.tasks import (
    ChoiceGrader,
    CountdownGrader,
    EquationsGrader,
    ExactGrader,
    FunctionGrader,
    Grader,
    JsonGrader,
    MathGrader,
    NumberGrader,
)
from posttrain.tasks.grader import checked
from posttrain.tasks.mathematics import _worker
from posttrain.tasks.worker import Worker, WorkerLost, WorkerMissing
from posttrain.text import Grade, Message, Problem, Sample


def problem(answer: str | None = None, **facts: Any) -> Problem:
    return Problem("p", (Message("user", "?"),), answer, facts, "f.jsonl:1")


def sample(text: str, answer: str | None = None) -> Sample:
    return Sample(problem(answer), 0, (1, 2), (False, True), (-0.5,), "end", text)


def shipped(name: str) -> list[dict[str, Any]]:
    path = ASSETS / "data" / name
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- the contract


class Odd(Grader):
    """Does what it is told to, as a user's grader might."""

    act: Callable[[], Any]

    def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(1.0) if text == "good" else self.act()


def raises(error: BaseException) -> Any:
    raise error


HERE = Path(__file__).name
LINE = raises.__code__.co_firstlineno + 1
BAD_GRADES = [
    (lambda: raises(ValueError("no such thing")), f"the grader raised ValueError: no such thing ({HERE}:{LINE})"),
    (lambda: raises(SystemExit(0)), f"the grader raised SystemExit: 0 ({HERE}:{LINE})"),
    (lambda: raises(RecursionError()), f"the grader raised RecursionError ({HERE}:{LINE})"),
    (lambda: None, "the grader returned None, not a Grade"),
    (lambda: 1.0, "the grader returned of type float, not a Grade"),
    (lambda: Grade(None), "the grader's score is None, not a number"),
    (lambda: Grade(float("nan")), "the grader's score is nan"),
    (lambda: Grade(float("-inf")), "the grader's score is -inf"),
    (lambda: Grade(True), "the grader's score is of type bool, not a number"),
    (lambda: Grade("1"), "the grader's score is of type str, not a number"),  # type: ignore[arg-type]
    (lambda: Grade(1.0, {"format": float("inf")}), "the grader's format is inf"),
    (lambda: Grade(1.0, failure="judge down"), "judge down"),
]


@pytest.mark.parametrize(("act", "failure"), BAD_GRADES)
def test_whatever_goes_wrong_in_one_grade_is_a_named_failure_of_that_one_only(act: Callable[[], Any], failure: str) -> None:
    grades = Odd(act=act).grade_all([sample("good"), sample("bad"), sample("good")])
    assert grades == [Grade(1.0), Grade(None, failure=failure), Grade(1.0)]


def test_an_interrupt_by_the_user_is_no_failure_of_a_grade() -> None:
    with pytest.raises(KeyboardInterrupt):
        Odd(act=lambda: raises(KeyboardInterrupt())).grade_all([sample("bad")])


def test_a_failure_fits_on_one_short_line() -> None:
    [grade] = Odd(act=lambda: raises(ValueError("x\n" * 5000))).grade_all([sample("bad")])
    assert grade.failure is not None
    assert len(grade.failure) == 300
    assert "\n" not in grade.failure


def test_a_negative_score_and_a_whole_number_are_scores() -> None:
    assert checked(Grade(-1.5, {"length": 3})) == Grade(-1.5, {"length": 3})
    assert checked(Grade(1)).score == 1


# ---------------------------------------------------------------- a function of one's own


def half(problem: Problem, text: str) -> float:
    return 0.5 if text == problem.answer else 0


def meddles(problem: Problem, text: str) -> float:
    problem.facts["numbers"].append(9)  # type: ignore[index]
    return float(len(problem.facts["numbers"]))


def answers_true(problem: Problem, text: str) -> bool:
    return True


def answers_nothing(problem: Problem, text: str) -> None:
    return None


def lazy(problem: Problem, text: str) -> Any:
    yield 1.0


RELEASED = threading.Event()


def never(problem: Problem, text: str) -> float:
    RELEASED.wait(30)
    return 1.0


def one_argument(text: str) -> float:
    return 1.0


def breaks(problem: Problem, text: str) -> float:
    return 1 / 0


def function(name: str) -> Grader:
    return Grader.model_validate({"kind": "function", "path": f"{__name__}:{name}"})


def test_a_plain_function_is_a_grader() -> None:
    assert [grade.score for grade in function("half").grade_all([sample("a", "a"), sample("b", "a")])] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("answers_true", "answers_true returned a value of type bool, not a number"),
        ("answers_nothing", "answers_nothing returned None, not a number"),
        ("breaks", f"breaks raised ZeroDivisionError: division by zero ({HERE}:{breaks.__code__.co_firstlineno + 1})"),
    ],
)
def test_what_a_function_gets_wrong_is_named(name: str, failure: str) -> None:
    grade = function(name).grade(problem("a"), "a")
    assert grade.score is None
    assert grade.failure == f"{__name__}:{failure}"


def test_a_function_that_never_answers_is_given_up_and_is_no_score() -> None:
    grade = FunctionGrader(path=f"{__name__}:never", seconds=0.2).grade(problem("a"), "a")
    assert grade == Grade(None, failure=f"{__name__}:never has not answered in 0.2 s")
    RELEASED.set()


def test_a_function_that_changes_its_arguments_changes_nothing_for_others() -> None:
    shared = problem(numbers=[1, 2])
    assert [function("meddles").grade(shared, "").score for _ in range(2)] == [3.0, 3.0]
    assert shared.facts["numbers"] == [1, 2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        (f"{__name__}:halv", "has no 'halv'; did you mean 'half'?"),
        (f"{__name__}:lazy", "is a coroutine or a generator"),
        (f"{__name__}:one_argument", r"cannot be called with (problem, text): (text: str) -> float"),
        (f"{__name__}:BAD_GRADES", "is a list, not a function"),
        ("half", "names no function; write `my_package.module:my_function`"),
    ],
)
def test_a_function_that_cannot_grade_is_refused_when_the_recipe_is_read(path: str, message: str) -> None:
    with pytest.raises(ValidationError) as error:
        FunctionGrader(path=path)
    assert message in str(error.value)


# ---------------------------------------------------------------- numbers

NUMBERS = [  # gold, completion, score
    ("72", "The answer is 72.", 1),
    ("72", "First 24, then 48; together 72", 1),
    ("72", "72 clips, not 71", 0),
    ("1000", "1,000", 1),
    ("1,000", "$1000.00 in all", 1),
    ("1000", "10,00", 0),
    ("1000", "1 000", 0),
    ("100", "1e2", 1),
    ("0.5", "it is .5", 1),
    ("5", "so it is...5", 1),
    ("0.1", "0.1000000000000000055511151231257827", 0),
    ("0", "-0", 1),
    ("-5", "x = -5", 1),
    ("5", "x = - 5", 0),
    ("-5", "5", 0),
    ("5", "+5", 1),
    ("72", "**72**", 1),
    ("72", "\\boxed{72}", 1),
    ("72", "$72$", 1),
    ("72", "72%", 1),
    ("72", "答案是72。", 1),
    ("72", "７２", 0),
    ("7", "7２", 0),
    ("5", "x5", 0),
    ("5", "1.2.5", 0),
    ("2", "1/2", 0),
    ("2", "\\frac{1}{2}", 0),
    ("2", "5 * 2", 0),
    ("2", "7 x 2", 0),
    ("5", "20 - 5", 0),
    ("10", "2^{10}", 0),
    ("30", "at 3:30", 0),
    ("0", "00", 0),
    ("9", "9^9^9^9", 0),
    ("1", "1e999999999999", 0),
    ("1", "", 0),
    ("1", "one", 0),
    *((gold, f"x = {dash}72", int(gold == "-72")) for gold in ("72", "-72") for dash in "–‐‑﹣－⁻−"),
    ("72", "it is minus 72", 0),
    ("72", "Negative 72", 0),
    ("25", "√25", 0),
    ("25", "\\sqrt{25}", 0),
    ("2", "3x + 2x", 0),
    ("2", "so 2π", 0),
    ("2", "2\\pi", 0),
    ("2", "1/√2", 0),
    ("72", "70–72", 0),
    ("1", "5 ± 1", 0),
    ("2", "1001000_2", 0),
    ("72", "72 m^2", 1),
    ("72", "72 cm^{2} in all", 1),
    ("2", "72 m^2", 0),
    ("2", "x^2", 0),
    ("4", "4 million to manage", 1),  # as GSM8K counts
    ("5", "<think>5</think>I refuse.", 0),
    ("5", "<think>It is 5", 0),
    ("5", "<think>3 + 2</think><answer>5</answer>", 1),
]


@pytest.mark.parametrize(("gold", "text", "score"), NUMBERS)
def test_the_last_number_is_the_answer_and_a_part_of_an_expression_is_none(gold: str, text: str, score: float) -> None:
    assert NumberGrader().grade(problem(gold), text) == Grade(score)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("#### 72", 1),
        ("71 it is.\n#### 72\nThe next question has 5 parts", 1),
        ("#### 71\n#### 72", 1),
        ("#### 72\n#### 71", 0),
        ("#### 71 72", 0),
        ("#### 72 71", 0),
        ("it is 72 ####", 0),
        ("#### $72.00.", 1),
        ("####", 0),
        ("it is 72", 1),
        ("#### 72 m^2", 1),
    ],
)
def test_what_follows_the_last_marker_is_the_answer_and_must_be_one_number(text: str, score: float) -> None:
    assert NumberGrader(marker="####").grade(problem("So 24 * 3\n#### 72"), text).score == score


def test_every_number_of_a_dump_but_the_last_counts_for_nothing() -> None:
    dump = " ".join(map(str, range(100)))
    assert sum(NumberGrader().grade(problem(str(gold)), dump).score or 0 for gold in range(100)) == 1  # gold 99, the last


def test_gold_that_is_no_number_is_named() -> None:
    assert NumberGrader().gold_problem(problem("72")) is None
    assert NumberGrader().gold_problem(problem()) == "it has no answer"
    assert NumberGrader().gold_problem(problem("many")) == "its answer 'many' is not a number"
    assert EquationsGrader().gold_problem(problem("5 6")) == "its answer '5 6' is not a number"


def test_all_gsm8k_solutions_with_their_final_line_are_right() -> None:
    grader, rows = NumberGrader(marker="####"), shipped("gsm8k_train.jsonl.gz")
    scores = [grader.grade(problem(row["answer"]), f"{row['solution']}\n#### {row['answer']}").score for row in rows]
    assert (len(scores), sum(scores)) == (7473, 7473)


def test_gsm8k_solutions_without_their_final_line_are_right_where_they_end_in_their_answer() -> None:
    """The shipped solutions lack the `#### 72` line. 209 of them end in another number ("6 miles on the 13th day", "... 16
    amoebae after 8 days"), and 17 hold the answer nowhere: no honest rule makes all of them right."""
    grader, rows = NumberGrader(marker="####"), shipped("gsm8k_train.jsonl.gz")
    assert sum(grader.grade(problem(row["answer"]), row["solution"]).score or 0 for row in rows) == 7264


EQUATIONS = [  # completion, score; gold 19
    ("13 - 7 = 6\n6 + 13 = 19", 1),
    ("6+13=19\n\n", 1),
    ("  6 + 13 = 19  \r\n", 1),
    ("19", 0),
    ("6 + 13 = 19\n19", 0),
    ("6 + 13 = 19 or 20", 0),
    ("6 + 13 = 18 = 19", 0),
    ("6 + 13 = 19.", 0),
    ("The answer: 6 + 13 = 19", 0),
    ("6 + 13 = 19\n1 + 1 = 2", 0),
    ("6 + 13 =", 0),
    ("= 19", 0),
    ("a + b = 19", 0),
    ("6 + 13 = １９", 0),
    ("6 + 13 = -19", 0),
    ("1 + 2 + 16 = 19", 0),
    ("", 0),
]


@pytest.mark.parametrize(("text", "score"), EQUATIONS)
def test_the_last_line_must_be_one_equation_with_the_answer(text: str, score: float) -> None:
    assert EquationsGrader().grade(problem("19"), text) == Grade(score)


@pytest.mark.parametrize(("name", "count"), [("arith_train.jsonl.gz", 8000), ("arith_test.jsonl", 500)])
def test_all_shipped_arithmetic_solutions_are_right(name: str, count: int) -> None:
    scores = [EquationsGrader().grade(problem(row["answer"]), row["solution"]).score for row in shipped(name)]
    assert (len(scores), sum(scores)) == (count, count)


# ---------------------------------------------------------------- countdown

COUNTDOWN = [  # completion, score; numbers 8, 1, 20; target 29
    ("20 + 1 + 8", 1),
    ("20+(1+8)", 1),
    ("20 + 1 + 8 = 29", 1),
    ("Let me try.\n20 - 8 is no good.\n20 + 1 + 8", 1),
    ("20 + 1 + 8 = 30", 0),
    ("20 + 9", 0),
    ("29", 0),
    ("20 + 8 + 1 + 1 - 1", 0),
    ("20 + 8 + 8 - 8 + 1", 0),
    ("20 + 1 + 8 = 29 = 29", 0),
    ("20 + 1 + 8 or 8 + 20 + 1", 0),
    ("the answer is 20 + 1 + 8", 0),
    ("20 + 1 + 8 # yes", 0),
    ("__import__('os').system('id')", 0),
    ("20 ** 1 + 8", 0),
    ("20 // 1 + 8", 0),
    ("-1 + 20 + 8", 0),
    ("20 1 + 8", 0),
    ("(20 + 1 + 8", 0),
    ("20 + 1 + 8)", 0),
    ("()", 0),
    ("２0 + 1 + 8", 0),
    ("", 0),
]


@pytest.mark.parametrize(("text", "score"), COUNTDOWN)
def test_an_expression_uses_each_number_once_and_reaches_the_target(text: str, score: float) -> None:
    assert CountdownGrader().grade(problem(numbers=[8, 1, 20], target=29), text) == Grade(score)


def test_arithmetic_is_exact_and_division_by_zero_is_no_value() -> None:
    assert expression("(1 / 3) * 3") == (Fraction(1), [1, 3, 3])
    assert expression("8 - 2 - 1") == (Fraction(5), [8, 2, 1])
    assert expression("8 / 2 / 2 + 2 * 3") == (Fraction(8), [8, 2, 2, 2, 3])
    assert expression("1 / (2 - 2)") is None


def test_expressions_too_long_or_too_deep_are_none_and_cost_nothing() -> None:
    start = time.perf_counter()
    assert expression("(" * 20 + "1" + ")" * 20) == (Fraction(1), [1])
    assert expression("(" * 21 + "1" + ")" * 21) is None
    assert expression("(" * 1_000_000) is None
    assert expression("1+" * 300 + "1") is None
    assert expression("9999999999999") is None
    assert time.perf_counter() - start < 1


def test_all_shipped_countdown_solutions_are_right() -> None:
    for name, count in (("countdown_train.jsonl.gz", 5000), ("countdown_test.jsonl", 400)):
        rows = shipped(name)
        scores = [
            CountdownGrader().grade(problem(numbers=row["numbers"], target=row["target"]), row["solution"]).score for row in rows
        ]
        assert (len(scores), sum(scores)) == (count, count)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"target": 3}, "its `numbers` are None, not a list of whole numbers"),
        ({"numbers": [1, "2"], "target": 3}, "its `numbers` are [1, '2'], not a list of whole numbers"),
        ({"numbers": [1, True], "target": 3}, "its `numbers` are [1, True], not a list of whole numbers"),
        ({"numbers": [1, 2]}, "its `target` is None, not a whole number"),
        ({"numbers": [1, 2], "target": 1.5}, "its `target` is 1.5, not a whole number"),
    ],
)
def test_a_countdown_problem_without_what_it_needs_is_named(facts: dict[str, Any], message: str) -> None:
    assert CountdownGrader().gold_problem(problem(**facts)) == message


# ---------------------------------------------------------------- exact and choice


def test_exact_forgives_white_space_and_on_request_case() -> None:
    gold = problem("New York")
    assert [ExactGrader().grade(gold, text).score for text in (" New\n York ", "new york", "New York!", "")] == [1, 0, 0, 0]
    assert ExactGrader(ignore_case=True).grade(gold, "new york").score == 1
    assert ExactGrader().grade(problem(" "), " ").score == 0
    assert ExactGrader().gold_problem(problem(" ")) == "it has no answer"


CHOICES = [  # completion, score; gold C of A-E
    ("C", 1),
    ("(C)", 1),
    ("C. a bank", 1),
    ("The answer is C.", 1),
    ("Answer: (C)", 1),
    ("\\boxed{C}", 1),
    ("A is wrong and B is too.\nSo the answer is C.", 1),
    ("c", 0),
    ("B", 0),
    ("C or D", 0),
    ("A, B, C, D, E", 0),
    ("The answer is C. The answer is D.", 0),
    ("Answer: C\nAnswer: D", 0),
    ("Answer:", 0),
    ("Cat", 0),
    ("F", 0),
    ("Answer:\nC", 1),
    ("The correct answer is:\n\n**C**", 1),
    ("**Answer:** C", 1),
    ("The answer is C. A bank is near.", 1),
    ("The answer is C, not A.", 1),
    ("The answer is C rather than A.", 1),
    ("<think>Maybe the answer is A.</think>\nThe answer is C.", 1),
    ("<think>The answer is C.", 0),
    ("<think>A?</think><answer>C</answer>", 1),
    ("答案是C", 1),
    ("选C。", 1),
    ("The answer is 'C'.", 1),
    ("_C_", 1),
    ("C\n\nExplanation: A is incorrect because it is wet.", 1),
    ("Let's see which answer is right.\nC", 1),
    ("A good answer is C", 1),
    ("C\nD", 0),
    ("C and maybe D\nD", 0),
    ("The answer is not C.", 0),
    ("Anything but C", 0),
    ("It isn't C.", 0),
    ("It is 20 °C", 0),
    ("The answer is A or C", 0),
    ("", 0),
]


@pytest.mark.parametrize(("text", "score"), CHOICES)
def test_one_label_is_an_answer_and_two_are_none(text: str, score: float) -> None:
    assert ChoiceGrader().grade(problem("C", labels=list("ABCDE")), text) == Grade(score)


def test_a_choice_needs_labels_and_an_answer_among_them() -> None:
    assert ChoiceGrader().gold_problem(problem("C")) == "it has no `labels`"
    assert ChoiceGrader(labels=["A", "B"]).gold_problem(problem("C")) == "its answer 'C' is none of A, B"
    assert ChoiceGrader(labels=["yes", "no"]).grade(problem("no"), "The answer is no.").score == 1


@pytest.mark.parametrize(("text", "score"), [
    ("A", 1), ("A is right.", 1), ("The answer is A because it is wet.", 1), ("(A) a bank", 1), ("A rough guess: I don't know.", 0),
    ("I am not sure. A refusal.", 0),
])  # fmt: skip
def test_the_article_is_no_label(text: str, score: float) -> None:
    assert ChoiceGrader(labels=["A", "B"]).grade(problem("A"), text).score == score


@pytest.mark.parametrize(("text", "score"), [("1", 1), ("The answer is 1.", 1), ("1.5", 0), ("-1", 0), ("1,000", 0), ("0.1", 0)])
def test_a_label_that_is_a_number_is_no_part_of_another_one(text: str, score: float) -> None:
    assert ChoiceGrader(labels=["1", "2"]).grade(problem("1"), text).score == score


# ---------------------------------------------------------------- mathematics

MATH = [  # gold, boxed answer, verdict; "mv": what math-verify alone says where it differs
    # fractions and decimals
    ("1/2", "0.5", 1),
    ("\\frac{1}{2}", "\\dfrac12", 1),
    ("\\frac{1}{2}", "\\frac{2}{4}", 1),
    ("-\\frac{1}{2}", "\\frac{-1}{2}", 1),
    ("\\frac{3}{2}", "1 1/2", 1),  # mv: 1 1/2 is 1
    ("1", "1 1/2", 0),  # mv: right
    ("\\frac{3}{2}", "1\\frac{1}{2}", 1),
    ("\\frac{1}{3}", "0.333", 0),
    ("\\frac{1}{3}", "0.33333333", 0),  # mv: right, rounds to six places
    ("\\frac{1}{3}", "0.333333333333333", 0),
    ("\\pi", "3.14159265", 0),  # mv: right
    ("3", "3.0", 1),
    ("3", "3.0000000000001", 0),
    ("0.1", "\\frac{1}{10}", 1),
    ("0.5", ".5", 1),
    ("0.5", "0,5", 0),
    # signs and zero
    ("0", "-0", 1),
    ("-3", "−3", 1),
    ("3", "-3", 0),
    ("5", "\\pm 5", 0),
    ("\\pm 5", "5, -5", 1),
    # thousands
    ("1000", "1,000", 1),
    ("1000", "1{,}000", 1),
    ("1000", "1\\,000", 1),  # mv: wrong, reads 1 * 0
    ("1000", "1.000", 0),
    ("1000", "10,00", 0),
    ("0", "1 000", 0),  # mv: right, reads 1 * 0
    ("11", "5\\quad 6", 0),  # mv: right, reads 5 + 6
    # percent
    ("50\\%", "0.5", 1),
    ("50\\%", "50", 1),
    ("50", "50\\%", 1),
    ("0.5", "50\\%", 1),
    ("0.5", "0.5\\%", 0),
    ("1", "1\\%", 0),  # mv: right
    # units
    ("5", "5\\text{ cm}", 1),
    ("5\\text{ cm}", "5", 1),
    ("5\\text{ cm}", "5\\text{ m}", 0),  # mv: right
    ("12", "12^\\circ", 1),
    ("18", "\\$18.00", 1),
    ("18", "18 dollars", 1),  # mv: wrong, reads letters as factors
    ("5", "5\\text{ million}", 0),  # mv: right
    ("5", "5\\text{ is wrong}", 0),  # mv: right
    ("5", "5\\text{ (or 6)}", 0),  # mv: right
    # intervals, points, sets
    ("(0,1]", "(0, 1]", 1),
    ("(0,1)", "[0,1]", 0),
    ("[0,1]", "0 \\le x \\le 1", 1),
    ("(-\\infty,3]", "x \\le 3", 1),
    ("(1,2)", "(2,1)", 0),
    ("(1,2)", "\\{1,2\\}", 0),  # mv: right
    ("\\{1,2\\}", "2, 1", 1),
    ("(-\\infty,2)\\cup(3,\\infty)", "(3,\\infty)\\cup(-\\infty,2)", 1),
    # expressions and equations
    ("2\\sqrt{2}", "\\sqrt{8}", 1),
    ("x+1", "1+x", 1),
    ("x^2+2x+1", "(x+1)^2", 1),
    ("x=5", "5", 1),
    ("5", "x=5", 1),
    ("5", "6=5", 0),  # mv: right
    ("5", "2+2=5", 0),  # mv: right
    ("y=2x+3", "2x+3", 1),
    ("1024", "2^{10}", 1),
    ("100000", "1 \\times 10^5", 1),
    ("101_2", "101_2", 1),
    ("101", "101_2", 0),  # mv: right
    ("1/3", "10:30", 0),  # mv: right
    # the question, or an unfinished calculation, is not an answer
    ("5", "4+1", 0),  # mv: right
    ("5", "\\sqrt{25}", 0),  # mv: right
    ("6", "\\int_0^6 1\\,dx", 0),  # mv: right
    ("55", "\\sum_{i=1}^{10} i", 0),  # mv: right
    ("120", "5!", 0),  # mv: right
    ("6", "2(3)", 0),
    ("5", "2(3)", 0),  # mv: right, adds what stands side by side
    ("7", "(3)(4)", 0),  # mv: right
    ("105", "100(5)", 0),  # mv: right
    ("7/3", "2(\\frac13)", 0),  # mv: right
    ("7", "3{4}", 0),  # mv: right
    ("7/3", "2\\frac13", 1),
    ("(x+1)(2x-3)", "(2x-3)(x+1)", 1),
    ("1/2", "\\frac1{2}", 1),
    ("\\sqrt[3]{2}", "\\sqrt[3]{2}", 1),
    ("3", "\\log_{2}8", 0),  # mv: right
    ("-1", "\\cos\\pi", 0),  # mv: right
    ("1/2", "\\sin(\\frac{\\pi}{6})", 0),  # mv: right
    ("9", "27^{2/3}", 0),  # mv: right
    ("-2", "\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}", 0),  # mv: right
    ("10", "{5 \\choose 2}", 0),  # mv: right
    ("2", "\\frac{\\frac12}{\\frac14}", 0),  # mv: right
    ("2", "e^{\\ln 2}", 0),  # mv: right
    ("2x", "\\frac{d x^2}{dx}", 0),  # mv: right
    ("2x", "\\frac{\\partial}{\\partial x} x^2", 0),  # mv: right
    ("\\ln 2", "\\ln(2)", 1),
    ("x=5", "4+1", 0),  # mv: right
    ("(5)", "\\sqrt{25}", 0),  # mv: right
    ("x=5", "x=4+1", 0),  # mv: right
    ("x=5", "x=6=5", 0),  # mv: right
    ("90^\\circ", "45+45", 0),  # mv: right
    ("90^\\circ", "90", 1),
    ("10^3", "500+500", 0),  # mv: right
    ("10^3", "1000", 1),
    ("2516_8", "2516_9", 0),  # mv: right
    ("43_5", "43_5, 43_6", 0),  # mv: right
    ("43_5", "43_{5}", 1),
    ("5", "5\\text{ millions}", 0),  # mv: right
    ("5", "5\\text{ squared}", 0),  # mv: right
    ("5", "5 tenths", 0),  # mv: right
    ("5", "5 months", 1),
    ("50", "50 percent", 1),
    ("0.5", "50\\text{ percent}", 1),
    ("0.5", "0.5 percent", 0),
    ("\\emptyset", "-\\infty<x<\\infty", 0),  # mv: right
    ("\\emptyset", "\\varnothing", 1),
    ("5", "5\\,", 1),
    # words
    ("\\text{(C)}", "C", 1),
    ("\\text{(C)}", "\\textbf{(C)}", 1),
    ("\\text{(C)}", "D", 0),
    ("\\text{Monday}", "monday", 1),
    ("\\text{Monday}", "\\text{Tuesday}", 0),
    ("Monday", "dayMon", 0),  # mv: right, multiplies letters
    ("A", "\\text{(A)}", 1),
    ("B", "A", 0),
    ("7", "\\text{seven}", 0),
    # hedging and rubbish
    ("5", "5 or 6", 0),
    ("5", "5, 6", 0),
    ("5", "5, 5", 0),  # mv: right
    ("5", "x \\neq 5", 0),
    ("5", "x > 5", 0),
    ("7", "７", 0),
    ("1", "\\frac{1}{", 0),
    ("1", "}{", 0),
    ("1", "", 0),
    ("1", "True", 0),
    ("0", "\\frac{0}{0}", 0),
    ("0", "\\infty-\\infty", 0),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", 1),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\4&3\\end{bmatrix}", 0),
]


@pytest.mark.parametrize(("gold", "answer", "score"), MATH)
def test_answers_are_compared_as_mathematics(gold: str, answer: str, score: float) -> None:
    assert MathGrader().grade(problem(gold), f"So it is $\\boxed{{{answer}}}$.") == Grade(score)


COMPLETIONS = [  # completion, score; gold 1/2
    ("\\boxed{\\frac{1}{2}}", 1),
    ("\\boxed{\\frac{1}{2}} and so \\boxed{ \\frac{1}{2} }", 1),
    ("\\boxed{\\frac{1}{2}}, that is \\boxed{0.5}", 1),
    ("\\boxed{1}, no, \\boxed{\\frac{1}{2}}", 0),
    ("\\boxed{\\frac{1}{2}} or \\boxed{1}", 0),
    (" ".join(f"\\boxed{{1/{number}}}" for number in range(1, 50)), 0),
    ("<think>\\boxed{3}? No.</think> \\boxed{1/2}", 1),
    ("\\boxed{1/2} then \\boxed{1/", 0),
    ("\\boxed{\\boxed{1/2}}", 1),
    ("\\boxed{1/2", 0),
    ("\\boxed", 0),
    ("The answer is 1/2.", 1),
    ("The answer is $\\frac12$.", 1),
    ("Answer: 0.5", 1),
    ("Hence $x = 0.5$.", 1),
    ("It comes to 0.5", 1),
    ("The answer is **1/2**.", 1),
    ("**Answer:** 1/2", 1),
    ("The answer is 1/2, since 1 + 1 = 2.", 1),
    ("The answer is 1/2.\n\nHope that helps!", 1),
    ("The answer is 1/2.\nNo, it is 3", 0),
    ("<think>so</think><answer>1/2</answer>", 1),
    ("<think>so</think>\n<answer>\n0.5\n</answer>", 1),
    ("<think>\\boxed{0.5}", 0),
    ("<think>The answer is 0.5", 0),
    ("<answer>0.5</answer><answer>3</answer>", 0),
    ("The answer is 1/2 or 1/3.", 0),
    ("The answer is 1/2.\nNo, the answer is 1/3.", 0),
    ("def f():\n    return 0.25", 0),
    ("", 0),
    ("\\", 0),
    ("$$$$", 0),
]


@pytest.mark.parametrize(("text", "score"), COMPLETIONS)
def test_a_completion_commits_to_one_answer(text: str, score: float) -> None:
    assert MathGrader().grade(problem("\\frac{1}{2}"), text) == Grade(score)


BOMBS = [
    "9^9^9^9",
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "99999^{99999}",
    "\\frac{1}{10^{10^{10}}}",
    "0.1^{10^{9}}",
    "(((9^9)^9)^9)^9",
    "x^{x^{x^x}}",
    "(x+1)^{9999}",
    "10^{10}!",
    "\\sum_{i=1}^{10^{10}} i^{i}",
    "(" * 140 + "1" + ")" * 140,
    "\\frac{1}{" * 40 + "2" + "}" * 40,
    "\\sqrt{" * 40 + "x" + "}" * 40,
    "1," * 140,
    "9" * 250 + "^{" + "9" * 40 + "}",
    "__import__('os').system('touch /tmp/posttrain-was-here')",
    "exec(\"open('/tmp/posttrain-was-here','w')\")",
    "(lambda: 1)()",
    "print(1)",
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:24])
def test_bombs_and_code_earn_nothing_and_end(bomb: str) -> None:
    MathGrader().grade(problem("1"), "\\boxed{1}")  # the process is there
    start = time.perf_counter()
    grade = MathGrader(seconds=0.5).grade(problem("1"), f"\\boxed{{{bomb}}}")
    assert grade.score == 0
    assert time.perf_counter() - start < 10  # a busy machine; about one second on a free one
    assert not os.path.exists("/tmp/posttrain-was-here")


def test_an_answer_that_hangs_earns_nothing_and_the_next_one_is_graded() -> None:
    grader = MathGrader(seconds=0.5)
    assert grader.grade(problem("1"), "\\boxed{10^{10^{10}}}") == Grade(0.0, {"too_slow": 1.0})
    before = _worker()._process
    assert grader.grade(problem("1"), "\\boxed{1}") == Grade(1.0)
    assert grader.grade(problem("x+1"), "\\boxed{1+x}") == Grade(1.0)
    assert _worker()._process is before, "one process serves many grades"


def test_the_process_is_ended_by_the_kernel_and_if_not_by_the_clock() -> None:
    bomb = {"gold": "1", "answers": ["10^{10^{10}}"]}
    with pytest.raises(WorkerLost, match="it ended"):
        _worker().ask({**bomb, "seconds": 0.3}, 60)
    with pytest.raises(WorkerLost, match=r"no answer in 0\.3 s"):
        _worker().ask({**bomb, "seconds": 60}, 0.3)


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("import no_such_library")
    with pytest.raises(WorkerMissing, match=r"broken did not start \(it ended\): ModuleNotFoundError: No module named 'no_such"):
        Worker(script).ask({}, 1)


def test_a_process_that_was_killed_between_grades_costs_no_grade() -> None:
    grader = MathGrader()
    assert grader.grade(problem("x+1"), "\\boxed{1+x}") == Grade(1.0)
    process = _worker()._process
    assert process is not None
    process.kill()
    process.wait()
    assert grader.grade(problem("x+1"), "\\boxed{1+x}") == Grade(1.0)
    assert _worker()._process is not process


def test_a_process_that_is_killed_while_it_compares_is_a_failure_and_no_score() -> None:
    grader = MathGrader(seconds=20)
    assert grader.grade(problem("x+1"), "\\boxed{1+x}") == Grade(1.0)
    process = _worker()._process
    assert process is not None
    threading.Timer(0.3, process.kill).start()
    grade = grader.grade(problem("1"), "\\boxed{10^{10^{10}}}")
    assert grade == Grade(None, failure="math_worker was killed from outside; is the machine out of memory?")
    assert grader.grade(problem("x+1"), "\\boxed{1+x}") == Grade(1.0)


def test_grades_come_from_any_thread() -> None:
    grades: list[Grade] = []

    def work() -> None:
        grades.extend(MathGrader(seconds=0.5).grade(problem("1/2"), f"\\boxed{{{answer}}}") for answer in ("0.5", "9^{9^{9^9}}"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(grade.score for grade in grades if grade.score is not None) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("gold", ["\\frac{1}{", "\\text{", "^", "{}{}{"])
def test_gold_that_cannot_be_read_is_a_failure_and_never_a_score(gold: str) -> None:
    for text in ("\\boxed{1}", f"\\boxed{{{gold}}}", ""):
        grade = MathGrader().grade(problem(gold), text)
        assert (grade.score, grade.failure) == (None, f"the answer of the problem cannot be read as mathematics: {gold!r}")


def test_a_problem_without_an_answer_cannot_be_graded() -> None:
    assert MathGrader().gold_problem(problem()) == "it has no answer"
    assert MathGrader().gold_problem(problem("$ $")) == "it has no answer"
    assert MathGrader().gold_problem(problem("x" * 5000)) == "its answer is longer than 1200 characters"
    assert MathGrader().grade(problem(" "), "\\boxed{1}") == Grade(None, failure="it has no answer")
    assert MathGrader().gold_problem(problem("1/2")) is None


PIECES = ["1", "1,", "1+", "- ", "1e", "(", "=-", "$", "1 ", "}{", "####", "\n", "\\boxed{", "\\boxed{1}", "answer is ", " "]
PIECES += ["```x\n", "<answer>", "A a. "]
LONG = [piece * (1_000_000 // len(piece)) for piece in PIECES]
PATIENT = [JsonGrader(), NumberGrader(marker="####"), EquationsGrader(), CountdownGrader(), ChoiceGrader(labels=["A", "B"]), MathGrader()]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:9]))
@pytest.mark.parametrize("grader", [*PATIENT, ExactGrader()], ids=lambda grader: grader.kind)
def test_a_million_letters_take_about_a_second_at_most(grader: Grader, text: str) -> None:
    start = time.perf_counter()
    assert grader.grade(problem("5", numbers=[1], target=2), text) == Grade(0.0)
    assert time.perf_counter() - start < 10  # a busy machine; under half a second on a free one; a quadratic rule takes hours


def test_importing_the_graders_loads_neither_torch_nor_math_verify() -> None:
    heavy = ("torch", "transformers", "math_verify", "sympy", "datasets", "pyarrow")
    code = f"import sys, posttrain.tasks; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
