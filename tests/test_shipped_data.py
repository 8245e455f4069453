"""What comes with the package to compare and to grade: every row reads, no test prompt is learned from, the labels are true."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest

from posttrain.data.dataset import Data
from posttrain.paths import resolve
from posttrain.tasks import choice as choice  # whose format is registered with it

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import arith_steps_data
import rlhf_sentiment_data

WORDED = {"kind": "labelled", "good": "positive"}
FILES = {
    "arith_steps.jsonl.gz": ("steps", 5_432),
    "arith_steps_test.jsonl": ("steps", 300),
    "commonsense_train.jsonl.gz": ("choice", 1_600),
    "commonsense_test.jsonl.gz": ("choice", 400),
    "hh_harmless_train.jsonl.gz": ("preference", 1_676),
    "hh_harmless_test.jsonl.gz": ("preference", 250),
    "hh_helpful_train.jsonl.gz": ("preference", 1_713),
    "hh_helpful_test.jsonl.gz": ("preference", 258),
    "ifeval_half.jsonl": ("problem", 271),
    "mbpp_train.jsonl.gz": ("problem", 474),
    "reviews_train.jsonl.gz": (WORDED, 5_637),
    "reviews_test.jsonl.gz": (WORDED, 1_083),
    "sentiment_train.jsonl.gz": (WORDED, 7_509),
    "sentiment_test.jsonl.gz": (WORDED, 963),
}
PAIRS = [("arith_steps", "arith_steps_test"), *((f"{name}_train", f"{name}_test") for name in ("hh_harmless", "hh_helpful", "reviews"))]
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}


def content(path):
    data = Path(path).read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def rows(name):
    return [json.loads(line) for line in content(resolve(f"posttrain:data/{name}")).splitlines()]


def shipped(stem):
    return rows(next(name for name in FILES if name.split(".")[0] == stem))


@pytest.mark.parametrize("name", FILES)
def test_every_row_reads_and_has_an_id_of_its_own(name):
    format, count = FILES[name]
    loaded = Data.model_validate({"sources": f"posttrain:data/{name}", "format": format}).read()
    assert (loaded.usable, loaded.dropped) == (count, {})
    assert len({row["id"] for row in rows(name)}) == count


@pytest.mark.parametrize(("train", "test"), PAIRS)
def test_no_prompt_of_a_test_is_learned_from(train, test):
    learned = {json.dumps(row["prompt"]) for row in shipped(train)}
    assert not [row["id"] for row in shipped(test) if json.dumps(row["prompt"]) in learned]


def test_no_question_of_a_test_is_learned_from_and_every_answer_is_one_of_the_choices():
    train, test = shipped("commonsense_train"), shipped("commonsense_test")
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    for row in train + test:
        assert row["labels"] == ["A", "B", "C", "D", "E"]
        assert row["answer"] in row["labels"]
        assert len(row["choices"]) == 5


def text(row):
    return rlhf_sentiment_data.plain(f"{row['prompt'][0]['content']} {row['completion'][0]['content']}")


def test_no_sentence_stands_in_two_files_and_no_review_is_split():
    files = [{text(row) for row in shipped(name)} for name in ("sentiment_train", "sentiment_test", "reviews_train", "reviews_test")]
    assert len(set.union(*files)) == sum(map(len, files))
    train, test = ({row["id"].rsplit("-", 1)[0] for row in shipped(name)} for name in ("reviews_train", "reviews_test"))
    assert not train & test


def test_sentiment_rows_are_a_few_words_and_a_longer_rest_with_labels_in_balance():
    for name, beginning, most in [("sentiment_train", 3, 99), ("sentiment_test", 3, 99), ("reviews_train", 4, 40), ("reviews_test", 4, 40)]:
        found = shipped(name)
        assert all(len(row["prompt"][0]["content"].split()) == beginning for row in found)
        assert all(8 <= len(row["completion"][0]["content"].split()) + beginning <= most for row in found)
        assert 0.48 < sum(row["label"] == "positive" for row in found) / len(found) < 0.52


def holds(step):
    left, sign, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", step).groups()
    return SIGNS[sign](int(left), int(right)) == int(result)


@pytest.mark.parametrize("name", ["arith_steps.jsonl.gz", "arith_steps_test.jsonl"])
def test_a_step_is_labelled_right_until_the_first_that_does_not_hold(name):
    solutions = {row["id"]: row["solution"].split("\n") for row in rows("arith_train.jsonl.gz")}
    spans = {"arith_steps.jsonl.gz": range(2_000, 7_000), "arith_steps_test.jsonl": range(7_000, 7_800)}
    wrong_rows = 0
    for row in rows(name):
        problem = row["id"].replace("arith-steps", "arith-train").removesuffix("-slip")
        solution = solutions[problem]
        assert int(problem.rsplit("-", 1)[1]) in spans[name]
        assert len(solution) == len(row["steps"]) >= 2
        slips = [index for index, step in enumerate(row["steps"]) if not holds(step)]
        first = slips[0] if slips else len(solution)
        assert len(slips) <= 1, "what follows from a slip holds by itself"
        assert row["labels"] == [index < first for index in range(len(solution))]
        assert row["steps"][:first] == solution[:first]
        if slips:
            assert row["steps"][first].split(" = ")[0] == solution[first].split(" = ")[0]
            assert row["steps"][-1].split(" = ")[1] != solution[-1].split(" = ")[1], "a slip changes the answer"
            wrong_rows += 1
    assert wrong_rows == FILES[name][1] / 2


def test_the_labelled_steps_are_made_again_as_they_are(tmp_path):
    """Compared unpacked: how gzip packs them depends on the version of zlib."""
    arith_steps_data.main(tmp_path)
    for name in arith_steps_data.FILES:
        assert content(tmp_path / name) == content(resolve(f"posttrain:data/{name}"))


def test_the_makers_write_the_same_bytes_each_time(tmp_path):
    sentences = [{"id": f"s-{each}", "text": f"a film of {each} laughs and of not one dull minute .", "label": "positive"} for each in range(9)]
    said = [f"scene {each} of film N has two car chases and (alas) one ending!" for each in range(6)]
    reviews = [{"id": f"r-{each}", "text": " ".join(said).replace("N", str(each)), "label": "negative"} for each in range(1_502)]
    for name, made in [("train", sentences[:6]), ("test", sentences[6:]), ("reviews", reviews)]:
        (tmp_path / name).write_text("\n".join(map(json.dumps, made)))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        rlhf_sentiment_data.main(*(str(tmp_path / name) for name in ("train", "test", "reviews", folder)))
        arith_steps_data.main(tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(name for name in FILES if not name.startswith(("hh_", "commonsense_", "ifeval_", "mbpp_")))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        if name.endswith(".gz"):
            assert (tmp_path / "one" / name).read_bytes()[4:8] == bytes(4), "a time in the header"
    taken = [json.loads(line)["id"] for line in content(tmp_path / "one" / "reviews_train.jsonl.gz").splitlines()[:8]]
    assert taken == ["r-0-0", "r-0-2", "r-0-4", "r-0-5", "r-1-2", "r-1-3", "r-1-4", "r-1-5"], "some of each, in their order"


def test_sentences_end_where_a_reader_would_end_them():
    read = "it's by mr. j. t. walsh, u.s. marine. is it good? it is!"
    assert list(filter(None, rlhf_sentiment_data.sentences(read))) == ["it's by mr. j. t. walsh, u.s. marine.", "is it good?", "it is!"]


@pytest.mark.parametrize(
    ("sentence", "whole"),
    [
        ("the film has a plot that nobody needs.", True),
        ("the film has a plot nobody needs.", False),
        ("the film, " + "very " * 37 + "long.", True),
        ("the film, " + "very " * 38 + "long.", False),
        ("the film ( and its plot ) is \" good \" fun.", True),
        ("the film ( and its plot is \" good \" fun.", False),
        ("the film and its plot are \" good old fun.", False),
        ("the film and its plot are *good* old fun.", False),
        (", the film and its plot are good old fun.", False),
        ("the film and its plot are good old fun", False),
    ],
)
def test_only_whole_ordinary_sentences_of_8_to_40_words_are_taken(sentence, whole):
    assert rlhf_sentiment_data.is_whole(sentence) is whole


def test_what_follows_from_a_slip_is_carried_and_stays_in_natural_numbers():
    lines = arith_steps_data.lines_of("4 * 6 = 24\n8 + 24 = 32\n32 / 4 = 8")
    assert arith_steps_data.carried(lines, 0, 4) == arith_steps_data.lines_of("4 * 6 = 28\n8 + 28 = 36\n36 / 4 = 9")
    assert arith_steps_data.carried(lines, 0, 1) is None, "33 / 4"
    assert arith_steps_data.carried(lines, 2, -10) is None, "-2"
    assert arith_steps_data.is_plain(lines, "8 and 4 boxes of 6, shared by 4")
    assert not arith_steps_data.is_plain(lines, "24 and 4 boxes of 6, shared by 4"), "24 is given and a result"
    assert not arith_steps_data.is_plain(arith_steps_data.lines_of("2 + 2 = 4\n3 * 5 = 15\n15 - 1 = 14"), ""), "4 is never used"


def test_every_shipped_file_has_a_row_in_the_licences_with_its_count():
    licences = resolve("posttrain:LICENSES.md").read_text(encoding="utf-8")
    for name, (_, count) in FILES.items():
        assert re.search(rf"^\| `data/{re.escape(name)}` \| {count:,} \| ", licences, re.MULTILINE), name
