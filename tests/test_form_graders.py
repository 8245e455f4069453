"""Graders of an answer's form, and graders made of graders."""

import json
import time

import pytest
from pydantic import ValidationError

from posttrain.tasks import (
    GatedGrader,
    JsonGrader,
    OverlongGrader,
    RegexGrader,
    RepetitionGrader,
    ScriptGrader,
    ThinkGrader,
)
from posttrain.text import Grade, Message, Problem, Sample

PERSON = {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}}, "required": ["name"],
    "additionalProperties": False,
}  # fmt: skip


def problem(answer=None, **facts):
    return Problem("p", (Message("user", "?"),), answer, facts, "f.jsonl:1")


def sample(text, tokens=1):
    marks = (False,) + (True,) * tokens
    return Sample(problem("7"), 0, (1,) * (tokens + 1), marks, (-0.5,) * tokens, "end", text)


def said(grader, text, answer=None, **facts):
    return grader.grade(problem(answer, **facts), text).score


# ---- regex


@pytest.mark.parametrize(("settings", "answer", "right", "wrong"), [
    ({"pattern": r"\d+"}, None, ["12", " 12\n"], ["", "12 apples", "1.2", "twelve"]),
    ({"pattern": r"\d+", "match": "anywhere"}, None, ["12 apples"], ["", "apples"]),
    ({"pattern": "answer: {answer}"}, "a.c", ["answer: a.c"], ["answer: abc", "answer: ", "Answer: a.c"]),
    ({"pattern": "answer: {answer}", "ignore_case": True}, "Paris", ["ANSWER: paris"], ["answer: London", "answer: Paris or London"]),
    ({"pattern": "{answer}?"}, "ab", ["ab", ""], ["a"]),
    ({"pattern": r"\p{Lu}\w{2,3}"}, None, ["Abc", "Äbcd"], ["abc", "A{2,3}"]),
])  # fmt: skip
def test_a_pattern_matches_the_whole_or_somewhere(settings, answer, right, wrong):
    grader = RegexGrader(**settings)
    assert [said(grader, text, answer) for text in right] == [1.0] * len(right)
    assert [said(grader, text, answer) for text in wrong] == [0.0] * len(wrong)


def test_a_pattern_that_runs_away_is_cut_off_and_earns_nothing():
    began = time.perf_counter()
    grade = RegexGrader(pattern="(?:(a+)+b|(a+)+c|(?:a|aa)+d)", seconds=0.2).grade(problem(), "a" * 5000)
    assert (grade.score, grade.failure) == (0.0, None)
    assert time.perf_counter() - began < 5
    catastrophic = RegexGrader(pattern=r"(x+x+)+y", seconds=0.2).grade(problem(), "x" * 60)
    assert catastrophic.score == 0.0


def test_a_time_out_is_counted(monkeypatch):
    import regex

    class Slow:
        def fullmatch(self, _text, timeout):
            raise TimeoutError(timeout)

    grader = RegexGrader(pattern="a")
    monkeypatch.setattr(regex, "compile", lambda *_: Slow())
    grade = grader.grade(problem(), "a")
    assert (grade.score, grade.parts) == (0.0, {"too_slow": 1.0})


def test_a_pattern_that_is_none_is_refused_and_one_with_the_answer_needs_it():
    with pytest.raises(ValidationError, match="is no regular expression"):
        RegexGrader(pattern="(")
    for blank in (None, "", "  "):
        assert RegexGrader(pattern="answer: {answer}", match="anywhere").gold_problem(problem(blank)) == "it has no answer"
    assert RegexGrader(pattern="x").gold_problem(problem()) is None


# ---- json


@pytest.mark.parametrize("text", [
    '{"name": "Ann"}', ' {"name": "Ann", "age": 3}\n', 'Here it is:\n```json\n{"name": "Ann"}\n```\nDone.',
    'So:\r\n  ```json\r\n  {"name": "Ann"}\r\n  ```\r\n', '<think>{"name": 3}</think><answer>{"name": "Ann"}</answer>',
])  # fmt: skip
def test_json_that_the_schema_allows_is_right(text):
    assert said(JsonGrader(json_schema=PERSON), text) == 1.0
    assert said(JsonGrader(), text, json_schema=PERSON) == 1.0


@pytest.mark.parametrize("text", [
    "", "{}", '{"name": 3}', '{"name": "Ann", "age": -1}', '{"name": "Ann", "more": 1}', '{"name": "Ann"', "{'name': 'Ann'}",
    '{"name": "Ann"} {"name": "Ben"}', '{"name": "Ann", "name": "Ben"}', '{"name": "Ann", "age": NaN}', "[" * 100_000,
    '{"name": "Ann", "age": ' + "9" * 5000 + "}", 'I say {"name": "Ann"}',
    '```json\n{"name": "Ann"}\n```\n```json\n{"name": "Ben"}\n```', "null", '"name"',
])  # fmt: skip
def test_what_is_no_json_or_not_allowed_is_wrong_and_no_failure(text):
    assert said(JsonGrader(json_schema=PERSON), text) == 0.0


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"pattern": r"^(\w+\s?)*$"}, json.dumps("a" * 40 + "!")),
        ({"uniqueItems": True}, json.dumps([{"number": each} for each in range(4000)])),
    ],
    ids=["pattern", "unique"],
)
def test_a_schema_that_takes_for_ever_ends_and_the_next_value_is_judged(schema, value):
    grader = JsonGrader(json_schema=schema, seconds=0.3)
    assert grader.grade(problem(), value) == Grade(0.0, {"too_slow": 1.0})
    assert said(grader, '"a"') == 1.0


def test_a_number_that_nothing_can_divide_is_wrong_and_no_failure():
    for value in ('{"p": 1e400}', '{"p": 1' + "0" * 400 + "}"):
        assert said(JsonGrader(json_schema={"properties": {"p": {"multipleOf": 0.01}}}), value) == 0.0


def test_a_schema_that_refers_to_another_machine_is_a_failure_and_is_not_fetched():
    assert "its schema cannot be asked" in JsonGrader(json_schema={"$ref": "http://127.0.0.1:9/x"}).grade(problem(), "1").failure


def test_json_without_a_schema_is_any_value_and_fences_may_be_refused():
    assert said(JsonGrader(), "[1, 2.5, null]") == 1.0
    assert said(JsonGrader(), "[1, Infinity]") == 0.0
    assert said(JsonGrader(fenced=False), "```json\n1\n```") == 0.0
    assert said(JsonGrader(json_schema=False), "1") == 0.0, "the schema that allows nothing"


def test_a_schema_that_is_none_is_refused_in_the_recipe_and_in_the_row():
    with pytest.raises(ValidationError, match="its schema is no JSON Schema"):
        JsonGrader(json_schema={"type": "objekt"})
    assert "is no JSON Schema" in JsonGrader().gold_problem(problem(json_schema={"type": 3}))
    assert JsonGrader().gold_problem(problem(json_schema=PERSON)) is None


# ---- think


@pytest.mark.parametrize(("text", "plain", "tagged"), [
    ("<think>so</think>7", 1, 0),
    ("<think></think> 7", 1, 0),
    ("<think>so</think>\n<answer>7</answer>", 1, 1),
    ("<think>so</think> <answer> </answer>", 1, 0),
    ("<think>so</think> <answer>7</answer> and more", 1, 0),
    ("<think>so</think> <answer>7</answer><answer>8</answer>", 1, 0),
    ("<think>so <answer>8</answer></think> <answer>7</answer>", 1, 0),
    ("<think>so</think>", 0, 0),
    ("<think>so</think>  \n", 0, 0),
    ("<think>so 7", 0, 0),
    ("so</think>7", 0, 0),
    ("</think>so<think>7", 0, 0),
    ("<think>a</think><think>b</think>7", 0, 0),
    ("<think>a</think>b</think>7", 0, 0),
    ("Well. <think>so</think>7", 0, 0),
    ("<Think>so</Think>7", 0, 0),
    ("", 0, 0),
])  # fmt: skip
def test_a_thought_and_then_an_answer(text, plain, tagged):
    assert said(ThinkGrader(), text) == plain
    assert said(ThinkGrader(answer_tag="answer"), text) == tagged


def test_a_template_may_have_written_the_opening_tag():
    assert said(ThinkGrader(prefilled=True), "so</think>7") == 1.0
    assert said(ThinkGrader(prefilled=True), "<think>so</think>7") == 0.0
    assert said(ThinkGrader(tag="reasoning"), "<reasoning>so</reasoning>7") == 1.0


# ---- length, repetition, script


def test_a_long_answer_is_punished_softly_and_then_wholly():
    grader = OverlongGrader(longest=100, buffer=20)
    grades = grader.grade_all([sample("x", tokens) for tokens in (1, 80, 81, 90, 100, 101)])
    assert [grade.score for grade in grades] == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    assert OverlongGrader(longest=20480, buffer=4096).cost(18432) == -0.5
    assert grader.grade(problem(), "x").score is None
    with pytest.raises(ValidationError, match="buffer: 30 is more than longest"):
        OverlongGrader(longest=20, buffer=30)


def test_what_has_stood_there_before_costs_its_share():
    grader = RepetitionGrader(words=2)
    assert said(grader, "a b c d") == 0.0
    assert said(grader, "a b a b a b") == pytest.approx(-3 / 5)  # ab, ba, ab, ba, ab
    assert said(grader, "a a a a a") == pytest.approx(-3 / 4)
    assert [said(grader, text) for text in ("", "a")] == [0.0, 0.0]


@pytest.mark.parametrize(("script", "text", "share"), [
    ("Latin", "Hello, Wörld 12!", 1.0), ("Latin", "你好 ab", 0.5), ("Han", "你好 ab", 0.5), ("Cyrillic", "да", 1.0), ("Han", "12", 1.0),
    ("Latin", "", 1.0),
])  # fmt: skip
def test_letters_of_another_script_cost_their_share(script, text, share):
    assert said(ScriptGrader(script=script), text) == share


def test_a_script_that_there_is_not_is_refused():
    with pytest.raises(ValidationError, match="'Klingonisch' is no script of Unicode"):
        ScriptGrader(script="Klingonisch")


# ---- gates


def gated(**changes):
    settings = {"gates": {"form": {"kind": "think"}}, "grader": {"kind": "number"}, **changes}
    return GatedGrader.model_validate(settings)


def test_the_answer_counts_only_in_its_form_and_the_form_alone_earns_nothing():
    texts = {"<think>a</think>7": 1.0, "7": 0.0, "<think>a</think>8": 0.0, "": 0.0}
    grades = gated().grade_all([sample(text) for text in texts])
    assert [grade.score for grade in grades] == list(texts.values())
    assert [grade.parts for grade in grades[:2]] == [{"form": 1.0, "score": 1.0}, {"form": 0.0, "score": 1.0}]
    assert gated(otherwise=-1.0).grade(problem("7"), "7").score == -1.0
    assert (gated().open_scale, gated(otherwise=-1.0).open_scale) == (False, True)


def test_a_gate_may_be_passed_in_part_and_its_failure_is_one():
    grader = gated(gates={"latin": {"kind": "script", "script": "Latin"}}, threshold=0.5)
    assert grader.grade(problem("7"), "it is 7").score == 1.0
    assert grader.grade(problem("7"), "это 7").score == 0.0
    broken = gated(gates={"long": {"kind": "overlong", "longest": 9, "buffer": 3}})
    assert broken.grade(problem("7"), "7").failure.startswith("long: overlong counts the tokens")
    assert broken.gold_problem(problem("many")) is not None


def test_every_grader_of_form_gives_a_number_whatever_it_reads():
    graders = [
        RegexGrader(pattern=r"(\w+\s?)*7"), JsonGrader(json_schema=PERSON), ThinkGrader(answer_tag="answer"), RepetitionGrader(),
        ScriptGrader(script="Latin"),
    ]  # fmt: skip
    hostile = ["", "\x00", "７", "9" * 5000, "<think>" * 3000, "}{" * 3000, "\ud800", "a " * 20000, json.dumps([[]] * 50), "\u202e7"]
    for grader in graders:
        for text in hostile:
            grade = grader.grade(problem("7"), text)
            assert grade.failure is None, (grader.kind, text[:20], grade.failure)
            assert -1 <= grade.score <= 1
