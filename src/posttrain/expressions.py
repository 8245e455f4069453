"""Arithmetic in text: parsed by hand, never evaluated, and exact."""

import re
from collections.abc import Iterator
from fractions import Fraction

MAX_LETTERS = 400
MAX_DEPTH = 20

_TOKEN = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,12})?|[-+*/()]")
_LINE = re.compile(r"[-+*/() \t0-9.]+")


def expression(text: str, signs: bool = False) -> tuple[Fraction, list[Fraction]] | None:
    """The value of an expression and the numbers in it: + - * / and brackets; None where it is none, is too long or too deep, or
    divides by zero. signs: whether a number may have a minus before it."""
    text = text.strip()
    if len(text) > MAX_LETTERS or not _LINE.fullmatch(text) or _TOKEN.sub("", text).strip(" \t"):
        return None
    try:
        return _Parser(text, signs).whole()
    except (ValueError, ZeroDivisionError):
        return None


def decimal(value: Fraction, digits: int = 6) -> str:
    """As people write it: `12`, `-0.25`, and where it has no end `0.333333`, rounded."""
    if value.denominator == 1:
        return str(value.numerator)
    whole = round(abs(value) * 10**digits)
    if not whole:
        return "0"
    places = f"{whole % 10**digits:0{digits}d}".rstrip("0")
    return f"{'-' if value < 0 else ''}{whole // 10**digits}{'.' + places if places else ''}"


class _Parser:
    """sum = product {(+|-) product}; product = atom {(*|/) atom}; atom = number | ( sum ) | - atom, with signs."""

    def __init__(self, text: str, signs: bool) -> None:
        self.tokens: Iterator[str] = iter(_TOKEN.findall(text))
        self.signs = signs
        self.numbers: list[Fraction] = []
        self.next = ""
        self.advance()

    def advance(self) -> str:
        """Takes the next token; the empty one stands for the end."""
        taken, self.next = self.next, next(self.tokens, "")
        return taken

    def whole(self) -> tuple[Fraction, list[Fraction]]:
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
        if token[:1].isdigit():
            self.numbers.append(Fraction(token))
            return self.numbers[-1]
        if depth == MAX_DEPTH:
            raise ValueError("too deep")
        if token == "-" and self.signs:
            return -self.atom(depth + 1)
        if token != "(":
            raise ValueError(f"no number at {token!r}")
        value = self.sum(depth + 1)
        if self.advance() != ")":
            raise ValueError("a bracket is not closed")
        return value
