"""Graders of plain numbers. Numbers are compared exactly, as decimals; the answer is one number, found by one rule.

A number here is written in ASCII digits, with an optional sign, thousands separators in the right places (1,234,567), a
decimal part and an exponent. A number that is joined to another by an operator (`5 * 2`, `1/2`, `3:30`), or to a letter or a
word that makes another number of it (`2x`, `√2`, `minus 5`), is a part of an expression, and no answer:
otherwise `10 / 5` would earn what 5 earns. The exponent of a unit (`72 m^2`) is no number.
"""

import re
from collections import deque
from decimal import Decimal

from posttrain.answer import answer_of
from posttrain.tasks.grader import Grade, Grader, score
from posttrain.text import Problem

MAX_LETTERS = 64  # a number that is longer than this is no answer to anything
MAX_LINE = 1000

_DIGITS = r"(?:\d++(?:[.,]\d++)*+|(?<!\.)\.\d++)(?:[eE][-+]?\d++)?+"
_MONEY = r"(?:\\?[$£€¥₹])?+"
_MINUS = "-−‐‑–﹣－⁻"
_OPERAND = rf"(?:(?:(?<=[=:(]) ?|\A)[{_MINUS}] ?|[{_MINUS}+])?+{_MONEY}[{_MINUS}]?+{_DIGITS}"
_JOIN = rf"[ \t]{{0,3}}(?:\*\*|[{_MINUS}+*/^×÷·]|[xX](?=[ \t]{{0,3}}[\d.$])|(?<=\d):(?=\d)|\}}\{{)[ \t]{{0,3}}"
_RUN = re.compile(rf"(?<![A-Za-z\d])(?<!\d[.,]){_OPERAND}(?:{_JOIN}{_MONEY}[({{]?+{_DIGITS})*+")
_PLAIN = re.compile(
    rf"([{_MINUS}+]?) ?\\?[$£€¥₹]?([{_MINUS}]?)"
    r"((?:0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{3})+|(?=\.))(?:\.[0-9]+)?)(?:[eE]([-+]?[0-9]{1,3}))?"
)
_MADE_OTHER = re.compile(  # by what stands before it
    r"(?i)(?:√|\\sqrt(?:\[\d\])?|±|\\pm|\^|(?<=\d)_|\bminus|\bnegative|\bplus)[ {(]{0,2}\Z"
)
_MAKES_OTHER = re.compile(r"[xyzn](?![A-Za-z])|[πθ√±]|\\(?:pi|sqrt|pm|cdot|times)\b|_\{?\d")  # by what stands behind it
_UNIT_POWER = re.compile(r"(?<![A-Za-z])([a-z]{1,4})\^(?:[23](?!\d)|\{[23]\})")
_EQUATION = re.compile(r"\s*(-?[0-9]{1,15})\s*([-+*/])\s*(-?[0-9]{1,15})\s*=\s*(-?[0-9]{1,15})\s*")


def number(text: str) -> Decimal | None:
    """The number that the whole of `text` is; None where it is none."""
    text = text.strip()
    found = _PLAIN.fullmatch(text) if len(text) <= MAX_LETTERS else None
    if not found or (found[1] and found[2]):
        return None
    value = Decimal(found[3].replace(",", "") + f"e{found[4] or 0}")
    return value.copy_negate() if (found[1] + found[2]).strip("+") else value


def numbers(text: str) -> list[Decimal | None]:
    """The numbers that stand in `text`, in order; None for what has digits but is no plain number."""
    text = _UNIT_POWER.sub(r"\1", text)
    return [_of_run(run) for run in _RUN.finditer(text)]


def last_number(text: str) -> Decimal | None:
    """The last number of `text`; None where there is none, or where the last digits are no plain number."""
    last = deque(_RUN.finditer(_UNIT_POWER.sub(r"\1", text)), maxlen=1)
    return _of_run(last[0]) if last else None


def _of_run(run: re.Match[str]) -> Decimal | None:
    """The number of a match, unless what stands beside it makes another one of it."""
    other = _MADE_OTHER.search(run.string[max(0, run.start() - 12) : run.start()]) or _MAKES_OTHER.match(run.string, run.end())
    return None if other else number(run[0])


class NumberGrader(Grader, kind="number"):
    r"""1 where the last number of the completion equals the answer exactly.

    A thought is not searched. With a `marker`, a completion that has it is judged by what follows the last one on its line,
    which must hold one number and no more. Gold may hold the marker too, as the answers of GSM8K's own files do.
    """

    marker: str | None = None
    """A sign that the final answer follows, such as `####`."""

    def grade(self, problem: Problem, text: str) -> Grade:
        answer = self._answer(text)
        return score(answer is not None and answer == self._gold(problem))

    def gold_problem(self, problem: Problem) -> str | None:
        if problem.answer is None:
            return "it has no answer"
        return None if self._gold(problem) is not None else f"its answer {problem.answer[:80]!r} is not a number"

    def _gold(self, problem: Problem) -> Decimal | None:
        gold = problem.answer or ""
        return number(gold.rpartition(self.marker)[2] if self.marker else gold)

    def _answer(self, text: str) -> Decimal | None:
        text = answer_of(text)
        if self.marker and self.marker in text:
            line = text.rpartition(self.marker)[2].lstrip().partition("\n")[0]
            found = numbers(line[:MAX_LINE])
            return found[0] if len(found) == 1 else None
        return last_number(text)


class EquationsGrader(Grader, kind="equations"):
    """1 where the last line is `a + b = c` and c equals the answer.

    The working may have any number of lines. Only the last one that is not blank counts, and it must be one equation of whole
    numbers with one operator (+ - * /): a bare number, a chain (`1 + 1 = 2 = 3`) or words beside it earn 0. Whether the
    equations hold is not judged, only whether the last result is right.
    """

    def grade(self, problem: Problem, text: str) -> Grade:
        line = next((line for line in reversed(answer_of(text).splitlines()) if line.strip()), "")
        equation = _EQUATION.fullmatch(line)
        return score(equation is not None and Decimal(equation[4]) == number(problem.answer or ""))

    def gold_problem(self, problem: Problem) -> str | None:
        if problem.answer is None:
            return "it has no answer"
        return None if number(problem.answer) is not None else f"its answer {problem.answer[:80]!r} is not a number"
