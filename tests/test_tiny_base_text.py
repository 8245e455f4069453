"""What `assets/tiny-base` reads before anything is post-trained: true arithmetic, worded otherwise than the data set."""

import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from posttrain.data.source import Source
from posttrain.paths import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import tiny_base_text
from tiny_base_text import LARGEST, ArithmeticText

EQUATION = re.compile(r"(?<!\S)\(?(\d+) ([-+*/]) (\d+) = (\d+)\b")
NAMES = "Anna Ben Cara Dan Ella Finn Gina Hugo Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor"
OBJECTS = "apples balloons books cards coins cookies eggs marbles pens shells stamps stickers"
SPELLED = rf"\b(?:{'|'.join(sorted(tiny_base_text.WORDS, key=len, reverse=True))})\b"  # the longest first
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def texts(count: int, **settings: float) -> list[str]:
    return [raw.value["text"] for raw in ArithmeticText(documents=count, **settings).read()]


def equations(text: str) -> list[tuple[int, str, int, int]]:
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in EQUATION.findall(text)]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return texts(2000)


@pytest.fixture(scope="module")
def problems() -> list[str]:
    """Story problems with their work, one each."""
    return [problem for text in texts(2000, drills=0, prose=0) for problem in text.split("\n\n")]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Every problem text of the data set, training and test."""
    with gzip.open(resolve("posttrain:data/arith_train.jsonl.gz"), "rt") as train:
        rows = [*train, *resolve("posttrain:data/arith_test.jsonl").read_text().splitlines()]
    return [json.loads(row)["prompt"][0]["content"] for row in rows]


def skeletons(text: str, names: str, things: str) -> set[str]:
    """Sentences with names, things and numbers blanked out, in lower case."""
    for words, blank in ((names, "@"), (things, "~")):
        text = re.sub(rf"\b(?:{'|'.join(words.split())})\b", blank, text)
    sentences = re.split(r"(?<=[.?])\s+|\n", re.sub(r"\d+", "#", text))
    return {sentence.strip().lower() for sentence in sentences}


def test_every_equation_is_true_and_natural(documents):
    found = [equation for text in documents for equation in equations(text)]
    assert len(found) > 10_000
    assert sum(text.count("=") for text in documents) == len(found), "an `=` outside of an equation `a op b = c`"
    for left, sign, right, result in found:
        assert SIGNS[sign](left, right) == result >= 0
        assert sign != "/" or left % right == 0


def test_no_number_is_above_the_largest(documents):
    assert max(int(number) for text in documents for number in re.findall(r"\d+", text)) <= LARGEST


def test_the_last_line_of_a_story_has_the_answer(problems):
    for problem in problems:
        answer = equations(problem)[-1][3]
        assert int(re.findall(r"\d+", problem.splitlines()[-1])[-1]) == answer, problem


def test_the_work_of_a_story_uses_every_result_but_the_last(problems):
    for problem in problems:
        worked = equations(problem)
        for place, (_, _, _, result) in enumerate(worked[:-1]):
            assert any(result in (left, right) for left, _, right, _ in worked[place + 1 :]), problem


def test_the_work_of_a_story_starts_from_the_numbers_that_it_tells(problems):
    for problem in problems:
        worked = equations(problem)
        told = {int(number) for number in re.findall(r"\d+", EQUATION.sub("", problem))} | {2, 3}
        spelled = {tiny_base_text.WORDS.index(word) for word in re.findall(SPELLED, problem.lower())}
        results = {result for *_, result in worked}
        assert {number for left, _, right, _ in worked for number in (left, right)} <= told | spelled | results, problem


@pytest.mark.parametrize(
    ("kind", "sign", "work"),
    [
        ("gain", "+", ["12 + 4 = 16"]), ("receive", "+", ["12 + 4 = 16"]), ("lose", "-", ["12 - 4 = 8"]),
        ("give", "-", ["12 - 4 = 8"]), ("double", "*", ["12 * 2 = 24"]), ("triple", "*", ["12 * 3 = 36"]),
        ("share", "/", ["12 / 4 = 3"]),
    ],
)  # fmt: skip
def test_each_kind_of_event_is_worked_with_its_sign(kind, sign, work):
    """And by no other: of many walks, every step of the kind does to the amount before what the kind says."""
    number = {"double": 2, "triple": 3}.get(kind, 4)
    assert list(tiny_base_text._change(kind, 12, sign, number).work) == work
    dice = tiny_base_text.Dice(tiny_base_text.generator(0, "test"))
    seen = 0
    for _ in range(300):
        before = 12
        for step in tiny_base_text.walk(dice, before, 4):
            if step.kind == kind:
                seen += 1
                assert list(step.work) == [f"{before} {sign} {step.k} = {step.after}"]
            elif step.kind == "packs":
                assert step.work == (f"{step.n} * {step.k} = {step.n * step.k}", f"{before} + {step.n * step.k} = {step.after}")
            before = step.after
    assert seen > 30


def test_a_document_is_the_same_alone_and_in_sequence(documents):
    alone = ArithmeticText(documents=2000)
    assert [alone.document(index) for index in (1999, 0, 700)] == [documents[1999], documents[0], documents[700]]
    assert texts(50) == documents[:50]
    assert documents[0] == ArithmeticText(documents=1).document(0)


def test_a_recipe_names_it_as_a_kind_of_ones_own():
    source = Source.model_validate({"kind": "tiny_base_text:ArithmeticText", "documents": 4, "rows": "1:3"})
    assert isinstance(source, ArithmeticText)
    assert [raw.value["text"] for raw in source.read()] == texts(3)[1:]


def test_rows_are_numbered_and_hold_one_text():
    rows = list(ArithmeticText(documents=3).read())
    assert [row.where for row in rows] == ["arithmetic text:1", "arithmetic text:2", "arithmetic text:3"]
    assert all(list(row.value) == ["text"] for row in rows)


def test_seeds_differ(documents):
    others = texts(200, seed=1)
    assert not any(other == text for other, text in zip(others, documents, strict=False))
    assert len(set(others) & set(documents)) <= 5  # pages of tables are few enough to come again


def test_documents_hardly_repeat(documents):
    assert len(set(documents)) >= 1950


def test_the_fingerprint_follows_what_is_written_and_nothing_else():
    source = ArithmeticText(documents=10)
    assert len(source.fingerprint()) == 64
    assert source.fingerprint() == ArithmeticText(documents=10, weight=3.0).fingerprint()
    others = (ArithmeticText(documents=11), ArithmeticText(documents=10, seed=1), ArithmeticText(documents=10, rows="0:9"))
    assert len({source.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_each_of_the_four_signs_is_a_tenth_of_the_equations_or_more(documents, problems):
    for part in (documents, problems):
        signs = Counter(sign for text in part for _, sign, _, _ in equations(text))
        assert min(signs[sign] / signs.total() for sign in "+-*/") >= 0.1, signs


def test_shares_are_kept(documents):
    with_equations_only = sum(not re.search(r"[a-z]", text) for text in documents) / len(documents)
    with_a_question_or_an_end = sum(bool(re.search(r"How many|What|Find how|Count the|In the end", text)) for text in documents)
    assert with_equations_only == pytest.approx(0.35, abs=0.03)
    assert with_a_question_or_an_end / len(documents) == pytest.approx(0.55, abs=0.03)


def test_lengths_are_those_of_short_pages(documents):
    lengths = sorted(map(len, documents))
    assert 190 <= sum(lengths) / len(lengths) <= 250
    assert lengths[20] >= 60
    assert lengths[-20] <= 480


def test_the_everyday_sums_are_all_practised():
    drilled = {equation[:3] for text in texts(12_000, stories=0, prose=0) for equation in equations(text)}
    small = [(a, "+", b) for a in range(1, 21) for b in range(1, 21)] + [(a, "*", b) for a in range(2, 10) for b in range(2, 10)]
    small += [(a + b, "-", b) for a in range(1, 11) for b in range(1, 11)] + [(a, "*", 2) for a in range(1, 50)]
    small += [(a * b, "/", b) for a in range(1, 11) for b in range(2, 10)]
    assert [sum_ for sum_ in small if sum_ not in drilled] == []


def test_numbers_are_spelled_as_people_do():
    spelled = [tiny_base_text.WORDS[number] for number in (0, 13, 20, 42, 100, 105, 199)]
    assert spelled == [
        "zero", "thirteen", "twenty", "forty-two", "one hundred", "one hundred and five", "one hundred and ninety-nine",
    ]  # fmt: skip
    assert len(tiny_base_text.WORDS) == LARGEST + 1


def test_no_template_is_left_unfilled(documents):
    assert not any(re.search(r"[{}|\[\]]", text) for text in documents)


def test_no_name_or_thing_of_the_data_set_is_in_the_vocabulary():
    names = {name.lower() for name in [*tiny_base_text.GIRLS, *tiny_base_text.BOYS]}
    things = {*tiny_base_text.THINGS, *tiny_base_text.CONTAINERS}
    assert not names & set(NAMES.lower().split())
    for thing in OBJECTS.split():
        assert not [word for word in things if thing[:-1] == word or thing in word or thing == word + "s"]


def test_no_name_or_thing_of_the_data_set_is_written(documents, problems):
    forbidden = rf"\b(?:{'|'.join(NAMES.split())}|(?i:{'|'.join(thing[:-1] + 's?' for thing in OBJECTS.split())}))\b"
    assert [found for text in [*documents, *problems] for found in re.findall(forbidden, text)] == []


def test_the_names_and_things_checked_are_all_that_the_data_set_has(prompts):
    capitalised = {word for prompt in prompts for word in re.findall(r"[A-Z][a-z]+", prompt)} - {"How", "Then"}
    assert capitalised == set(NAMES.split())
    assert {re.match(r"\w+ has \d+ (\w+)", prompt)[1] for prompt in prompts} == set(OBJECTS.split())


def test_no_problem_and_no_eight_words_of_one_are_written(documents, problems, prompts):
    def windows(text):
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return {tuple(words[place : place + 8]) for place in range(len(words) - 7)}

    theirs = set().union(*map(windows, prompts))
    ours = set().union(*map(windows, [*documents, *problems]))
    assert len(theirs) > 50_000
    assert len(ours) > 50_000
    assert ours & theirs == set()
    joined = "\n".join([*documents, *problems])
    assert not any(prompt in joined for prompt in prompts)


def test_no_sentence_template_of_the_data_set_is_used(problems, prompts):
    theirs = set().union(*(skeletons(prompt, NAMES, OBJECTS) for prompt in prompts))
    names, things = " ".join([*tiny_base_text.GIRLS, *tiny_base_text.BOYS]), " ".join(tiny_base_text.THINGS)
    ours = set().union(*(skeletons(problem, names, things) for problem in problems))
    assert {"@ has # ~.", "@ buys # more.", "@ gives # to @."} <= theirs
    assert len(theirs) == 10
    assert ours & theirs == set()


def test_no_document_has_the_form_of_a_chat(documents):
    assert not any(re.search(r"(?i)<\||\|>|\b(?:user|assistant|system)\b", text) for text in documents)


def test_shares_of_nothing_are_refused():
    with pytest.raises(ValidationError, match="drills, stories and prose are all 0"):
        ArithmeticText(documents=1, drills=0, stories=0, prose=0)
