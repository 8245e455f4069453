"""Worked arithmetic with a label for every step, for process reward models: `python recipes/arith_steps_data.py OUT_FOLDER`.

Rows 2000:7000 of the shipped `arith_train.jsonl.gz` give 2,716 problems to learn from, each with its solution and with a wrong
one; rows 7000:7800 give 300 to test with, half of them wrong. In a wrong solution one step's result is changed a little, later
steps carry the wrong number on without a further slip, and every step from the wrong one on is labelled false. Running it again
gives the same bytes.
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.data.source import File
from posttrain.draws import key

SOURCE = "posttrain:data/arith_train.jsonl.gz"
FILES = {"arith_steps.jsonl.gz": ("2000:7000", None), "arith_steps_test.jsonl": ("7000:7800", 300)}
CHANGES = (-10, -2, -1, 1, 2, 10)
Line = tuple[int, str, int, int]  # left, sign, right, result


def lines_of(solution: str) -> list[Line]:
    found = [re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line) for line in solution.split("\n")]
    return [(int(each[1]), each[2], int(each[3]), int(each[4])) for each in found if each]


def result(left: int, sign: str, right: int) -> int | None:
    """What a line comes to; None where that is no natural number."""
    if sign == "/":
        return left // right if right and left % right == 0 else None
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return value if value >= 0 else None


def is_plain(lines: list[Line], prompt: str) -> bool:
    """Whether it is beyond doubt which numbers are earlier results: each but the last is used once and not in the prompt."""
    given = {int(number) for number in re.findall(r"\d+", prompt)}
    results = [line[3] for line in lines[:-1]]
    used = [number for left, _, right, _ in lines[1:] for number in (left, right) if number in results]
    return not given & set(results) and sorted(used) == sorted(results)


def carried(lines: list[Line], wrong: int, change: int) -> list[Line] | None:
    """The lines with a slip in the result of one, and what follows from it; None where some number would be no natural one."""
    now: dict[int, int] = {}  # the results that have become others
    changed: list[Line] = []
    for index, (left, sign, right, before) in enumerate(lines):
        left, right = now.get(left, left), now.get(right, right)
        after = before + change if index == wrong else result(left, sign, right)
        if after is None or after < 0:
            return None
        if after != before:
            now[before] = after
        changed.append((left, sign, right, after))
    return changed


def slipped(name: str, lines: list[Line]) -> tuple[list[Line], int] | None:
    """The lines with a slip somewhere, and where."""
    places = sorted(range(len(lines)), key=lambda place: key(0, "slip", name, place))
    changes = sorted(CHANGES, key=lambda change: key(0, "change", name, change))
    tried = ((carried(lines, place, change), place) for place in places for change in changes)
    return next(((found, place) for found, place in tried if found), None)


def rows(span: str, count: int | None) -> Iterator[dict[str, Any]]:
    """The first `count` problems, half of them wrong; or all, each both right and wrong."""
    problems: dict[str, tuple[Any, list[Line], tuple[list[Line], int]]] = {}
    for raw in File(path=SOURCE, rows=span).read():
        lines, prompt = lines_of(raw.value["solution"]), raw.value["prompt"][-1]["content"]
        slip = slipped(raw.value["id"], lines)
        if count is not None and len(problems) == count:
            break
        if raw.value["steps"] >= 2 and is_plain(lines, prompt) and slip:
            problems[raw.value["id"]] = (raw.value["prompt"], lines, slip)
    wrong = set(sorted(problems, key=lambda name: key(0, "wrong", name))[: (count or 0) // 2])
    for name, (prompt, lines, slip) in problems.items():
        right = lines, len(lines)
        for said, first in (right, slip) if count is None else (slip,) if name in wrong else (right,):
            yield {
                "id": name.replace("arith-train", "arith-steps") + ("-slip" if said is slip[0] and count is None else ""),
                "prompt": prompt,
                "steps": ["{} {} {} = {}".format(*line) for line in said],
                "labels": [index < first for index in range(len(said))],
            }


def main(folder: str) -> None:
    for name, (span, count) in FILES.items():
        text = "".join(json.dumps(row) + "\n" for row in rows(span, count)).encode()
        with (Path(folder) / name).open("wb") as file:
            if name.endswith(".gz"):
                with gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
                    packed.write(text)
            else:
                file.write(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
