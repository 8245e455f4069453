"""The countdown grader: an expression that uses each number once and reaches the target. Parsed by hand, never evaluated."""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from posttrain.tasks.grader import Grade, Grader, score
from posttrain.text import Problem

MAX_LETTERS = 400
MAX_DEPTH = 20

_TOKEN = re.compile(r"[0-9]{1,12}|[-+*/()]")
_LINE = re.compile(r"[-+*/() \t0-9]+")


class CountdownGrader(Grader, kind="countdown"):
    """1 where the last line is an expression that uses each given number once and equals the target.

    Whole numbers, + - * / and brackets; exact arithmetic with fractions. The line may end in `= target`, and nothing else may
    stand on it. The problem has the columns `numbers` and `target`; any expression that fits is right.
    """

    def grade(self, problem: Problem, text: str) -> Grade:
        numbers, target = problem.facts["numbers"], problem.facts["target"]
        line = next((line for line in reversed(text.splitlines()) if line.strip()), "").strip()
        left, equals, right = line.partition("=")
        if equals and right.strip() != str(target):
            return score(False)
        found = expression(left)
        return score(found is not None and found[0] == target and sorted(found[1]) == sorted(numbers))

    def gold_problem(self, problem: Problem) -> str | None:
        numbers, target = problem.facts.get("numbers"), problem.facts.get("target")
        if not isinstance(numbers, list | tuple) or not numbers or not all(map(_whole, numbers)):
            return f"its `numbers` are {numbers!r}, not a list of whole numbers"[:200]
        return None if _whole(target) else f"its `target` is {target!r}, not a whole number"[:200]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def expression(text: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression and the numbers in it; None where it is none, is too long or too deep, or divides by zero."""
    text = text.strip()
    if len(text) > MAX_LETTERS or not _LINE.fullmatch(text):
        return None
    try:
        return _Parser(text).whole()
    except (ValueError, ZeroDivisionError):
        return None


class _Parser:
    """sum = product {(+|-) product}; product = atom {(*|/) atom}; atom = number | ( sum )."""

    def __init__(self, text: str) -> None:
        self.tokens: Iterator[str] = iter(_TOKEN.findall(text))
        self.numbers: list[int] = []
        self.next = ""
        self.advance()

    def advance(self) -> str:
        """Takes the next token; the empty one stands for the end."""
        taken, self.next = self.next, next(self.tokens, "")
        return taken

    def whole(self) -> tuple[Fraction, list[int]]:
        value = self.sum(0)
        if self.next:
            raise ValueError(f"something follows the expression: {self.next}")
        return value, self.numbers

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next in {"+", "-"}:
            value = value + self.product(depth) if self.advance() == "+" else value - self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.next in {"*", "/"}:
            value = value * self.atom(depth) if self.advance() == "*" else value / self.atom(depth)
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.advance()
        if token.isdigit():
            self.numbers.append(int(token))
            return Fraction(int(token))
        if token != "(" or depth == MAX_DEPTH:
            raise ValueError(f"no number at {token!r}, or brackets too deep")
        value = self.sum(depth + 1)
        if self.advance() != ")":
            raise ValueError("a bracket is not closed")
        return value
