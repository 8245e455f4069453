"""The audit finds planted holes, and none where there is none."""

import json
import re
import time

import pytest
from test_cli import place, posttrain  # noqa: F401  fixtures

from posttrain.evaluation.audit import FORMS, PROBES, Case, audit, form_of
from posttrain.tasks import FunctionGrader, Grader, NumberGrader, Task
from posttrain.text import Grade, Message, Problem

SUMS = [Problem(f"p{n}", (Message("user", f"What is {n} + 1?"),), str(n + 1)) for n in range(2, 12)]


def evaluated(text):
    try:
        return eval(text) if len(text) < 100 else None
    except Exception:
        return None


class Holed(Grader):
    """A grader whose author thought of one thing only."""

    hole: str

    def grade(self, problem, text):
        gold = problem.answer
        paid = {
            "none": text.strip() == gold,
            "contains": gold in text,
            "empty": not text.strip() or text.strip() == gold,
            "any number": bool(re.search(r"\d", text)),
            "long": len(text) > 5000 or text.strip() == gold,
            "first or last": re.findall(r"\d+", text)[:1] == [gold] or re.findall(r"\d+", text)[-1:] == [gold],
            "evaluates": text.strip() == gold or "^" in text,
            "runs": text.strip() == gold or evaluated(text) == int(gold),
        }[self.hole]
        return Grade(float(paid))


def holes(grader, **settings):
    return {each.probe for each in audit(SUMS, grader, **settings).holes}


def test_a_grader_that_takes_the_answer_alone_has_no_hole():
    found = audit(SUMS, Holed(hole="none"))
    assert (found.form, found.problems, found.holes) == ("{}", 10, [])
    assert {each.probe for each in found.findings} == set(PROBES)
    assert all(each.paid.count == 10 for each in found.findings)


@pytest.mark.parametrize(("hole", "probes"), [
    ("contains", {"every answer listed", "one or the other", "the right one denied", "gold leaked in passing"}),
    ("empty", {"nothing", "blank lines", "the form alone"}),
    ("any number", {"another answer", "the question again", "one answer, then another"}),
    ("long", {"one letter without end", "very long and wrong", "brackets without end"}),
    ("first or last", {"one or the other", "one answer, then another", "every answer on a line"}),
    ("evaluates", {"a tower of powers"}), ("runs", {"a program"}),
])  # fmt: skip
def test_a_planted_hole_is_found(hole, probes):
    assert probes <= holes(Holed(hole=hole))


@pytest.mark.parametrize("task", ["arithmetic", "gsm8k", "countdown"])
def test_the_tasks_of_the_package_have_none(task):
    made = Task.model_validate({"kind": task, "limit": 12})
    found = audit(made.problems(), made.grader)
    assert [each.probe for each in found.holes] == []
    assert (found.form is None) == (task == "countdown"), "an expression is not made of the answer"


def test_mathematics_has_none_in_its_own_form():
    found = audit(SUMS[:3], Grader.lookup("math")())
    assert found.form is not None
    assert [each.probe for each in found.holes] == []


def test_the_form_is_the_one_in_which_most_answers_are_taken():
    assert form_of(SUMS, NumberGrader(marker="####"), FORMS)[0] == "{}"
    thinking = Grader.lookup("gated").model_validate(
        {"gates": {"form": {"kind": "think", "answer_tag": "answer"}}, "grader": {"kind": "number"}}
    )
    assert form_of(SUMS, thinking, FORMS) == ("<think>So it is.</think><answer>{}</answer>", 1.0)
    assert audit(SUMS, thinking).holes == []
    assert form_of(SUMS, Holed(hole="none"), ("= {}",)) == (None, 1.0)


def test_on_an_open_scale_a_probe_is_paid_where_it_earns_what_a_right_answer_does():
    def points(problem, text):
        return 3.0 if text.strip() == problem.answer else 0.5 if text else 0.0

    globals()["points"] = points
    grader = FunctionGrader(path="test_audit:points", scale="open")
    assert form_of(SUMS, grader, FORMS) == ("{}", 3.0)
    assert audit(SUMS, grader).holes == []


def test_a_slow_grader_is_a_hole_and_a_raising_one_is_counted(monkeypatch):
    monkeypatch.setattr("posttrain.evaluation.audit.SLOW", 0.05)

    class Fragile(Grader):
        """Slow on long texts, and it cannot read brackets."""

        def grade(self, problem, text):
            if "((" in text:
                raise RecursionError("too deep")
            if len(text) > 5000:
                time.sleep(0.06)
            return Grade(float(text.strip() == problem.answer))

    found = {each.probe: each for each in audit(SUMS[:2], Fragile()).findings}
    assert not found["one letter without end"].holds
    assert found["nothing"].holds
    assert (found["brackets without end"].failures, found["brackets without end"].paid.count) == (2, 0)


def test_labelled_answers_give_both_rates():
    labelled = [(SUMS[0], "3", True), (SUMS[0], "3.", True), (SUMS[0], "4", False), (SUMS[1], "x", False)]
    found = audit(SUMS, Holed(hole="none"), labelled=labelled)
    assert (found.false_positives.value, found.false_positives.count) == (0.0, 2)
    assert (found.false_negatives.value, found.false_negatives.count) == (0.5, 2)
    assert audit(SUMS, Holed(hole="any number"), labelled=labelled).false_positives.value == 0.5


def test_probes_hold_what_their_names_say():
    case = Case(SUMS[0], "<{}>", "9", ("3", "4", "9"))
    assert PROBES["one or the other"](case) == ["<3 or 9>", "<9 or 3>"]
    assert PROBES["every answer listed"](case) == ["<3>\n<4>\n<9>", "<4>\n<9>\n<3>"]
    assert PROBES["the form alone"](case) == ["<>"]
    assert PROBES["digits of another script"](case) == ["<９>"]


# ---- the command


def test_the_command_prints_a_table_and_says_with_its_status_whether_there_is_a_hole(posttrain, tmp_path):  # noqa: F811
    status, out, err = posttrain("audit", "arithmetic", "limit=5")
    assert status == 0, err
    assert "5 problems; right answers are taken in the form '0 + {} = {}'" in out
    problems, answers = tmp_path / "sums.jsonl", tmp_path / "labelled.jsonl"
    problems.write_text("".join(json.dumps({"id": each.id, "prompt": "?", "answer": each.answer}) + "\n" for each in SUMS))
    answers.write_text(json.dumps({"id": "p2", "completion": "3 or 4", "right": False}) + "\n")
    asked = ("audit", "problems", f"source={problems}", "grader={kind: regex, pattern: '{answer}', match: anywhere}")
    status, out, err = posttrain(*asked, "--labelled", answers)
    assert status == 1, err
    assert re.search(r"one or the other +100.0% .*<- hole", out)
    assert "wrong answers paid: 100.0%" in out
    status, out, _ = posttrain(*asked, "--json")
    assert (status, json.loads(out)["problems"]) == (1, 10)
    answers.write_text(json.dumps({"id": "p99", "completion": "3", "right": True}) + "\n")
    status, _, err = posttrain(*asked, "--labelled", answers)
    assert (status, "no problem 'p99' among the 10 of the task" in err) == (2, True)
    assert "has no place for the answer" in posttrain("audit", "gsm8k", "--form", "so")[2]


def test_an_audit_that_can_know_nothing_does_not_end_well(posttrain, place):  # noqa: F811
    (place / "audited.py").write_text("def broken(problem, text):\n    raise OSError('down')\n")  # found as p.jsonl beside it is
    (place / "p.jsonl").write_text('{"id": "a", "prompt": "1 + 1?", "answer": "2"}\n')
    grader = "grader={kind: function, path: 'audited:broken'}"
    status, out, _ = posttrain("audit", "problems", "source=p.jsonl", grader)
    assert (status, "<- nothing could be graded" in out) == (1, True)
    status, out, _ = posttrain("audit", "problems", "source=p.jsonl", grader, "--json")
    assert (status, json.loads(out)["findings"][0]["paid"]["value"]) == (1, None)
    status, _, err = posttrain("audit", "guess_number")
    assert (status, "it is graded by episodes, and an audit grades texts" in err) == (2, True)
