"""What rows give: parsed, dropped and counted by reason, or refused with file and line. docs/data.md states the same."""

import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_data_files import CHAT, PAIR, _in_an_empty_folder, read, refusal, write

from posttrain.component import Component
from posttrain.data.dataset import Data, Dropped, describe
from posttrain.data.format import Format, Prompted, Unusable, detect
from posttrain.data.source import Raw, Source
from posttrain.errors import DataError
from posttrain.text import Completion, Conversation, Message, Preference, Problem, Text

__all__ = ["_in_an_empty_folder"]


def dropped(*rows, format="prompt_completion"):
    """Reasons with their counts and first places, a good row standing first."""
    good = {"messages": CHAT, "text": {"text": "a"}}.get(format, PAIR)
    loaded = read(write(good, *rows), format=format)
    return {reason: (each.count, each.first) for reason, each in loaded.dropped.items()}


def parse(value, kind, **fields):
    return Format.model_validate({"kind": kind, "fields": fields}).parse(Raw(value, "f.jsonl:3"))


# columns and types


def test_an_absent_column_is_named_with_the_mapping_that_helps():
    write({"prompt": "2+2", "response": "4"})
    assert refusal(format="prompt_completion") == (
        'train.jsonl:1: format prompt_completion needs the column "completion"; this row has "prompt", "response"; '
        "map it: format.fields.completion: response"
    )


def test_a_row_of_another_schema_stops_with_its_line():
    write(PAIR, PAIR, {"text": "a"})
    assert refusal() == (
        'train.jsonl:3: format prompt_completion needs the column "prompt"; this row has "text"; '
        "map it: format.fields.prompt: <its column>"
    )


def test_a_mapped_column_that_is_absent_is_named():
    write(PAIR)
    assert refusal(format={"kind": "text", "fields": {"text": "body"}}) == (
        'train.jsonl:1: format text needs the column "body"; this row has "prompt", "completion"; '
        "format.fields.text must name a column that every row has"
    )


def test_columns_that_fit_no_format_are_refused_with_a_mapping():
    import posttrain.tasks  # noqa: F401  (tasks add a format of their own)

    write({"instruction": "a", "output": "b"})
    assert refusal() == (
        'train.jsonl:1: no format fits the columns "instruction", "output"; name one and map its columns, such as '
        "format: {kind: prompt_completion, fields: {prompt: instruction, completion: output}}; "
        "formats: choice (question, choices, answer); classified (label, text or messages or prompt); graded (prompt, completion, score); labelled (prompt, completion, label); "
        "messages (messages); preference (chosen, rejected); problem (prompt); prompt_completion (prompt, completion); "
        "ranking (prompt, completions, scores or ranks or best); steps (prompt, labels, steps or completions); text (text)"
    )
    write({"prompt": "a", "response": "b"})
    assert "format: {kind: prompt_completion, fields: {completion: response}}" in refusal()


def test_an_unknown_field_of_a_format_is_refused():
    with pytest.raises(ValidationError, match="format text has no field 'txt'; did you mean 'text'"):
        Format.model_validate({"kind": "text", "fields": {"txt": "body"}})


@pytest.mark.parametrize(
    ("value", "found"),
    [(3, "3 (integer)"), (0.5, "0.5 (number)"), (False, "false (true or false)"), ({"a": 1}, "an object"), (["a"], "a list")],
)
def test_a_wrong_type_is_named_with_its_value(value, found):
    write(*[{"text": "a"}] * 5, {"text": value})
    assert refusal() == (
        f'train.jsonl:6: column "text": expected text, found {found}; correct the row, or name another column in format.fields'
    )


def test_wrong_types_inside_messages_are_named_by_their_place():
    def said(messages):
        write({"messages": messages})
        return refusal(format="messages")

    assert said("hi").startswith('train.jsonl:1: column "messages": expected a list of messages, found "hi" (text);')
    assert said(["hi"]).startswith('train.jsonl:1: messages[0]: expected a message with role and content, found "hi" (text);')
    assert said([{"role": "user", "content": 3}]).startswith(
        "train.jsonl:1: messages[0].content: expected text, found 3 (integer);"
    )
    assert said([{"from": "human", "value": "hi"}]) == (
        'train.jsonl:1: messages[0]: a message needs "role" and "content"; this one has "from", "value"; rename them in the file'
    )
    assert said([{"role": "assistant", "content": "a", "weight": 0.5}]) == (
        'train.jsonl:1: messages[0]: has "weight", which is not read; put what matters into "content", or take it out'
    )
    image = [{"type": "text", "text": "see"}, {"type": "image"}]
    assert said([{"role": "user", "content": image}]) == (
        'train.jsonl:1: messages[0].content[1]: expected {"type": "text", "text": ...}; only text can be learned from'
    )


def test_an_unknown_role_is_refused_with_the_known_ones():
    write({"messages": [CHAT["messages"][0], {"role": "asistant", "content": "yes"}]})
    assert refusal() == (
        'train.jsonl:1: messages[1]: unknown role "asistant"; did you mean "assistant"? (roles: system, user, assistant, tool)'
    )


def test_duplicated_ids_are_refused_where_they_address_draws_and_ignored_elsewhere():
    write(*({"id": name, "prompt": "2+2", "answer": "4"} for name in ("a", "b", "a")))
    assert (
        refusal() == 'train.jsonl:3: the id "a" stands already at train.jsonl:1; ids address random draws, so each must be unique'
    )
    write({"id": "a", **PAIR}, {"id": "a", **PAIR})
    assert read().usable == 2


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "type"]), inner)
    ),
    max_leaves=12,
)


@given(kind=st.sampled_from(sorted(Format.kinds)), values=st.lists(ANY, min_size=8, max_size=8))
@settings(max_examples=500, deadline=None)
def test_any_values_in_the_columns_give_a_row_a_reason_or_a_message(kind, values):
    format = Format.model_validate(kind)
    names = ["messages", "tools", "prompt", "completion", "text", "chosen", "rejected", "id"]
    try:
        said = format.parse(Raw(dict(zip(names, values, strict=True)), "f.jsonl:3")).where + ": "
    except Unusable as reason:
        said = f"f.jsonl:3: {reason}"
    except DataError as error:
        said = str(error)
    assert re.match(r"f\.jsonl:3: ", said)


# rows that are left out and counted


@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_null_and_empty_content_is_dropped_and_counted(nothing):
    assert dropped({**PAIR, "completion": nothing}, {**PAIR, "completion": nothing}) == {"empty completion": (2, "train.jsonl:2")}
    assert dropped({**PAIR, "prompt": nothing}) == {"empty prompt": (1, "train.jsonl:2")}
    assert dropped({"text": nothing}, format="text") == {"empty text": (1, "train.jsonl:2")}
    answer = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": nothing}]}
    question = {"messages": [{"role": "user", "content": nothing}, CHAT["messages"][1]]}
    assert dropped(answer, question, format="messages") == {
        "empty assistant message": (1, "train.jsonl:2"),
        "empty user message": (1, "train.jsonl:3"),
    }


def test_rows_without_an_assistant_message_are_dropped_and_counted():
    system = {"messages": [{"role": "system", "content": "be kind"}]}
    user = {"messages": [CHAT["messages"][0]]}
    assert dropped(system, user, {"messages": []}, format="messages") == {
        "no assistant message to learn from": (3, "train.jsonl:2")
    }


def test_lone_surrogates_and_nul_are_dropped_and_counted_wherever_they_stand():
    bad = [{**PAIR, "note": ["x", {"deep": "\ud800"}]}, {**PAIR, "prompt": "a\udfff"}, {**PAIR, "completion": "a\0b"}]
    assert dropped(*bad) == {
        "text that is not valid Unicode": (2, "train.jsonl:2"),
        "text with a NUL character": (1, "train.jsonl:4"),
    }


def test_other_control_characters_are_kept():
    write({"text": "bell\x07 tab\t escape\x1b pair\U0001f600"})
    assert read().rows == [[Text("bell\x07 tab\t escape\x1b pair\U0001f600", "train.jsonl:1")]]


def test_nothing_usable_is_refused_with_every_reason():
    write({**PAIR, "completion": ""}, {**PAIR, "prompt": None}, {**PAIR, "completion": None})
    assert refusal() == (
        "train.jsonl: none of the 3 rows can be used: "
        "2 empty completion (first: train.jsonl:1); 1 empty prompt (first: train.jsonl:2)"
    )


def test_a_source_of_a_mix_without_any_usable_row_is_refused_and_counts_are_joined():
    empty = {**PAIR, "completion": ""}
    write(PAIR, empty, empty)
    write(empty, PAIR, {**PAIR, "prompt": ""}, name="more.jsonl")
    both = read(["train.jsonl", "more.jsonl"])
    assert (both.count, both.usable, both.counts) == (6, 2, [3, 3])
    assert both.dropped == {"empty completion": Dropped(3, "train.jsonl:2"), "empty prompt": Dropped(1, "more.jsonl:3")}
    write(empty, name="none.jsonl")
    assert refusal(["train.jsonl", "none.jsonl"]) == (
        "none.jsonl: none of the 1 rows can be used: 1 empty completion (first: none.jsonl:1)"
    )


def test_the_summary_counts_and_warns_where_most_rows_are_gone():
    write(PAIR, *[{**PAIR, "completion": ""}] * 3)
    assert read().summary() == [
        "train.jsonl: format prompt_completion (found from the columns of the first row)",
        "1 of 4 rows are usable",
        "dropped 3: empty completion (first: train.jsonl:2)",
        "warning: 75% of the rows were dropped",
    ]
    write(PAIR, {**PAIR, "completion": ""})
    assert read(format="prompt_completion").summary() == [
        "train.jsonl: format prompt_completion",
        "1 of 2 rows are usable",
        "dropped 1: empty completion (first: train.jsonl:2)",
    ]


# what each format makes of a row


def test_assistant_first_and_two_user_turns_are_read_as_they_stand():
    roles = ["assistant", "user", "user", "assistant"]
    row = parse({"messages": [{"role": role, "content": role} for role in roles]}, "messages")
    assert [message.role for message in row.messages] == roles


def test_tool_calls_are_read_in_both_forms():
    plain = {"name": "weather", "arguments": {"city": "Oslo"}}
    forms = [
        plain,
        {"id": "1", "type": "function", "function": plain},
        {"type": "function", "function": {**plain, "arguments": '{"city": "Oslo"}'}},
    ]
    for form in forms:
        messages = [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": [form]},
            {"role": "tool", "tool_call_id": "1", "content": ""},
            {"role": "assistant", "content": "rain", "tool_calls": None},
        ]
        row = parse({"messages": messages, "tools": '[{"name": "weather"}]'}, "messages")
        assert row.messages[1:] == (Message("assistant", "", (plain,)), Message("tool", ""), Message("assistant", "rain"))
        assert row.tools == ({"name": "weather"},)


def test_tool_calls_that_cannot_be_read():
    def call(value, role="assistant"):
        return parse({"messages": [{"role": role, "content": "a", "tool_calls": value}]}, "messages")

    with pytest.raises(Unusable, match=r"^tool call arguments that are not valid JSON$"):
        call([{"name": "f", "arguments": "{"}])
    with pytest.raises(DataError, match=r'f.jsonl:3: messages\[0\].tool_calls\[0\]: a tool call needs "name" and "arguments"'):
        call([{"name": "f"}])
    with pytest.raises(DataError, match=r"messages\[0\].tool_calls\[0\].arguments: expected an object, found 3 \(integer\)"):
        call([{"name": "f", "arguments": 3}])
    with pytest.raises(DataError, match="tool calls in a message of user; only the assistant calls tools"):
        call([{"name": "f", "arguments": {}}], role="user")


def test_the_tool_calls_that_come_with_the_package_are_all_read():
    loaded = Data.model_validate({"sources": "posttrain:data/toolcalls.jsonl.gz"}).read()
    messages = [message for row in loaded.rows[0] for message in row.messages]
    assert (loaded.usable, loaded.dropped, sum(len(message.tool_calls) for message in messages)) == (131, {}, 97)
    assert sum(bool(row.tools) for row in loaded.rows[0]) == 82


def test_prompt_and_completion_take_texts_or_messages():
    user, yes = CHAT["messages"]
    where = "f.jsonl:3"
    both = (Message("user", "hi"), Message("assistant", "yes"))
    assert parse(PAIR, "prompt_completion") == Completion("2+2", "4", where)
    for completion in ("yes", yes, [yes]):
        assert parse({"prompt": [user], "completion": completion}, "prompt_completion") == Conversation(both, (), where)
    earlier = parse({"prompt": [user, yes, user], "completion": "yes"}, "prompt_completion")
    assert earlier == Prompted((*both, *both), (), where, context=3)
    with pytest.raises(
        DataError, match='column "completion": expected text like its prompt, found a list; make both text or both'
    ):
        parse({"prompt": "hi", "completion": [yes]}, "prompt_completion")


def test_a_problem_keeps_every_other_column_as_a_fact():
    row = parse({"id": 7, "question": "2+2", "answer": 4, "steps": [1]}, "problem", prompt="question")
    assert row == Problem("7", (Message("user", "2+2"),), "4", {"steps": [1]}, "f.jsonl:3")
    assert parse({"prompt": "2+2"}, "problem").id == "f.jsonl-3"
    raw = Raw({"prompt": "2+2"}, "posttrain:data/x.jsonl.gz:12")
    assert Format.model_validate("problem").parse(raw).id == "x.jsonl.gz-12"
    with pytest.raises(DataError, match=r'column "answer": expected text or an integer, found 0.5 \(number\)'):
        parse({"prompt": "2+2", "answer": 0.5}, "problem")


def test_preferences_are_parsed_with_their_prompt_in_any_of_three_places():
    user, yes = CHAT["messages"]
    no = {"role": "assistant", "content": "no"}
    wanted = Preference((Message("user", "hi"),), (Message("assistant", "yes"),), (Message("assistant", "no"),), where="f.jsonl:3")
    assert parse({"prompt": "hi", "chosen": "yes", "rejected": "no"}, "preference") == wanted
    assert parse({"prompt": [user], "chosen": [yes], "rejected": [no]}, "preference") == wanted
    assert parse({"prompt": "hi", "chosen": [user, yes], "rejected": [user, no]}, "preference") == wanted
    assert parse({"chosen": [user, yes], "rejected": [user, no]}, "preference") == wanted
    assert parse({"prompt": "hi", "chosen": "yes", "rejected": "no", "prefer": 0.75}, "preference").prefer == 0.75
    with pytest.raises(Unusable, match="chosen and rejected are the same"):
        parse({"prompt": "hi", "chosen": "yes", "rejected": "yes"}, "preference")
    with pytest.raises(DataError, match=r'column "prefer": expected a probability from 0 to 1, found 2 \(integer\)'):
        parse({"prompt": "hi", "chosen": "yes", "rejected": "no", "prefer": 2}, "preference")


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["messages", "text"], "messages"),
        (["prompt", "chosen", "rejected"], "preference"),
        (["prompt", "completion", "id"], "prompt_completion"),
        (["prompt", "solution", "answer"], "problem"),
        (["text", "label"], "text"),
    ],
)
def test_the_format_is_found_from_the_columns(columns, kind):
    assert detect(Raw(dict.fromkeys(columns, "x"), "f:1")).kind == kind


def test_every_shipped_file_is_read():
    folder = Path(sys.modules["posttrain.data.source"].__file__).parents[1] / "assets" / "data"
    counts = {}
    for path in sorted(folder.glob("*.jsonl*")):
        worded = {"kind": "labelled", "good": "positive"} if path.name.startswith(("reviews", "sentiment")) else None
        if path.name.startswith("commonsense"):
            worded = {"kind": "prompt_completion", "fields": {"prompt": "question", "completion": "answer"}}
        loaded = Data.model_validate({"sources": f"posttrain:data/{path.name}", "format": worded}).read()
        counts[path.name] = (loaded.usable, loaded.formats[0])
        assert not loaded.dropped
    assert counts["arith_train.jsonl.gz"] == (8_000, "problem")
    assert counts["text_stories.jsonl.gz"] == (1_332, "text")


def test_a_description_without_a_tokenizer_counts_and_shows():
    write({**PAIR, "completion": ""}, PAIR)
    found = describe("train.jsonl")
    assert found.as_dict() == {
        "sources": [{"name": "train.jsonl", "format": "prompt_completion"}],
        "format_found": True,
        "rows": 2,
        "usable": 1,
        "dropped": {"empty completion": {"count": 1, "first": "train.jsonl:1"}},
        "examples": [{"where": "train.jsonl:2", "spans": [{"text": "2+2", "trained": False}, {"text": "4", "trained": True}]}],
    }
    assert found.lines()[-2:] == ["train.jsonl:2:", "    2+2⟦4⟧"]


def test_every_kind_of_source_and_format_explains_itself():
    families: list[type[Component]] = [Source, Format]
    for family in families:
        for kind in family.kinds.values():
            assert kind.summary().endswith(".")
            assert all(kind.meaning(name) for name in kind.model_fields), kind


def test_a_completion_can_be_woven_from_several_columns():
    format = Format.model_validate({"kind": "prompt_completion", "fields": {"completion": "{work}\n#### {answer}"}})
    row = format.parse(Raw({"prompt": "1 + 1?", "work": "1 + 1 = 2", "answer": 2}, "f.jsonl:1"))
    assert row.completion == "1 + 1 = 2\n#### 2"
    with pytest.raises(Unusable, match="empty completion"):
        format.parse(Raw({"prompt": "1 + 1?", "work": None, "answer": 2}, "f.jsonl:2"))


def test_a_woven_column_that_is_absent_is_named():
    format = Format.model_validate({"kind": "prompt_completion", "fields": {"completion": "{work}\n#### {answr}"}})
    with pytest.raises(DataError, match=r'f.jsonl:1: format prompt_completion needs the column "answr"'):
        format.parse(Raw({"prompt": "1 + 1?", "work": "1 + 1 = 2", "answer": 2}, "f.jsonl:1"))
