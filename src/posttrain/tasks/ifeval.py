"""The task of IFEval (arXiv 2311.07911): prompts with instructions, and a grader that says which of them an answer follows."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from posttrain.component import did_you_mean
from posttrain.data.source import Source
from posttrain.tasks.grader import Grader, failed
from posttrain.tasks.instructions import Instruction
from posttrain.tasks.task import Task, shipped
from posttrain.text import Grade, Problem


class InstructionsGrader(Grader, kind="instructions"):
    """Whether an answer follows its problem's instructions, as far as programs can check it (IFEval, arXiv 2311.07911).

    A problem has the columns `instruction_id_list` and `kwargs` of IFEval. A blank answer follows nothing, and neither does the
    prompt itself. Each instruction is a part of the grade, 0 or 1; one that the problem has twice is 1 where both are followed.
    """

    strict: bool = True
    """false: an instruction is followed where it is without the first line, the last one, both, or the asterisks."""
    score: Literal["all", "share"] = "all"
    """all: 1 where all are followed, else 0. share: the share that is followed."""

    def gold_problem(self, problem: Problem) -> str | None:
        try:
            instructions_of(problem)
        except ValueError as error:
            return str(error)
        return None

    def grade(self, problem: Problem, text: str) -> Grade:
        try:
            told = instructions_of(problem)
        except ValueError as error:
            return failed(str(error))
        texts = [] if _repeats(problem, text) else [each for each in self._readings(text) if each.strip()]
        followed = [float(any(map(each.followed, texts))) for _, each in told]
        parts: dict[str, float] = {}
        for (id, _), done in zip(told, followed, strict=True):
            parts[id] = min(done, parts.get(id, 1.0))
        return Grade(min(followed) if self.score == "all" else sum(followed) / len(followed), parts)

    def _readings(self, text: str) -> list[str]:
        """The text, and where not strict the paper's eight."""
        if self.strict:
            return [text]
        lines = text.split("\n")
        cut = ["\n".join(each).strip() for each in (lines[1:], lines[:-1], lines[1:-1])]
        return [text, *cut, *(each.replace("*", "") for each in (text, *cut))]


def instructions_of(problem: Problem) -> list[tuple[str, Instruction]]:
    """What a problem asks for, with the ids. Raises a ValueError that says what is wrong with the row."""
    ids, settings = problem.facts.get("instruction_id_list"), problem.facts.get("kwargs")
    if not isinstance(ids, list) or not ids or not all(isinstance(id, str) for id in ids):
        raise ValueError("its `instruction_id_list` is no list of ids such as 'punctuation:no_comma'")
    if not isinstance(settings, list) or len(settings) != len(ids) or not all(isinstance(each, dict) for each in settings):
        raise ValueError("its `kwargs` is no list of a mapping for each id of `instruction_id_list`")
    return [(id, _instruction(id, each)) for id, each in zip(ids, settings, strict=True)]


def _instruction(id: str, settings: dict[str, Any]) -> Instruction:
    if id not in Instruction.known:
        raise ValueError(f"there is no instruction {id!r}{did_you_mean(id, Instruction.known)}")
    try:
        return Instruction.known[id].model_validate({name: value for name, value in settings.items() if value is not None})
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"its kwargs for {id}: {place}{': ' if place else ''}{wrong['msg']}") from None


def _repeats(problem: Problem, text: str) -> bool:
    return text.split() == problem.prompt[-1].content.split()


class IfevalTask(Task, kind="ifeval"):
    """Prompts with instructions that programs can check (arXiv 2311.07911); by default the 271 that come with the package."""

    source: Source = Field(default_factory=shipped("ifeval_half.jsonl"))
    grader: Grader = Field(default_factory=InstructionsGrader)
