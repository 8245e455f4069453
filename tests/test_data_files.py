"""What data files give: rows with their places, or a message with file and line. docs/data.md states the same."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from posttrain.data.dataset import Data
from posttrain.data.source import File, Inline, Source
from posttrain.errors import DataError
from posttrain.text import Text

PAIR = {"prompt": "2+2", "completion": "4"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*rows, name="train.jsonl"):
    """Rows as JSON lines; a string is written as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    Path(name).write_text(text, encoding="utf-8")
    return name


def read(name="train.jsonl", **more):
    return Data.model_validate({"sources": name, **more}).read()


def refusal(name="train.jsonl", **more):
    with pytest.raises(DataError) as caught:
        read(name, **more)
    return str(caught.value)


# files


def test_every_row_carries_its_file_and_line():
    write(PAIR, "", "   ", PAIR)
    assert [raw.where for raw in File(path="train.jsonl").read()] == ["train.jsonl:1", "train.jsonl:4"]


def test_a_byte_order_mark_and_windows_line_ends_are_read_over():
    Path("train.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n{"text": "b\\r"}\r\n')
    assert [raw.value for raw in File(path="train.jsonl").read()] == [{"text": "a"}, {"text": "b\r"}]


def test_line_separators_of_unicode_do_not_split_a_row():
    Path("train.jsonl").write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert [raw.value["text"] for raw in File(path="train.jsonl").read()] == ["a\u2028b\x85c"]


def test_gzip_is_read_whatever_the_file_is_called():
    for name in ("a.jsonl.gz", "b.jsonl"):
        Path(name).write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
        assert [raw.where for raw in File(path=name).read()] == [f"{name}:1", f"{name}:2"]


def test_a_truncated_gzip_stops_with_its_line():
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(20_000)))
    Path("a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    message = refusal("a.jsonl.gz")
    line = int(message.split(":")[1])
    assert message == f"a.jsonl.gz:{line}: the gzip data end early: the file is cut short; copy it again"
    assert 5_000 < line < 15_000


def test_damaged_gzip_stops_with_its_line():
    whole = bytearray(gzip.compress(b'{"text": "a"}\n'))
    whole[-8] ^= 1
    Path("a.jsonl.gz").write_bytes(whole)
    assert refusal("a.jsonl.gz").startswith("a.jsonl.gz:2: damaged gzip data (CRC check failed")


def test_binary_data_are_refused():
    Path("train.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n')
    assert refusal() == "train.jsonl:2: not UTF-8 text (byte 11 of the line); is this really a .jsonl file?"


def test_broken_json_is_named_with_line_and_column():
    write(PAIR, '{"prompt": }')
    assert refusal() == ("train.jsonl:2: column 12: not valid JSON: Expecting value; each line must be one whole JSON object")


def test_a_line_cut_short_at_the_end_is_named():
    Path("train.jsonl").write_text(json.dumps(PAIR) + '\n{"prompt": "2+')
    assert refusal() == (
        "train.jsonl:2: column 12: not valid JSON: Unterminated string starting at; "
        "the last line is cut short; copy the file again"
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [("[1]", "a list"), ("3", "3 (integer)"), ("null", "null"), ('"a"', '"a" (text)'), ("true", "true (true or false)")],
)
def test_a_row_that_is_no_object_is_refused(line, found):
    write(PAIR, line)
    assert refusal() == f'train.jsonl:2: expected an object such as {{"prompt": ...}}, found {found}'


def test_json_beyond_the_reader_is_refused():
    write("[" * 100_000)
    assert refusal() == "train.jsonl:1: not usable JSON: nested too deeply"
    write('{"text": ' + "9" * 5_000 + "}")
    assert refusal().startswith("train.jsonl:1: not usable JSON: Exceeds the limit (4300 digits)")


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff"])
def test_an_empty_file_is_refused(text):
    Path("train.jsonl").write_text(text, encoding="utf-8")
    assert refusal() == "train.jsonl: is empty: it has no rows"


def test_a_directory_is_refused():
    Path("folder.jsonl").mkdir()
    assert refusal("folder.jsonl") == "folder.jsonl: is a directory; name one file in it"


def test_a_missing_file_is_refused_with_the_nearest_name():
    write(PAIR)
    Path("other.txt").write_text("x")
    assert refusal("trian.jsonl") == 'trian.jsonl: no such file; the nearest name in that folder is "train.jsonl"'
    assert refusal("none/train.jsonl") == "none/train.jsonl: no such file; its folder does not exist either"
    assert refusal("posttrain:data/arith_tests.jsonl") == (
        'posttrain:data/arith_tests.jsonl: no such file; the nearest name in that folder is "arith_test.jsonl"'
    )


def test_an_unknown_ending_is_refused():
    Path("train.docx").write_text("x")
    assert refusal("train.docx") == (
        "train.docx: the format of the file is told by its name, which must end in .jsonl, .json, .csv, .parquet, .txt"
    )


def test_a_json_file_is_one_list():
    Path("a.json").write_text(json.dumps([PAIR, PAIR], indent=2))
    assert [raw.where for raw in File(path="a.json").read()] == ["a.json:1", "a.json:2"]
    Path("a.json").write_text(json.dumps(PAIR))
    assert refusal("a.json") == "a.json:1: expected a list of objects, found an object"
    Path("a.json").write_text('[\n{"a": 1},\n{"a" 2}]')
    assert refusal("a.json") == (
        "a.json:3: column 6: not valid JSON: Expecting ':' delimiter; "
        "one object a line is a .jsonl file, this name promises one list"
    )


def test_a_csv_file_names_the_line_on_which_a_row_begins():
    Path("a.csv").write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"two\nlines",4\r\n\r\nb,5\r\n')
    rows = list(File(path="a.csv").read())
    assert [(raw.where, raw.value) for raw in rows] == [
        ("a.csv:2", {"prompt": "two\nlines", "completion": "4"}),
        ("a.csv:5", {"prompt": "b", "completion": "5"}),
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a,b\n1\n", "a.csv:2: 1 cells, but the header names 2 columns"),
        ("a,b\n1,2\n1,2,3\n", "a.csv:3: 3 cells, but the header names 2 columns"),
        ("a,a\n1,2\n", "a.csv:1: two columns have the same name; rename one of a, a"),
        ('a,b\n1,"2\n', "a.csv:2: not valid CSV: unexpected end of data"),
        ("a,b\n", "a.csv: is empty: it has no rows"),
    ],
)
def test_a_malformed_csv_file_is_refused(body, message):
    Path("a.csv").write_text(body)
    assert refusal("a.csv") == message


def test_a_long_cell_of_a_csv_file_is_read():
    Path("a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(next(File(path="a.csv").read()).value["text"]) == 200_000


def test_parquet_rows_are_numbered_and_a_cut_file_is_refused():
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["1", None]}), "a.parquet")
    assert [raw.where for raw in File(path="a.parquet").read()] == ["a.parquet:1", "a.parquet:2"]
    assert read("a.parquet").dropped["empty completion"].first == "a.parquet:2"
    Path("a.parquet").write_bytes(Path("a.parquet").read_bytes()[:-40])
    assert refusal("a.parquet").startswith("a.parquet:1: not a whole parquet file: Parquet magic bytes not found in footer")


def test_a_text_file_is_one_document():
    Path("a.txt").write_bytes(b"one\n\ntwo\r\n")
    assert read("a.txt").rows == [[Text("one\n\ntwo\r\n", "a.txt:1")]]


def test_hub_rows_and_the_hubs_own_words_for_what_is_missing(monkeypatch):
    import datasets

    asked = []

    def load(*names, **options):
        asked.append((names, options))
        if names[0] == "no/such":
            raise ValueError('Unknown split "trian".\nmore')
        return datasets.Dataset.from_list([PAIR, PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = {"kind": "hub", "path": "a/b", "split": "test", "revision": "v1", "rows": "1:"}
    assert [raw.where for raw in Source.model_validate(hub).read()] == ["a/b[test]:2"]
    assert asked == [(("a/b", None), {"split": "test", "revision": "v1"})]
    with pytest.raises(DataError, match=r'^no/such: the hub data set cannot be loaded: Unknown split "trian"\.$'):
        list(Source.model_validate({"kind": "hub", "path": "no/such"}).read())


LINES = st.lists(
    st.one_of(st.binary(max_size=40), st.sampled_from([b'{"text": "a"}', b'{"text": "b"}\r', b"", b'{"text"', b"[]"]))
)


@given(
    lines=LINES, cut=st.integers(0, 30), name=st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "a.txt"])
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_rows_or_a_message(lines, cut, name):
    data = b"\n".join(lines)
    data = gzip.compress(data)[cut if cut > 20 else 0 :] if name.endswith("gz") else data
    Path(name).write_bytes(data)
    try:
        said = [row.where for row in File(path=name).read() if isinstance(row.value, dict)]
    except DataError as error:
        said = [str(error)]
    assert said
    assert all(each.startswith(f"{name}:") for each in said)


# sources in recipes


def test_a_plain_string_is_a_file_unless_it_names_a_kind():
    data = Data.model_validate({"sources": "posttrain:data/arith_test.jsonl"})
    assert data.sources == [File(path="posttrain:data/arith_test.jsonl")]
    mixed = Data.model_validate({"sources": ["a.jsonl", {"path": "b.csv"}, {"kind": "inline", "items": [PAIR]}]})
    assert mixed.sources == [File(path="a.jsonl"), File(path="b.csv"), Inline(items=[PAIR])]
    with pytest.raises(ValidationError, match="Field required"):
        Data.model_validate({"sources": "hub"})
    with pytest.raises(ValidationError, match=r"cannot import 'no_package\.rows'"):
        Data.model_validate({"sources": "no_package.rows:Mine"})


def test_every_source_of_a_mix_has_a_weight_or_none_has():
    weighed = [{"path": "a.jsonl", "weight": 0.25}, {"path": "b.csv", "weight": 2}]
    assert [source.weight for source in Data.model_validate({"sources": weighed}).sources] == [0.25, 2.0]
    with pytest.raises(
        ValidationError, match=r"sources: c\.txt has no weight, but others have; give every source a weight, or none"
    ):
        Data.model_validate({"sources": [*weighed, "c.txt"]})


def test_data_settings_say_their_sources_whole():
    data = Data.model_validate({"sources": "a.jsonl", "format": {"kind": "text", "fields": {"text": "body"}}})
    assert data.model_dump()["sources"] == [{"kind": "file", "weight": None, "rows": None, "path": "a.jsonl"}]
    assert Data.model_validate(data.model_dump()) == data


def test_a_row_limit_of_one_token_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Data.model_validate({"sources": "a.jsonl", "max_tokens": 1})


@pytest.mark.parametrize(("rows", "texts"), [("1:3", "bc"), (":2", "ab"), ("2:", "cd"), ("0:4", "abcd"), (":", "abcd")])
def test_a_slice_takes_rows_by_position(rows, texts):
    write(*({"text": letter} for letter in "abcd"))
    assert "".join(raw.value["text"] for raw in File(path="train.jsonl", rows=rows).read()) == texts


def test_a_slice_must_lie_inside_the_data():
    write(*({"text": letter} for letter in "abcd"))
    for rows in ("4:", "2:5", "9:12"):
        assert (
            refusal({"path": "train.jsonl", "rows": rows}) == f'train.jsonl: rows "{rows}" reaches past the end: there are 4 rows'
        )
    with pytest.raises(ValidationError, match="'1-3' is not a slice of rows; write it like"):
        File(path="train.jsonl", rows="1-3")
    with pytest.raises(ValidationError, match="'3:3' holds no row: it ends before it begins"):
        File(path="train.jsonl", rows="3:3")


def test_a_fingerprint_changes_with_the_data_and_with_nothing_else():
    write(PAIR, PAIR)
    data = Data.model_validate({"sources": "train.jsonl"})
    before = data.fingerprint()
    assert before == data.fingerprint() == Data.model_validate({"sources": "train.jsonl", "learn": "last"}).fingerprint()
    assert before != Data.model_validate({"sources": {"path": "train.jsonl", "rows": ":1"}}).fingerprint()
    write(PAIR, {**PAIR, "completion": "5"})
    assert before != data.fingerprint()
    one, other = ({"sources": {"kind": "inline", "items": [{"text": text}]}} for text in "ab")
    assert Data.model_validate(one).fingerprint() != Data.model_validate(other).fingerprint()


def test_a_check_refuses_before_anything_is_read_whole():
    write({"prompt": "a", "response": "b"}, "{broken")
    with pytest.raises(DataError, match='needs the column "completion"'):
        Data.model_validate({"sources": "train.jsonl", "format": "prompt_completion"}).check()
    Data.model_validate(
        {"sources": "train.jsonl", "format": {"kind": "prompt_completion", "fields": {"completion": "response"}}}
    ).check()


def test_reading_a_file_imports_nothing_heavy():
    write(CHAT)
    code = (
        "import sys; from posttrain.data.dataset import Data; d = Data.model_validate({'sources': 'train.jsonl'}); "
        "d.check(); d.read(); print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
