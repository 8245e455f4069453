"""The countdown grader: an expression that uses each number once and reaches the target. Parsed by hand, never evaluated."""

from typing import Any

from posttrain.answer import answer_of
from posttrain.expressions import expression
from posttrain.tasks.grader import Grade, Grader, score
from posttrain.text import Problem


class CountdownGrader(Grader, kind="countdown"):
    """1 where the last line is an expression that uses each given number once and equals the target.

    Whole numbers, + - * / and brackets; exact arithmetic with fractions. The line may end in `= target`, and nothing else may
    stand on it. The problem has the columns `numbers` and `target`; any expression that fits is right.
    """

    def grade(self, problem: Problem, text: str) -> Grade:
        numbers, target = problem.facts["numbers"], problem.facts["target"]
        line = next((line for line in reversed(answer_of(text).splitlines()) if line.strip()), "").strip()
        left, equals, right = line.partition("=")
        if equals and right.strip() != str(target):
            return score(False)
        found = None if "." in left else expression(left)
        return score(found is not None and found[0] == target and sorted(found[1]) == sorted(numbers))

    def gold_problem(self, problem: Problem) -> str | None:
        numbers, target = problem.facts.get("numbers"), problem.facts.get("target")
        if not isinstance(numbers, list | tuple) or not numbers or not all(map(_whole, numbers)):
            return f"its `numbers` are {numbers!r}, not a list of whole numbers"[:200]
        return None if _whole(target) else f"its `target` is {target!r}, not a whole number"[:200]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
