"""The `data:` section: rows rendered, counted, refused, and shown to people."""

import json
from pathlib import Path

import pytest
from test_render import TEMPLATES, TWO

from posttrain.data.dataset import Data, describe
from posttrain.errors import DataError, TemplateError
from posttrain.text import Message


def write(*rows, name="chat.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def chat(*roles_and_texts):
    return {"messages": [{"role": role, "content": text} for role, text in roles_and_texts]}


def rendered(template, *rows, **more):
    data = Data.model_validate({"sources": write(*rows), **more})
    return data.render(data.read(), template)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_data_under_a_rewriting_template_are_refused_until_only_the_last_answer_is_learned():
    row = chat(("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e"))
    with pytest.raises(TemplateError, match=r"^chat\.jsonl:1: messages\[1\]: .*set data\.learn: last$"):
        rendered(TEMPLATES["qwen"], row)
    assert rendered(TEMPLATES["qwen"], row, learn="last").usable == 1


def test_rows_are_rendered_in_order_and_keep_their_places():
    found = rendered(TEMPLATES["chatml"], chat(("user", "a"), ("assistant", "b")), chat(("user", "c"), ("assistant", "d")))
    assert found.places == [["chat.jsonl:1", "chat.jsonl:2"]]
    shown = [TEMPLATES["chatml"].decode(tokens).splitlines()[1] for row in found.rows[0] for tokens, _ in row.sequences]
    assert shown == ["a<|im_end|>", "c<|im_end|>"]
    assert (found.count, found.usable, found.trained) == (2, 2, 4)


def test_a_row_that_is_too_long_is_dropped_whole_and_counted():
    long = chat(("user", "c"), ("assistant", "d " * 50))
    found = rendered(TEMPLATES["chatml"], chat(("user", "a"), ("assistant", "b")), long, max_tokens=40)
    assert {reason: (each.count, each.first) for reason, each in found.dropped.items()} == {
        "longer than max_tokens": (1, "chat.jsonl:2")
    }
    assert len(found.rows[0]) == 1
    assert found.summary()[1:] == ["dropped 1: longer than max_tokens (first: chat.jsonl:2)"]


def test_a_row_that_is_too_long_is_refused_when_told():
    length = len(TEMPLATES["chatml"].conversation(TWO)[0])
    row = chat(*((message.role, message.content) for message in TWO.messages))
    assert rendered(TEMPLATES["chatml"], row, max_tokens=length, too_long="error").longest == length
    with pytest.raises(DataError) as caught:
        rendered(TEMPLATES["chatml"], row, max_tokens=length - 1, too_long="error")
    assert str(caught.value) == (
        f"chat.jsonl:1: {length} tokens, but max_tokens is {length - 1}; "
        "raise data.max_tokens, or drop such rows with data.too_long: drop"
    )


def test_nothing_left_after_rendering_is_refused_with_every_reason():
    long, empty = chat(("user", "a"), ("assistant", "b")), chat(("user", "a"), ("assistant", ""))
    with pytest.raises(DataError) as caught:
        rendered(TEMPLATES["chatml"], long, empty, max_tokens=2)
    assert str(caught.value) == (
        "chat.jsonl: none of the 2 rows can be used: 1 empty assistant message (first: chat.jsonl:2); "
        "1 longer than max_tokens (first: chat.jsonl:1)"
    )


def test_documents_are_cut_and_never_too_long():
    found = rendered(
        TEMPLATES["chatml"], {"text": "the cat sat on the mat " * 9}, {"text": "cat"}, max_tokens=16, too_long="error"
    )
    whole = len(TEMPLATES["chatml"].document("the cat sat on the mat " * 9))
    assert found.trained == whole - 1 + len(TEMPLATES["chatml"].document("cat")) - 1
    assert (found.longest, found.count, found.usable) == (16, 2, 2)
    assert found.places[0].count("chat.jsonl:1") == len(found.rows[0]) - 1


def test_problems_without_answers_are_refused_where_answers_are_learned():
    with pytest.raises(DataError) as caught:
        rendered(TEMPLATES["chatml"], {"prompt": "a", "answer": "b"})
    assert str(caught.value) == (
        "chat.jsonl:1: this row is a problem without an answer to learn from; it can only be a task's"
    )


# ---- rows of several sequences


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_the_two_sides_of_a_pair_are_two_sequences_with_one_prompt_of_which_only_the_answers_are_trained():
    found = rendered(TEMPLATES["chatml"], pair("the cat", "sat", "on the mat", prefer=0.75, margin=2))
    ((row,),) = found.rows
    prompt = TEMPLATES["chatml"].prompt((Message("user", "the cat"),))
    for (tokens, train), answer in zip(row.sequences, ("sat", "on the mat"), strict=True):
        assert list(tokens[: len(prompt)]) == list(prompt)
        assert list(train) == [False] * len(prompt) + [True] * (len(tokens) - len(prompt))
        assert TEMPLATES["chatml"].decode(tokens[len(prompt) :]).startswith(f"{answer}<|im_end|>")
    assert row.numbers == (0.75, 2.0)
    assert (found.count, found.usable, len(found.sequences)) == (1, 1, 2)


def test_an_earlier_answer_in_the_prompt_of_a_pair_belongs_to_the_prompt():
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    found = rendered(TEMPLATES["chatml"], pair(asked, "yes", "no"))
    ((row,),) = found.rows
    for (tokens, train), answer in zip(row.sequences, ("yes", "no"), strict=True):
        assert [text for text, trained in TEMPLATES["chatml"].spans(tokens, train) if trained] == [f"{answer}<|im_end|>"]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_of_which_one_side_is_too_long_is_dropped_whole_and_counted_once(side):
    long = {**pair("a", "yes", "no"), side: "d " * 50}
    found = rendered(TEMPLATES["chatml"], pair("a", "yes", "no"), long, pair("b", "yes", "no"), max_tokens=40)
    assert {reason: (each.count, each.first) for reason, each in found.dropped.items()} == {
        "longer than max_tokens": (1, "chat.jsonl:2")
    }
    assert [len(row.sequences) for row in found.rows[0]] == [2, 2]
    assert found.places == [["chat.jsonl:1", "chat.jsonl:3"]]
    with pytest.raises(DataError, match=r"^chat\.jsonl:2: \d+ tokens, but max_tokens is 40; raise data\.max_tokens, or drop"):
        rendered(TEMPLATES["chatml"], pair("a", "yes", "no"), long, max_tokens=40, too_long="error")


def test_pairs_that_say_nothing_are_dropped_and_counted_by_reason():
    rows = [pair("a", "yes", "no"), pair("a", "yes", ""), pair("a", "", "no"), pair("a", "yes", "yes"), pair("b", "no", "no")]
    found = rendered(TEMPLATES["chatml"], *rows)
    assert {reason: (each.count, each.first) for reason, each in found.dropped.items()} == {
        "empty rejected": (1, "chat.jsonl:2"),
        "empty chosen": (1, "chat.jsonl:3"),
        "chosen and rejected are the same": (2, "chat.jsonl:4"),
    }
    assert [len(source) for source in found.rows] == [1]


def test_only_chats_need_a_chat_template():
    plain = Data.model_validate({"sources": write({"prompt": "a", "completion": "b"})}).read()
    talk = Data.model_validate({"sources": write(chat(("user", "a"), ("assistant", "b")))}).read()
    assert (plain.needs_chat, talk.needs_chat) == (False, True)


def test_a_description_shows_rows_as_the_model_sees_them():
    write(chat(("user", "a"), ("assistant", "b")), chat(("user", "a")))
    found = describe("chat.jsonl", TEMPLATES["chatml"])
    length = found.rendered.tokens
    assert found.lines() == [
        "chat.jsonl: format messages (found from the columns of the first row)",
        f"1 of 2 rows are usable: 1 sequences, {length} tokens, 2 of them trained, longest {length}",
        "dropped 1: no assistant message to learn from (first: chat.jsonl:2)",
        "",
        "chat.jsonl:1:",
        "    <|im_start|>user",
        "    a<|im_end|>",
        "    <|im_start|>assistant",
        "    ⟦b<|im_end|>⟧",
    ]
    plain = found.as_dict()
    assert (plain["usable"], plain["trained"], plain["examples"][0]["spans"][-1]) == (
        1,
        2,
        {"text": "b<|im_end|>", "trained": True},
    )
    assert json.loads(json.dumps(plain)) == plain


def test_a_description_of_problems_shows_the_prompt_as_the_policy_will_see_it():
    write({"prompt": "2+2", "answer": "4"})
    found = describe("chat.jsonl", TEMPLATES["chatml"])
    assert found.examples[0].spans == [
        ("<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n", False),
        ("\n[answer] 4", False),
    ]
