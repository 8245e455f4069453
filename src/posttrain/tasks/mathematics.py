"""The grader of mathematical answers: math-verify, in a process of its own, asked only what it can be trusted with."""

from functools import cache
from pathlib import Path

from pydantic import Field

from posttrain.tasks.grader import Grade, Grader, failed, score
from posttrain.tasks.math_answers import MAX_LETTERS, answers, latex, option, plain, refused, words
from posttrain.tasks.worker import WALL, Worker, WorkerLost, WorkerMissing
from posttrain.text import Problem


@cache
def _worker() -> Worker:
    return Worker(Path(__file__).with_name("math_worker.py"))


class MathGrader(Grader, kind="math"):
    r"""1 where the answer equals the gold, as mathematics and not as text (math-verify).

    The answer is the last `\boxed{}`; several boxes that differ must all be right, so that a list of guesses earns 0. Without
    a box it is what follows `answer is`, else the last formula or number of the last line. Decimals are exact: 0.3333 is not
    1/3. Units may be left out, not changed. An unfinished calculation, or the question repeated, is not an answer. Other than
    math-verify alone, which accepts some of these.

    Gold that cannot be read is a failure, never a score. An answer that cannot be compared in time earns 0 and is counted in
    the part `too_slow`.
    """

    seconds: float = Field(default=1.0, gt=0, le=60)
    """Processor time for one comparison; over it the process is ended and replaced."""

    def grade(self, problem: Problem, text: str) -> Grade:
        gold = plain((problem.answer or "").rpartition("####")[2])
        why = self._unusable(gold)
        if why:
            return failed(why)
        found = [plain(answer) for answer in answers(text)]
        letters = [option(answer) for answer in found]
        if option(gold) and found and all(letters):
            return score(set(letters) == {option(gold)})
        if gold_words := words(gold):
            return score(bool(found) and all(words(answer) == gold_words for answer in found))
        try:
            return self._compared(gold, found)
        except WorkerMissing as error:
            return failed(str(error))

    def gold_problem(self, problem: Problem) -> str | None:
        """Only what is cheap to know; gold that math-verify cannot read is found when it is needed, as a failure."""
        return self._unusable(plain((problem.answer or "").rpartition("####")[2]))

    def _unusable(self, gold: str) -> str | None:
        if not gold:
            return "it has no answer"
        return f"its answer is longer than {MAX_LETTERS * 4} characters" if len(gold) > MAX_LETTERS * 4 else None

    def _compared(self, gold: str, found: list[str]) -> Grade:
        asked = [] if any(refused(gold, answer) for answer in found) else found
        try:
            readable, right = self._ask(gold, asked)
        except WorkerLost:
            return self._too_slow(gold)
        if not readable:
            return failed(f"the answer of the problem cannot be read as mathematics: {gold[:80]!r}")
        return score(bool(asked) and all(right))

    def _too_slow(self, gold: str) -> Grade:
        """Whether it was the gold or the answer that took too long."""
        try:
            self._ask(gold, [])
        except WorkerLost as error:
            return failed(f"the answer of the problem cannot be read in time ({error}): {gold[:80]!r}")
        return Grade(0.0, {"too_slow": 1.0})

    def _ask(self, gold: str, asked: list[str]) -> tuple[bool, list[bool]]:
        question = {"gold": latex(gold), "answers": [latex(answer) for answer in asked], "seconds": self.seconds}
        reply = _worker().ask(question, WALL * self.seconds)
        return reply["readable"], reply["right"]
