"""Tasks: problems with what grades them, refused by file and line where they cannot be graded."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.errors import DataError
from posttrain.tasks import Task
from posttrain.text import Grade, Message, Problem

KINDS = ["arithmetic", "choice", "code", "countdown", "gsm8k", "guess_number", "ifeval", "math", "problems", "rooms"]


def task(**settings: Any) -> Task:
    return Task.model_validate(settings)


def written(folder: Path, *rows: Any) -> str:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def exact(source: str, **settings: Any) -> Task:
    return task(kind="problems", source=source, grader="exact", **settings)


def failure(made: Task) -> str:
    with pytest.raises(DataError) as error:
        made.problems()
    return str(error.value)


def test_the_kinds_are_there() -> None:
    assert sorted(Task.kinds) == KINDS


@pytest.mark.parametrize(
    ("kind", "count", "first"),
    [("arithmetic", 500, "arith-test-0"), ("gsm8k", 7473, "gsm8k-train-0"), ("countdown", 400, "countdown-test-0")],
)
def test_a_task_by_its_name_alone_brings_its_problems(kind: str, count: int, first: str) -> None:
    made = task(kind=kind)
    made.check()
    problems = made.problems()
    assert (len(problems), problems[0].id) == (count, first)
    assert all(problem.prompt[-1].role == "user" for problem in problems)


@pytest.mark.parametrize(("kind", "share"), [("arithmetic", 1.0), ("countdown", 1.0)])
def test_shipped_solutions_are_right_by_the_tasks_own_grader(kind: str, share: float) -> None:
    made = task(kind=kind)
    scores = [made.grader.grade(problem, problem.facts["solution"]).score or 0 for problem in made.problems()]
    assert sum(scores) / len(scores) == share


def test_the_gold_of_gsm8k_may_be_a_whole_solution_as_in_its_own_files(tmp_path: Path) -> None:
    source = written(tmp_path, {"question": "6 x 12?", "answer": "It is <<6*12=72>>72.\n#### 72"})
    made = task(kind="gsm8k", source=source, format={"kind": "problem", "fields": {"prompt": "question"}})
    [problem] = made.problems()
    assert problem.prompt == (Message("user", "6 x 12?"),)
    assert [made.grader.grade(problem, text).score for text in ("#### 72", "It is 72.", "#### 71", "6")] == [1, 1, 0, 0]


def test_a_file_and_the_name_of_a_grader_are_a_task(tmp_path: Path) -> None:
    source = written(tmp_path, {"prompt": "Capital of France?", "answer": "Paris", "hint": "P"})
    made = exact(source)
    made.check()
    [problem] = made.problems()
    assert problem == Problem("p.jsonl-1", (Message("user", "Capital of France?"),), "Paris", {"hint": "P"}, f"{source}:1")
    assert made.grader.grade(problem, " Paris\n") == Grade(1.0)


def test_instruction_and_system_frame_the_last_user_message(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2 + 2?"}]
    source = written(tmp_path, {"prompt": turns, "answer": "4"})
    after = exact(source, instruction="Put it in \\boxed{}.", system="Be brief.").problems()[0].prompt
    assert [message.role for message in after] == ["system", "user", "assistant", "user"]
    assert (after[0].content, after[1].content) == ("Be brief.", "Hi")
    assert after[-1].content == "2 + 2?\n\nPut it in \\boxed{}."
    around = exact(source, instruction="Q: {prompt}\nA: \\boxed{}").problems()[0].prompt
    assert around[-1].content == "Q: 2 + 2?\nA: \\boxed{}"


def test_the_math_task_asks_for_a_box_and_pays_for_it(tmp_path: Path) -> None:
    made = task(kind="math", source=written(tmp_path, {"prompt": "Half of one?", "answer": "\\frac{1}{2}"}))
    [problem] = made.problems()
    assert problem.prompt[-1].content == "Half of one?\n\nPut your final answer in \\boxed{}."
    assert [made.grader.grade(problem, text).score for text in ("\\boxed{0.5}", "\\boxed{2}")] == [1, 0]


def test_a_choice_lists_its_labelled_choices(tmp_path: Path) -> None:
    row = {"question": "Where is money kept?", "choices": ["a river", "a bank"], "labels": ["P", "Q"], "answer": "Q", "id": "c1"}
    made = task(kind="choice", source=written(tmp_path, row))
    [problem] = made.problems()
    listed = "Where is money kept?\nP. a river\nQ. a bank\n\nAnswer with the label of the right choice."
    assert (problem.id, problem.prompt, problem.answer) == ("c1", (Message("user", listed),), "Q")
    assert [made.grader.grade(problem, text).score for text in ("Q", "P", "P or Q")] == [1, 0, 0]


def test_choices_without_labels_get_letters_and_columns_can_be_named(tmp_path: Path) -> None:
    source = written(tmp_path, {"stem": "Which?", "options": ["x", "y", "z"], "key": "B"})
    fields = {"question": "stem", "choices": "options", "answer": "key"}
    [problem] = task(kind="choice", source=source, format={"kind": "choice", "fields": fields}, instruction=None).problems()
    assert problem.prompt[0].content == "Which?\nA. x\nB. y\nC. z"
    assert (problem.answer, problem.facts) == ("B", {"choices": ["x", "y", "z"], "labels": ["A", "B", "C"]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "choices": ["x"], "answer": "A"}, "1 choices and 1 different labels; give every choice"),
        ({"question": "?", "choices": ["x", "y"], "labels": ["A", "A"], "answer": "A"}, "2 choices and 1 different labels"),
        ({"question": "?", "choices": "x", "answer": "A"}, 'column "choices": expected a list of texts, found "x" (text)'),
        ({"question": "?", "choices": [], "answer": "A"}, "this row is no problem: empty choices"),
        ({"question": "?", "choices": ["x", "y"], "answer": "C"}, "cannot grade this problem: its answer 'C' is none of A, B"),
        ({"question": "?", "choices": ["x", "y"]}, 'format choice needs the column "answer"'),
    ],
)
def test_a_malformed_choice_is_refused_by_file_and_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    source = written(tmp_path, {"question": "?", "choices": ["x", "y"], "answer": "A"}, row)
    said = failure(task(kind="choice", source=source))
    assert said.startswith(f"{source}:2: ")
    assert message in said


REFUSED = [
    ("gsm8k", {"prompt": "?"}, "grader number cannot grade this problem: it has no answer; correct it or take it out"),
    ("gsm8k", {"prompt": "?", "answer": "many"}, "its answer 'many' is not a number"),
    ("arithmetic", {"prompt": "?", "answer": "x"}, "its answer 'x' is not a number"),
    ("countdown", {"prompt": "?", "numbers": [1, 2]}, "its `target` is None, not a whole number"),
    ("math", {"prompt": "?", "answer": " "}, "grader math cannot grade this problem: it has no answer"),
    ("math", {"prompt": "", "answer": "1"}, "this row is no problem: empty prompt; correct it or take it out"),
    ("math", {"prompt": None, "answer": "1"}, "this row is no problem: empty prompt"),
    ("math", {"question": "?", "answer": "1"}, 'format problem needs the column "prompt"'),
    ("math", {"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}, "the prompt ends with a turn of assistant"),
    ("math", {"prompt": [{"role": "system", "content": "x"}], "answer": "1"}, "the prompt ends with a turn of system"),
]


@pytest.mark.parametrize(("kind", "row", "message"), REFUSED)
def test_a_problem_that_cannot_be_graded_is_refused_before_it_is_rewarded(
    tmp_path: Path, kind: str, row: dict[str, Any], message: str
) -> None:
    good = {"prompt": "1 + 1?", "answer": "2", "numbers": [1, 1], "target": 2}
    source = written(tmp_path, good, row)
    made = task(kind=kind, source=source)
    made.check()  # reads the first row only
    said = failure(made)
    assert said.startswith(f"{source}:2: ")
    assert message in said
    with pytest.raises(DataError, match="1: "):
        task(kind=kind, source=written(tmp_path, row)).check()


def test_an_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path, *({"id": name, "prompt": "?", "answer": "2"} for name in ("a", "b", "a")))
    said = f"{source}:3: the id 'a' is that of {source}:1 too; an id addresses random draws, change one"
    assert failure(exact(source)) == said


def test_two_system_messages_are_refused(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    source = written(tmp_path, {"prompt": turns, "answer": "2"})
    assert len(exact(source).problems()[0].prompt) == 2
    said = f"{source}:1: this problem brings its own system message; leave `system` out of the task"
    assert failure(exact(source, system="mine")) == said


def test_a_format_that_makes_no_problems_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path, {"text": "x"})
    assert failure(exact(source, format="text")) == f"{source}:1: format text makes no problems; a task needs format: problem"


def test_zero_problems_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path)
    assert f"{source}: is empty" in failure(exact(source))
    (tmp_path / "p.jsonl").write_text("\n\n")
    assert f"{source}: is empty" in failure(exact(source))


def test_a_missing_file_is_refused_by_the_check(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        exact(str(tmp_path / "none.jsonl")).check()


def test_limit_takes_the_first_problems_and_reads_no_further(tmp_path: Path) -> None:
    source = written(tmp_path, {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}, {"prompt": "c"})
    assert [problem.prompt[0].content for problem in exact(source, limit=2).problems()] == ["a", "b"]
    assert ":3: " in failure(exact(source))


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limits": 3}, {"grader": "exakt"}, {"grader": None}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        task(**{"kind": "problems", "source": "x.jsonl", "grader": "exact", **wrong})


def test_problems_needs_a_grader() -> None:
    with pytest.raises(ValidationError, match="grader"):
        task(kind="problems", source="x.jsonl")


def test_the_fingerprint_follows_the_data_and_the_settings_and_not_the_folder(tmp_path: Path) -> None:
    row = {"prompt": "a", "answer": "1"}
    base = exact(written(tmp_path, row)).fingerprint()
    assert base == exact(written(tmp_path, row)).fingerprint()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert exact(written(moved, row)).fingerprint() == base
    changed = [
        exact(written(tmp_path, row), limit=1),
        exact(written(tmp_path, row), instruction="Think."),
        task(kind="problems", source=written(tmp_path, row), grader={"kind": "exact", "ignore_case": True}),
        exact(written(moved, {"prompt": "a", "answer": "2"})),
    ]
    assert len({base, *(each.fingerprint() for each in changed)}) == 5


class ByLength(Task):
    """A task of one's own: only the problems, everything else is inherited."""

    longest: int

    def problems(self) -> list[Problem]:
        return [problem for problem in super().problems() if len(problem.prompt[-1].content) <= self.longest]


def test_a_task_of_ones_own_is_one_class(tmp_path: Path) -> None:
    source = written(tmp_path, {"prompt": "ab", "answer": "1"}, {"prompt": "abc", "answer": "2"})
    made = task(kind=f"{__name__}:ByLength", source=source, grader="exact", longest=2)
    assert [problem.answer for problem in made.problems()] == ["1"]
