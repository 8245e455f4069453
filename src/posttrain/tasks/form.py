"""Graders of an answer's form: a pattern, JSON, a thought and then an answer, length, repetition, script.

None of them knows what is true; beside a grader that does (`weighted`, `gated`) they say how it is to be written.
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from posttrain.answer import answer_of, fenced
from posttrain.tasks.grader import Grader, failed, score
from posttrain.tasks.worker import WALL, Worker, WorkerLost, WorkerMissing
from posttrain.text import Grade, Problem, Sample

ANSWER = "{answer}"


class RegexGrader(Grader, kind="regex"):
    """1 where a regular expression matches the completion. The dialect is that of the `regex` package.

    `{answer}` in the pattern stands for the problem's answer, letter by letter, as one group. A match that takes longer than
    `seconds` earns 0 and the part `too_slow`: some patterns take exponential time on some texts.
    """

    pattern: str
    """The expression."""
    match: Literal["whole", "anywhere"] = "whole"
    """whole: all of the completion, white space at its ends aside."""
    ignore_case: bool = False
    """Whether `Paris` matches `paris`."""
    seconds: PositiveFloat = 1.0
    """The longest that one match may take."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        import regex

        try:
            regex.compile(pattern.replace(ANSWER, "answer"))
        except regex.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern

    def gold_problem(self, problem: Problem) -> str | None:
        return "it has no answer" if ANSWER in self.pattern and not (problem.answer or "").strip() else None

    def grade(self, problem: Problem, text: str) -> Grade:
        import regex

        pattern = self.pattern.replace(ANSWER, f"(?:{regex.escape(problem.answer or '', special_only=True)})")
        found = regex.compile(pattern, regex.IGNORECASE if self.ignore_case else 0)
        find = found.fullmatch if self.match == "whole" else found.search
        try:
            return score(find(text.strip(), timeout=self.seconds) is not None)
        except TimeoutError:
            return Grade(0.0, {"too_slow": 1.0})


class JsonGrader(Grader, kind="json"):
    """1 where the completion is one JSON value, and one that the JSON Schema allows where there is one.

    The schema is the grader's, or the column `json_schema` of the problem. The value stands alone, or as the only fenced block of
    the completion, behind a thought if there is one. NaN, infinity and a key that stands twice in an object are not JSON. A value
    that the schema cannot decide on in time (a pattern that takes for ever) earns 0 and is counted in the part `too_slow`.
    """

    json_schema: dict[str, Any] | bool | None = None
    """What values are allowed (draft 2020-12)."""
    fenced: bool = True
    """Whether the value may stand in a fenced block, with text around it."""
    seconds: float = Field(default=1.0, gt=0, le=60)
    """Processor time that the schema has for one value."""

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, schema: Any) -> Any:
        if schema is not None and (wrong := _schema_problem(schema)):
            raise ValueError(wrong)
        return schema

    def gold_problem(self, problem: Problem) -> str | None:
        own = problem.facts.get("json_schema")
        return None if own is None or self.json_schema is not None else _schema_problem(own)

    def grade(self, problem: Problem, text: str) -> Grade:
        inner = self._inner(answer_of(text))
        schema = problem.facts.get("json_schema") if self.json_schema is None else self.json_schema
        try:
            json.loads(inner, object_pairs_hook=_once, parse_constant=_refused)
        except (ValueError, RecursionError):
            return score(False)
        if schema is None:
            return score(True)
        question = {"schema": schema, "value": inner, "seconds": self.seconds}
        try:
            found = _worker().ask(question, WALL * self.seconds)
        except WorkerLost:
            return Grade(0.0, {"too_slow": 1.0})
        except WorkerMissing as error:
            return failed(str(error))
        return failed(found["failure"]) if "failure" in found else score(found["allowed"])

    def _inner(self, text: str) -> str:
        blocks = fenced(text) if self.fenced else []
        return blocks[0].text if len(blocks) == 1 else text


@cache
def _worker() -> Worker:
    return Worker(Path(__file__).with_name("schema_worker.py"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _schema_problem(schema: Any) -> str | None:
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return f"its schema is no JSON Schema: {error.message}"
    return None


class ThinkGrader(Grader, kind="think"):
    """1 where the completion thinks and then answers: the format reward of arXiv 2501.12948.

    It begins with the opening tag, has exactly one opening and one closing tag in this order, and something that is not blank
    behind the closing one. With `answer_tag` that is one pair of those tags around something not blank, and nothing else.
    """

    tag: str = Field(default="think", min_length=1)
    """The name of the tags around the thought."""
    answer_tag: str | None = Field(default=None, min_length=1)
    """The name of the tags around the answer (`answer` in the paper's template)."""
    prefilled: bool = False
    """Whether the chat template has already written the opening tag, so that the completion begins behind it."""

    def grade(self, problem: Problem, text: str) -> Grade:
        whole = f"<{self.tag}>{text}" if self.prefilled else text.strip()
        inner = _between(whole, self.tag)
        if inner is None or not whole.startswith(f"<{self.tag}>"):
            return score(False)
        rest = whole.partition(f"</{self.tag}>")[2].strip()
        if self.answer_tag is None:
            return score(bool(rest))
        answer = _between(rest, self.answer_tag)
        tidy = rest.startswith(f"<{self.answer_tag}>") and rest.endswith(f"</{self.answer_tag}>")
        return score(answer is not None and bool(answer.strip()) and tidy and f"<{self.answer_tag}>" not in inner)


def _between(text: str, tag: str) -> str | None:
    """What stands between the one opening and the one closing tag; None where it is not one pair in order."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        return None
    return text.partition(opening)[2].partition(closing)[0]


class OverlongGrader(Grader, kind="overlong"):
    """0 up to longest - buffer tokens, from there in a straight line to -1 at `longest` and beyond. arXiv 2503.14476 eq. 13.

    To be added (`weighted`) to a score of 1 and -1, or 1 and 0. Tokens are those that the policy wrote, its end token included.
    """

    longest: PositiveInt
    """The tokens that cost 1; rollout.sampling.max_tokens, mostly."""
    buffer: PositiveInt
    """Over how many tokens the cost rises (in the paper 4,096 of 20,480)."""

    @model_validator(mode="after")
    def _fits(self) -> "OverlongGrader":
        if self.buffer > self.longest:
            raise ValueError(f"buffer: {self.buffer} is more than longest, {self.longest}")
        return self

    @property
    def open_scale(self) -> bool:
        return True

    def cost(self, tokens: int) -> float:
        return min(0.0, max(-1.0, (self.longest - self.buffer - tokens) / self.buffer))

    def grade(self, problem: Problem, text: str) -> Grade:
        return failed("overlong counts the tokens that were sampled, and a text alone has none")

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        return [Grade(self.cost(len(sample.logp))) for sample in samples]


class RepetitionGrader(Grader, kind="repetition"):
    """-(share of the completion's n-grams of words that have stood in it before): 0 to -1. arXiv 2502.03373 section 3.4."""

    words: PositiveInt = 20
    """The n of the n-grams (in the paper 40, of tokens)."""

    @property
    def open_scale(self) -> bool:
        return True

    def grade(self, problem: Problem, text: str) -> Grade:
        words = text.split()
        grams = Counter(tuple(words[place : place + self.words]) for place in range(len(words) - self.words + 1))
        return Grade(len(grams) / grams.total() - 1.0 if grams else 0.0)


class ScriptGrader(Grader, kind="script"):
    """The share of the completion's letters that are of one script, such as Latin or Han; 1 where it has no letters.

    The language consistency reward of arXiv 2501.12948 section 2.3.2, as far as the script tells languages apart.
    """

    script: str
    """A script of Unicode: Latin, Cyrillic, Greek, Arabic, Hebrew, Devanagari, Han, Hiragana, Hangul, ..."""

    @field_validator("script")
    @classmethod
    def _is_known(cls, script: str) -> str:
        import regex

        try:
            regex.compile(rf"\p{{Script={script}}}")
        except regex.error:
            raise ValueError(f"{script!r} is no script of Unicode; give one such as Latin, Cyrillic or Han") from None
        return script

    @property
    def open_scale(self) -> bool:
        return True

    def grade(self, problem: Problem, text: str) -> Grade:
        import regex

        letters = regex.findall(r"\p{L}", text)
        own = sum(1 for letter in letters if regex.fullmatch(rf"\p{{Script={self.script}}}", letter))
        return Grade(own / len(letters) if letters else 1.0)
