"""Programs graded a second, each in a sandbox of its own: `python -m benchmarks.programs [--rounds 3]`."""

import argparse
import os
import time
from statistics import median

from posttrain.tasks import CodeGrader, CodeTask
from posttrain.text import Message, Problem, Sample

COUNT, PROGRAM = 200, "def add(a, b):\n    return a + b"
TESTS = {"one assert": "assert add(2, 3) == 5", "one call": {"call": "add", "args": [2, 3], "expected": 5}}


def rate(grader: CodeGrader, work: list[tuple[Problem, str]]) -> float:
    began = time.perf_counter()
    grades = grader.grade_all([Sample(problem, 0, (), (), (), "end", program) for problem, program in work])
    if not all(grade.score == 1 for grade in grades):
        raise SystemExit("a program that is right was not graded so")
    return len(work) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    grader, task = CodeGrader(), CodeTask()
    grader.check()
    works = {
        name: [(Problem("add", (Message("user", "?"),), None, {"tests": [test]}, "here"), PROGRAM)] * COUNT
        for name, test in TESTS.items()
    } | {"MBPP, three asserts": [(each, str(each.facts["solution"])) for each in task.problems()[:COUNT]]}
    print(f"{os.cpu_count()} cores, medians of {rounds} rounds\n\n| tests | programs a second |\n|---|---|")
    for name, work in works.items():
        print(f"| {name} | {median(rate(grader, work) for _ in range(rounds)):.0f} |")


if __name__ == "__main__":
    main()
