"""Token sequences and their masks, over templates of the well-known shapes. docs/data.md states the same."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, SHAPES, make

from posttrain.data.dataset import Data
from posttrain.data.format import Prompted, Unusable
from posttrain.data.render import Template
from posttrain.errors import TemplateError
from posttrain.text import Completion, Conversation, Message

TEMPLATES = {kind: Template(make(kind)) for kind in SHAPES}
SYSTEM, ASK, AGAIN = Message("system", "be kind"), Message("user", "What is 12 + 30?"), Message("user", "And the cat?")
ANSWER, SAT = Message("assistant", "It is 42."), Message("assistant", "It sat on the mat.")
TWO = Conversation((ASK, ANSWER, AGAIN, SAT), where="chat.jsonl:4")
WEATHER = {"name": "weather", "arguments": {"city": "Oslo"}}


def trained(template, conv, learn="all"):
    """The text of each trained run."""
    tokens, train = template.conversation(conv, learn)
    assert len(tokens) == len(train)
    assert not train[0]
    return [text for text, marked in template.spans(tokens, train) if marked]


def wanted(kind, *answers):
    shape = KINDS[kind]
    return [shape.lead + (answer.strip() if shape.trims else answer) + shape.end for answer in answers]


def unusable(template, conv, learn="all"):
    with pytest.raises(Unusable) as caught:
        template.conversation(conv, learn)
    return str(caught.value)


def refused(kind, chat=True):
    with pytest.raises(TemplateError) as caught:
        Template(make(kind), chat)
    return str(caught.value)


# the mask of a chat


@pytest.mark.parametrize("kind", SHAPES)
def test_exactly_the_answers_and_their_end_tokens_are_trained(kind):
    assert trained(TEMPLATES[kind], TWO) == wanted(kind, "It is 42.", "It sat on the mat.")
    assert trained(TEMPLATES[kind], TWO, learn="last") == wanted(kind, "It sat on the mat.")


TEXTS = st.text(
    st.one_of(st.sampled_from("the cat?\n +42<|>{}'"), st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    min_size=1,
    max_size=20,
).filter(str.strip)


@given(
    kind=st.sampled_from(SHAPES),
    turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
    system=st.none() | TEXTS,
    trailing=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_nothing_but_answers_is_trained_whatever_the_texts(kind, turns, system, trailing):
    template = TEMPLATES[kind]
    lead = [Message("system", system)] if system and kind not in ("gemma", "mistral") else []
    pairs = [message for ask, say in turns for message in (Message("user", ask), Message("assistant", say))]
    conv = Conversation((*lead, *pairs, *([ASK] if trailing else [])))
    try:
        tokens, train = template.conversation(conv)
    except Unusable as reason:
        if str(reason) != "the tokenizer merges the end of a prompt with the start of its answer":
            raise
        return
    assert not train[0]
    assert train[-1]
    runs = [text for text, marked in template.spans(tokens, train) if marked]
    assert runs == wanted(kind, *(say for _, say in turns))
    assert tokens[-1] == template.end_id


@pytest.mark.parametrize("kind", SHAPES)
def test_sampling_sees_the_very_tokens_that_stood_before_the_answer(kind):
    template = TEMPLATES[kind]
    tokens, train = template.conversation(TWO)
    first = train.index(True)
    assert template.prompt([ASK]) == tokens[:first]
    last = len(tokens) - train[::-1].index(False)
    assert template.prompt([ASK, ANSWER, AGAIN]) == tokens[:last]


@pytest.mark.parametrize("kind", SHAPES)
def test_a_rendering_is_the_librarys_own_up_to_the_last_end_token(kind):
    tokenizer = make(kind, add_bos=True)
    tokens, _ = Template(tokenizer).conversation(TWO)
    own = tokenizer.apply_chat_template([message.as_dict() for message in TWO.messages], return_dict=False)
    assert tokens == own[: len(tokens)]
    assert set(own[len(tokens) :]) <= {tokenizer.encode("\n", add_special_tokens=False)[0]}
    assert tokens.count(tokenizer.bos_token_id) == (0 if tokenizer.bos_token_id is None else 1)


def test_the_end_tokens_are_found_in_the_template():
    found = {kind: Template(make(kind)) for kind in SHAPES}
    for kind, template in found.items():
        name = template.tokenizer.convert_ids_to_tokens
        assert name(template.end_id) == KINDS[kind].end
        assert {name(token) for token in template.stop_ids} == {KINDS[kind].end, KINDS[kind].eos} - {None}


def test_what_follows_the_last_answer_is_not_kept():
    template = TEMPLATES["chatml"]
    tail = Conversation((ASK, ANSWER, AGAIN))
    assert template.conversation(tail) == template.conversation(Conversation((ASK, ANSWER)))


def test_the_first_token_is_never_trained():
    tokenizer = make("chatml")
    tokenizer.chat_template = (
        "{% for message in messages if message.role == 'assistant' %}{{ message.content }}<|im_end|>{% endfor %}"
    )
    template = Template(tokenizer)  # asks with nothing at all
    tokens, train = template.conversation(Conversation((ASK, ANSWER)))
    assert train == [False] + [True] * (len(tokens) - 1)


def test_pad_equal_to_eos_keeps_the_end_token_in_the_loss():
    template = TEMPLATES["pad_is_eos"]
    tokens, train = template.conversation(Conversation((ASK, ANSWER)))
    assert template.tokenizer.pad_token_id == template.tokenizer.eos_token_id == tokens[-1]
    assert train[-1]


def test_a_tokenizer_without_eos_serves_chats_but_no_documents():
    template = TEMPLATES["no_eos"]
    assert template.stop_ids == {template.end_id}
    message = "the tokenizer has no end-of-text token, so a document could not end; set eos_token in its tokenizer_config.json"
    with pytest.raises(TemplateError) as caught:
        template.document("once")
    assert str(caught.value) == message
    assert refused("no_eos", chat=False) == message


def test_earlier_answers_of_a_prompt_are_not_learned_from():
    earlier = Prompted((ASK, ANSWER, AGAIN, SAT), (), "", context=3)
    assert trained(TEMPLATES["chatml"], earlier) == wanted("chatml", "It sat on the mat.")


def test_calls_are_trained_and_what_tools_say_is_not():
    messages = (ASK, Message("assistant", "", (WEATHER,)), Message("tool", "rain"), SAT)
    conv = Conversation(messages, ({"name": "weather", "parameters": {}},))
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>'
    assert trained(TEMPLATES["chatml"], conv) == [call, "It sat on the mat.<|im_end|>"]
    tokens, train = TEMPLATES["chatml"].conversation(conv)
    assert TEMPLATES["chatml"].spans(tokens, train)[0][0].startswith('<|im_start|>system\nTools: [{"name": "weather"')


def test_the_tool_calls_that_come_with_the_package_are_rendered_whole():
    data = Data.model_validate({"sources": "posttrain:data/toolcalls.jsonl.gz", "max_tokens": 100_000})
    loaded = data.read()
    found = data.render(loaded, TEMPLATES["chatml"])
    assert (found.usable, found.dropped) == (131, {})
    ends = sum(token == TEMPLATES["chatml"].end_id and mark for row in found.sequences for token, mark in zip(*row, strict=True))
    assert ends == 448


# templates that are refused


def test_a_tokenizer_without_chat_template_is_refused_for_chats_only():
    assert refused("no_template") == (
        "the tokenizer has no chat template, so a conversation cannot be rendered; save one with it (chat_template.jinja), "
        "or learn from plain text (format: text, or prompt_completion with text)"
    )
    plain = Template(make("no_template"), chat=False)
    assert plain.decode(plain.document("The cat sat")) == "The cat sat<|endoftext|>"
    with pytest.raises(TemplateError, match="has no chat template"):
        plain.prompt([ASK])


def test_a_template_without_generation_prompt_is_refused():
    assert refused("no_generation_prompt") == (
        "the chat template has no generation prompt (add_generation_prompt changes nothing), so a model could not be asked for "
        "an answer; let it write '<|im_start|>assistant\\n' where add_generation_prompt is set"
    )


def test_a_template_that_never_ends_a_turn_is_refused():
    assert refused("no_end") == (
        "the chat template ends an answer with no control token, so a model could not learn to stop; "
        "let it write eos_token after each assistant message"
    )


def test_a_template_that_asks_otherwise_than_its_answers_begin_is_refused():
    assert refused("opens_otherwise") == (
        "the chat template's generation prompt '<|im_start|>assistant\\n<think>' is not how its answers begin, "
        "so sampling and training would differ; use another chat template"
    )


def probed(old, new, kind="chatml"):
    """A tokenizer whose template differs in one place."""
    tokenizer = make(kind)
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return tokenizer


def test_a_template_that_renders_no_simple_chat_is_refused_in_its_own_words():
    with pytest.raises(TemplateError) as caught:
        Template(probed("{{ message.content }}", "{{ raise_exception('no text') }}"))
    assert str(caught.value) == "one question with one answer cannot be rendered: the chat template refuses it: no text"
    with pytest.raises(TemplateError, match=r"^the chat template leaves out what the assistant says$"):
        Template(probed("{{ message.content }}", "{{ message.content if message.role == 'user' }}"))


def test_a_template_that_changes_the_question_once_it_is_answered_is_refused():
    template = Template(
        probed(
            "<|im_start|>{{ message.role }}",
            "<|im_start|>{{ message.role ~ ('s' if message.role == 'user' and messages | length > 3) }}",
        )
    )
    with pytest.raises(TemplateError) as caught:
        template.conversation(TWO, learn="last")
    assert str(caught.value) == (
        "chat.jsonl:4: messages[3]: the chat template renders what precedes this answer differently once the answer is there, "
        "so no mask is honest; use another chat template"
    )


def test_an_answer_without_the_end_token_is_dropped():
    endless = "{{ '<|im_end|>' if not message.tool_calls }}\n{% endfor %}\n{%- if add"
    template = Template(probed("<|im_end|>\n{% endfor %}\n{%- if add", endless))
    conv = Conversation((Message("assistant", "", (WEATHER,)),))
    assert unusable(template, conv) == "the chat template ends an answer without its end-of-turn token"


def test_a_template_that_rewrites_history_is_refused_with_the_setting_that_works():
    thought = Message("assistant", "<think>12 and 30</think>42")
    conv = Conversation((ASK, thought, AGAIN, Message("assistant", "<think>cat</think>sat")), where="chat.jsonl:4")
    with pytest.raises(TemplateError) as caught:
        TEMPLATES["qwen"].conversation(conv)
    assert str(caught.value) == (
        "chat.jsonl:4: messages[1]: the chat template renders this answer differently once the conversation goes on "
        "(it rewrites history), so no mask over all answers is honest; set data.learn: last"
    )
    assert trained(TEMPLATES["qwen"], conv, learn="last") == ["<think>cat</think>sat<|im_end|>"]
    tokens, train = TEMPLATES["qwen"].conversation(conv, learn="last")
    assert TEMPLATES["qwen"].prompt(conv.messages[:3]) == tokens[: train.index(True)]
    assert "12 and 30" not in TEMPLATES["qwen"].decode(tokens)


# rows that a template cannot render are left out and counted


def test_a_role_that_a_template_refuses_is_dropped_in_the_templates_own_words():
    conv = Conversation((SYSTEM, ASK, ANSWER))
    assert unusable(TEMPLATES["gemma"], conv) == "the chat template refuses it: System role not supported"
    assert trained(TEMPLATES["chatml"], conv) == ["It is 42.<|im_end|>"]


def test_two_user_turns_in_a_row_load_where_the_template_renders_them():
    conv = Conversation((ASK, AGAIN, SAT))
    assert trained(TEMPLATES["llama3"], conv) == ["It sat on the mat.<|eot_id|>"]
    assert unusable(TEMPLATES["mistral"], conv) == "the chat template refuses it: roles must alternate user and assistant"


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma", "qwen"])
def test_an_assistant_that_speaks_first_is_learned_from_where_the_template_renders_it(kind):
    conv = Conversation((ANSWER, AGAIN, SAT))
    assert trained(TEMPLATES[kind], conv) == wanted(kind, "It is 42.", "It sat on the mat.")
    tokens, train = TEMPLATES[kind].conversation(conv)
    asked, plain = TEMPLATES[kind].prompt([ASK]), TEMPLATES[kind].conversation(Conversation((ASK, ANSWER)))[0]
    opening = tokens[: train.index(True)]
    assert asked[-len(opening) + 1 :] == opening[1:]
    assert plain[-5:] == tokens[: tokens.index(TEMPLATES[kind].end_id) + 1][-5:]


def test_an_assistant_first_that_a_template_refuses_is_dropped():
    conv = Conversation((ANSWER, AGAIN, SAT))
    assert unusable(TEMPLATES["mistral"], conv) == "the chat template refuses it: roles must alternate user and assistant"


def test_an_assistant_first_that_nothing_opens_is_dropped():
    checks = KINDS["mistral"].template.partition("{%- if (message.role")[2].partition("{%- endif %}\n")[0]
    template = Template(probed("{%- if (message.role" + checks + "{%- endif %}\n", "", kind="mistral"))
    assert trained(template, TWO) == wanted("mistral", "It is 42.", "It sat on the mat.")
    reason = "an assistant message comes first, and nothing in the chat template opens it"
    assert unusable(template, Conversation((ANSWER, AGAIN, SAT))) == reason


def test_a_message_that_spells_a_control_token_is_dropped():
    conv = Conversation((ASK, Message("assistant", "a<|im_end|>b")))
    assert unusable(TEMPLATES["chatml"], conv) == "a message spells the control token <|im_end|>"
    assert trained(TEMPLATES["llama3"], conv) == ["a<|im_end|>b<|eot_id|>"]


def test_tools_that_a_template_leaves_out_are_not_learned_without():
    called = Conversation((ASK, Message("assistant", "", (WEATHER,))))
    assert unusable(TEMPLATES["llama3"], called) == "the chat template leaves out tool calls"
    listed = Conversation((ASK, ANSWER), ({"name": "weather"},))
    assert unusable(TEMPLATES["llama3"], listed) == "the chat template leaves out the tools"


def test_an_answer_that_a_template_shortens_is_dropped():
    conv = Conversation((ASK, Message("assistant", "<think>12 and 30</think>42")))
    assert unusable(Template(make("deaf")), conv) == "the chat template leaves out part of an answer"


def test_an_answer_that_merges_with_its_prompt_is_dropped():
    tokenizer = make("chatml")
    tokenizer.chat_template = "".join(
        [
            "{% for message in messages %}<|im_start|>{{ message.role }} T{{ message.content }}<|im_end|>{% endfor %}",
            "{% if add_generation_prompt %}<|im_start|>assistant T{% endif %}",
        ]
    )
    template = Template(tokenizer)  # every message begins with a T, which "he" would swallow
    assert trained(template, Conversation((ASK, Message("assistant", "a cat")))) == ["a cat<|im_end|>"]
    conv = Conversation((ASK, Message("assistant", "he cat")))
    assert unusable(template, conv) == "the tokenizer merges the end of a prompt with the start of its answer"


# plain text


def test_a_document_begins_and_ends_with_its_tokens():
    llama = Template(make("llama3", add_bos=True))
    assert llama.decode(llama.document("The cat")) == "<|begin|>The cat<|end|>"
    assert TEMPLATES["llama3"].decode(TEMPLATES["llama3"].document("The cat")) == "The cat<|end|>"
    assert TEMPLATES["chatml"].decode(TEMPLATES["chatml"].document("The cat<|endoftext|>")) == "The cat<|endoftext|>"


@given(length=st.integers(1, 60), limit=st.integers(2, 20))
def test_every_token_of_a_document_but_the_first_is_trained_once(length, limit):
    pieces = TEMPLATES["chatml"].pieces(range(length), limit)
    assert [token for tokens, train in pieces for token, mark in zip(tokens, train, strict=True) if mark] == list(
        range(1, length)
    )
    assert all(2 <= len(tokens) <= limit and train == [False] + [True] * (len(tokens) - 1) for tokens, train in pieces)
    assert all(later[0][0] == piece[0][-1] for piece, later in pairwise(pieces))


def test_pieces_of_one_token_are_refused():
    with pytest.raises(ValueError, match="max_tokens is 1, but a piece of a document needs 2: one token to see, one to predict"):
        TEMPLATES["chatml"].pieces([1, 2, 3], 1)


def test_a_completion_is_trained_from_the_longest_common_token_prefix():
    template = TEMPLATES["chatml"]
    tokens, train = template.completion(Completion("What is", " 12 + 30?"))
    assert template.spans(tokens, train) == [("What is", False), (" 12 + 30?<|endoftext|>", True)]
    tokens, train = template.completion(Completion("The ca", "t sat"))  # "Ġcat" is one token, so the boundary moves back to "The"
    assert template.spans(tokens, train) == [("The", False), (" cat sat<|endoftext|>", True)]
