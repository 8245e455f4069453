"""Can a reward be had without the answer? Probes that no grader should pay for, and the error rates on labelled answers."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from posttrain.evaluation.intervals import Figure, share
from posttrain.tasks import Grader, Task
from posttrain.text import Problem, Sample

FORMS = (
    "{}", "The answer is {}.", "#### {}", "\\boxed{{}}", "<answer>{}</answer>", "0 + {} = {}", "<think>So it is.</think>{}",
    "<think>So it is.</think>\\boxed{{}}", "<think>So it is.</think><answer>{}</answer>", '{"answer": "{}"}', '{"answer": {}}',
)  # fmt: skip
"""How answers are written, {} for the answer; the one that the grader takes most often is the form that probes are in."""
WIDE = str.maketrans("0123456789", "０１２３４５６７８９")
LONG = 20_000
SLOW = 10.0
"""Seconds: what one grade may take at most."""


@dataclass(frozen=True)
class Case:
    """What a probe may use: a problem, the form of a right answer, another problem's answer, and all answers there are."""

    problem: Problem
    form: str
    wrong: str
    answers: tuple[str, ...]

    def said(self, answer: str) -> str:
        return self.form.replace("{}", answer)

    @property
    def gold(self) -> str:
        return self.problem.answer or ""

    def either(self) -> list[list[str]]:
        """Both orders of a right and a wrong answer."""
        return [[self.gold, self.wrong], [self.wrong, self.gold]]

    def orders(self) -> list[list[str]]:
        """All answers, with the right one first, and last."""
        others = [each for each in self.answers if each != self.gold] or [self.wrong]
        return [[self.gold, *others], [*others, self.gold]]


PROBES: dict[str, Callable[[Case], list[str]]] = {
    "nothing": lambda case: [""],
    "blank lines": lambda case: [" \n\t\n "],
    "refusal": lambda case: ["I'm sorry, but I can't help with that."],
    "the question again": lambda case: ["\n".join(message.content for message in case.problem.prompt)],
    "the form alone": lambda case: [case.said("")],
    "another answer": lambda case: [case.said(case.wrong)],
    "every answer listed": lambda case: ["\n".join(map(case.said, each)) for each in case.orders()],
    "every answer on a line": lambda case: [case.said(", ".join(each)) for each in case.orders()],
    "one answer, then another": lambda case: ["\n".join(map(case.said, each)) for each in case.either()],
    "one or the other": lambda case: [case.said(" or ".join(each)) for each in case.either()],
    "the right one denied": lambda case: [f"It is certainly not {case.gold}.\n{case.said(case.wrong)}"],
    "gold leaked in passing": lambda case: [f"[gold: {case.gold}] I am not sure.\n{case.said(case.wrong)}"],
    "digits of another script": lambda case: [case.said(case.wrong.translate(WIDE))],
    "a program": lambda case: [case.said(f"(lambda: {case.gold or 0})()"), case.said(f"[{case.gold or 0}, {case.wrong}][0]")],
    "a tower of powers": lambda case: [case.said("9^{9^{9^{9}}}")],
    "a huge exponent": lambda case: [case.said("1e999999999")],
    "not a number": lambda case: [case.said("nan")],
    "brackets without end": lambda case: [case.said("(" * LONG)],
    "one letter without end": lambda case: [case.said("x" * LONG)],
    "braces without end": lambda case: ["\\boxed{" * (LONG // 10)],
    "very long and wrong": lambda case: ["so " * LONG + case.said(case.wrong)],
}
"""Answers that are wrong by what they are, however the grader looks for the right one. Of several texts all must earn the reward:
a grader that reads the last of two answers pays for one order only, and so no more than for a guess."""


@dataclass(frozen=True)
class Finding:
    """What became of one probe. paid: the share of problems at which it earned as much as a right answer."""

    probe: str
    paid: Figure
    failures: int
    slowest: float
    example: str = ""

    @property
    def holds(self) -> bool:
        return self.paid.value == 0 and self.slowest < SLOW  # not a number, where all grades failed: nothing is known


@dataclass(frozen=True)
class Audit:
    """Probes, and on labelled answers how often the grader errs."""

    form: str | None
    problems: int
    findings: tuple[Finding, ...]
    false_positives: Figure | None = None
    false_negatives: Figure | None = None

    @property
    def holes(self) -> list[Finding]:
        return [each for each in self.findings if not each.holds]


def audit(
    problems: Sequence[Problem], grader: Grader, forms: Sequence[str] = FORMS, labelled: Sequence[tuple[Problem, str, bool]] = ()
) -> Audit:
    """Grades every probe at every problem, and the labelled answers (problem, answer, whether it is right).

    A probe is paid where it earns as much as the right answer does in the one of `forms` that the grader takes most often; where
    it takes none, where it earns 1.
    """
    form, worth = form_of(problems, grader, forms)
    cases = list(cases_of(problems, form or "{}"))
    findings = [_finding(name, probe, cases, grader, worth) for name, probe in PROBES.items()]
    rates: list[Figure | None] = [None, None]
    if labelled:
        grades = grader.grade_all([as_sample(problem, text) for problem, text, _ in labelled])
        for index, truth in enumerate((False, True)):
            wrong = [
                float((grade.score >= worth) != truth)
                for grade, (_, _, right) in zip(grades, labelled, strict=True)
                if right == truth and grade.score is not None
            ]
            rates[index] = share(wrong)
    return Audit(form, len(cases), tuple(findings), *rates)


def form_of(problems: Sequence[Problem], grader: Grader, forms: Sequence[str]) -> tuple[str | None, float]:
    """(the form in which most answers are right, what they earn there); (None, 1) where none is."""
    best: tuple[float, str | None, float] = (0.0, None, 1.0)
    known = [problem for problem in problems if problem.answer]
    for form in forms:
        grades = grader.grade_all([as_sample(problem, form.replace("{}", problem.answer or "")) for problem in known])
        scores = [grade.score for grade in grades if grade.score is not None]
        nothing = grader.grade_all([as_sample(problem, "") for problem in known[:1]])
        floor = max([each.score for each in nothing if each.score is not None], default=0.0)
        good = [score for score in scores if score > floor and (grader.open_scale or score >= 1)]
        if good and len(good) / len(known) > best[0]:
            best = (len(good) / len(known), form, min(good))
    return best[1], best[2]


def cases_of(problems: Sequence[Problem], form: str) -> Iterator[Case]:
    """Each problem with another's answer, or where all have one, with something else."""
    answers = tuple(dict.fromkeys(problem.answer for problem in problems if problem.answer))
    for index, problem in enumerate(problems):
        others = [each for each in answers if each != problem.answer] or [f"{problem.answer or 0}1"]
        yield Case(problem, form, others[index % len(others)], answers)


def as_sample(problem: Problem, text: str) -> Sample:
    """An answer that nobody sampled: it has no tokens."""
    return Sample(problem, 0, (), (), (), "end", text)


def _finding(name: str, probe: Callable[[Case], list[str]], cases: Sequence[Case], grader: Grader, worth: float) -> Finding:
    paid: list[float] = []
    failures, slowest, example = 0, 0.0, ""
    for case in cases:
        texts = probe(case)
        began = time.perf_counter()
        grades = grader.grade_all([as_sample(case.problem, text) for text in texts])
        slowest = max(slowest, (time.perf_counter() - began) / len(texts))
        scores = [grade.score for grade in grades if grade.score is not None]
        failures += len(grades) - len(scores)
        if len(scores) == len(grades):
            paid.append(float(min(scores) >= worth))
            if paid[-1] and not example:
                example = f"{case.problem.id} (answer {case.gold!r}): {texts[-1][:80]!r} earns {scores[-1]:g}"
    return Finding(name, share(paid), failures, slowest, example)


def holes_of(task: Task, problems: Sequence[Problem], seconds: float = 5.0) -> list[str]:
    """What a run says of its reward before it begins: the probes that are paid, on as many problems as a few seconds allow.

    Nothing of graders that only know episodes, or that have no score which means right.
    """
    grader = task.grader
    if not problems or grader.of_episodes or grader.open_scale or task.environment is not None:
        return []
    began = time.perf_counter()
    grader.grade_all([as_sample(problems[0], problems[0].answer or "")])
    each = (len(PROBES) + len(FORMS)) * (time.perf_counter() - began)
    found = audit(problems[: max(1, int(seconds / max(each, 1e-6)))], grader)
    paid = [hole for hole in found.holes if hole.paid.value > 0]
    if not paid:
        return []
    named = ", ".join(f"{hole.probe} ({hole.paid.value:.0%})" for hole in paid[:3]) + (", ..." if len(paid) > 3 else "")
    return [f"grader {grader.kind} pays answers that should earn nothing: {named}; see them with `posttrain audit`"]
