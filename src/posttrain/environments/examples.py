"""Sums that are too large for the head of a small model, and how they are worked: with a calculator, or without."""

from collections.abc import Iterator
from typing import Any, Literal

from posttrain import draws
from posttrain.environments.tools import calculate

FORMS = (
    ("What is {a} + {b}?", "{a} + {b}"),
    ("What is {a} * {c}?", "{a} * {c}"),
    ("Work out {a} * {c} + {b}.", "{a} * {c} + {b}"),
    ("Mia has {a} shells and finds {c} boxes with {d} shells each. How many shells are there now?", "{c} * {d} + {a}"),
    ("A shop has {c} shelves with {d} books each and sells {e} books. How many books are left?", "{c} * {d} - {e}"),
    ("Sam walks {a} steps on Monday, {b} on Tuesday and {d} on Wednesday. How many steps are that?", "{a} + {b} + {d}"),
)


def sums(
    count: int = 500, seed: int = 0, worked: Literal["calls", "head"] | None = None, tool: str = "calculator"
) -> Iterator[dict[str, Any]]:
    """Problems with numbers of two to four digits; as conversations where they are `worked`.

    calls: the expression is handed to the tool, written as a tag, and what it gives is the answer. head: line by line,
    `a * c = x`, as a person would write it down.
    """
    for number in range(count):
        generator = draws.generator(seed, "sums", number)
        low, high = (100, 12), (999, 99)
        a, b, c, d = (int(generator.integers(low[place // 2], high[place // 2] + 1)) for place in range(4))
        asked, formula = FORMS[int(generator.integers(len(FORMS)))]
        values = {"a": a, "b": b, "c": c, "d": d, "e": c * d // 3}
        prompt, expression = asked.format(**values), formula.format(**values)
        row = {"id": f"sum-{seed}-{number}", "answer": calculate(expression)}
        if worked is None:
            yield {**row, "prompt": prompt}
            continue
        said = [("assistant", f"<{tool}>{expression}</{tool}>"), ("tool", row["answer"]), ("assistant", row["answer"])]
        if worked == "head":
            said = [("assistant", "\n".join(lines(expression)))]
        yield {"id": row["id"], "messages": [{"role": role, "content": text} for role, text in (("user", prompt), *said)]}


def lines(expression: str) -> list[str]:
    """`12 * 3 + 4` as `12 * 3 = 36` and `36 + 4 = 40`: from left to right, which is right where products come first."""
    left, *rest = expression.split(" ")
    found = []
    for sign, right in zip(rest[::2], rest[1::2], strict=True):
        value = calculate(f"{left} {sign} {right}")
        found.append(f"{left} {sign} {right} = {value}")
        left = value
    return found
