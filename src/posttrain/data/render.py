"""From text to tokens: the token ids of a row and the marks of the tokens to learn from, born together.

The rule for a chat: for each assistant message to learn from, the template rendered up to it with the generation prompt must be a
token prefix of the whole rendering; from there through the token that ends the turn everything is trained, and nothing else.
What the policy sees when it is sampled from (`prompt`) is therefore exactly what stood before its answers in training.
"""

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice, pairwise, takewhile
from typing import Any, Literal, TypeVar

from posttrain.data.format import Prompted, Unusable
from posttrain.errors import InputError, TemplateError
from posttrain.text import Completion, Conversation, Message, Rendering, Steps

Made = TypeVar("Made")
Making = Generator[str, list[int], Made]  # yields a text, is sent its tokens, returns what it has made of them
TOGETHER = 64  # rows rendered side by side; more are no faster
ASK, ONE, OTHER = Message("user", "Name a letter."), Message("assistant", "alpha7"), Message("assistant", "beta3")


class Template:
    """A tokenizer with its chat template, from which every token sequence is made.

    end_id: the token that ends an assistant turn; stop_ids: the tokens at which sampling stops. With `chat=False` there need
    be no chat template: raw text and plain completions only.
    """

    def __init__(self, tokenizer: Any, chat: bool = True) -> None:
        """Raises TemplateError where no honest mask can be made from this template."""
        self.tokenizer = tokenizer
        self.chat = chat
        self._controls = _one_of(_control_tokens(tokenizer))
        self._text_start = self._find_text_start()
        self._opening = ""
        self.end_id: int = self._probe() if chat else self.text_end_id
        eos = tokenizer.eos_token_id
        self.stop_ids: frozenset[int] = frozenset({self.end_id} if eos is None else {self.end_id, eos})

    @property
    def text_end_id(self) -> int:
        """The token that ends a document; an encoder's tokenizer has its separator there."""
        ends = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        if ends is None:
            raise TemplateError(
                "the tokenizer has no end-of-text token, so a document could not end; set eos_token in its tokenizer_config.json"
            )
        return int(ends)

    # chats

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The tokens after which the policy answers."""
        try:
            return self._encode(self._text(messages, tools, ask=True))
        except Unusable as reason:
            raise TemplateError(str(reason)) from None

    def ignores(self, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the chat template leaves tools out."""
        return self._text([ASK], tools, ask=True) == self._text([ASK], (), ask=True)

    def following(
        self, messages: Sequence[Message], told: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), ended: bool = True
    ) -> list[int]:
        """The tokens between an answer and the next: what the policy is told, and the generation prompt.

        messages: up to and with the answer; ended: whether it ended with the end of its turn, which is added where it did not.
        The answer's own tokens are never rendered again: what two different answers in its place have behind them in common
        is what follows any. Raises TemplateError for a template with which nothing follows.
        """
        before, after = list(messages[:-1]), list(told)
        try:
            texts = [self._text([*before, each, *after], tools, ask=True) for each in (ONE, OTHER)]
        except Unusable as reason:
            raise TemplateError(str(reason)) from None
        alike = _alike(texts[0][::-1], texts[1][::-1])
        tokens = self._encode(texts[0][len(texts[0]) - alike :])
        if self.end_id not in tokens or not all(word in texts[0] for each in told for word in re.findall(r"\w+", each.content)):
            raise TemplateError(
                f"the chat template leaves out a turn of {told[0].role} behind an answer, so an episode of several turns "
                "cannot go on; use another chat template"
            )
        return tokens[tokens.index(self.end_id) + 1 :] if ended else tokens[tokens.index(self.end_id) :]

    def conversation(self, conv: Conversation, learn: Literal["all", "last"] = "all") -> Rendering:
        """Tokens and marks, ending with the last answer. Raises Unusable for a row to drop, TemplateError for a bad template."""
        return self._alone(self.making_conversation(conv, learn))

    def making_conversation(self, conv: Conversation, learn: Literal["all", "last"]) -> Making[Rendering]:
        """As `conversation`, one of many that `together` makes."""
        context = conv.context if isinstance(conv, Prompted) else 0
        answers = [i for i, message in enumerate(conv.messages) if message.role == "assistant" and i >= context]
        if not answers:
            raise Unusable("no assistant message to learn from")
        conv = replace(conv, messages=conv.messages[: answers[-1] + 1])
        self._refuse_control_tokens(conv.messages)
        text = self._text(conv.messages, conv.tools)
        if conv.tools and text == self._text(conv.messages, ()):
            raise Unusable("the chat template leaves out the tools")
        tokens = yield text
        train = [False] * len(tokens)
        for index in answers if learn == "all" else answers[-1:]:
            start, stop = yield from self._span(conv, index, text, tokens)
            train[start:stop] = [True] * (stop - start)
        train[0] = False
        return tokens[:stop], train[:stop]

    def making_steps(self, row: Steps) -> Making[Rendering]:
        """Tokens, and marks of the token that ends each step: the line break behind it; behind the last, the end of the turn."""
        answer = Message("assistant", "\n".join(row.steps))
        conv = Conversation((*row.prompt, answer), (), row.where)
        tokens, _ = yield from self.making_conversation(conv, "last")
        text = self._text(conv.messages, ())
        upto = self._asked(conv, len(row.prompt), text)
        if not text.startswith(upto + answer.content):
            raise Unusable("the chat template changes the text of an answer")
        ends = [False] * len(tokens)
        for step in row.steps[:-1]:
            upto += step + "\n"
            prefix = yield upto
            if tokens[: len(prefix)] != prefix:
                raise Unusable("the tokenizer merges the end of a step with what follows")
            ends[len(prefix) - 1] = True
        ends[-1] = True
        return tokens, ends

    def _span(self, conv: Conversation, index: int, text: str, tokens: list[int]) -> Making[tuple[int, int]]:
        """Where answer `index` begins and ends in the whole rendering."""
        upto = self._text(conv.messages[: index + 1], conv.tools) if index + 1 < len(conv.messages) else text
        alone = tokens if upto == text else (yield upto)
        if self.end_id not in alone:
            raise Unusable("the chat template ends an answer without its end-of-turn token")
        stop = len(alone) - alone[::-1].index(self.end_id)
        if tokens[:stop] != alone[:stop]:
            raise TemplateError(
                f"{conv.where or 'conversation'}: messages[{index}]: the chat template renders this answer differently once the "
                "conversation goes on (it rewrites history), so no mask over all answers is honest; set data.learn: last"
            )
        before = self._asked(conv, index, text)
        if not text.startswith(before):
            raise TemplateError(
                f"{conv.where or 'conversation'}: messages[{index}]: the chat template renders what precedes this answer "
                "differently once the answer is there, so no mask is honest; use another chat template"
            )
        prefix = yield before
        if tokens[: len(prefix)] != prefix or len(prefix) >= stop:
            raise Unusable("the tokenizer merges the end of a prompt with the start of its answer")
        _refuse_losses(conv.messages[index], upto[len(before) :])
        return len(prefix), stop

    def _asked(self, conv: Conversation, index: int, text: str) -> str:
        """The rendering up to answer `index`, with the generation prompt."""
        if index:
            return self._text(conv.messages[:index], conv.tools, ask=True)
        head, opening, _ = text.partition(self._opening) if self._opening else ("", "", "")
        if not opening:
            raise Unusable("an assistant message comes first, and nothing in the chat template opens it")
        return head + opening

    def _text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        import jinja2

        if not self.tokenizer.chat_template:
            raise TemplateError(
                "the tokenizer has no chat template, so a conversation cannot be rendered; save one with it "
                "(chat_template.jinja), or learn from plain text (format: text, or prompt_completion with text)"
            )
        plain = [message.as_dict() for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                plain, tools=[dict(tool) for tool in tools] or None, add_generation_prompt=ask, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, IndexError) as error:
            raise Unusable(f"the chat template refuses it: {error}") from None

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def together(self, rows: Iterable[Making[Made]]) -> Iterator[Made | Unusable | InputError]:
        """What each row makes, or the error that it ends with, in order.

        Rows go side by side: the texts that they wait for are tokenized in one call, which uses every core.
        """
        rows = iter(rows)
        while some := list(islice(rows, TOGETHER)):
            ended: dict[int, Made | Unusable | InputError] = {}
            told: dict[int, Any] = dict.fromkeys(range(len(some)))
            while told:
                asked: dict[int, str] = {}
                for index, tokens in told.items():
                    try:
                        asked[index] = some[index].send(tokens)
                    except StopIteration as end:
                        ended[index] = end.value
                    except (Unusable, InputError) as error:
                        ended[index] = error
                ids = self.tokenizer(list(asked.values()), add_special_tokens=False, verbose=False)["input_ids"] if asked else []
                told = dict(zip(asked, map(list, ids), strict=True))
            yield from (ended[index] for index in range(len(some)))

    def _alone(self, row: Making[Made]) -> Made:
        made = next(self.together([row]))
        if isinstance(made, Unusable | InputError):
            raise made
        return made

    def control_in(self, text: str) -> str | None:
        """The first control token that a text spells, and would become; None where it spells none."""
        found = self._controls.search(text) if self._controls else None
        return found[0] if found else None

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        """Text that spells a control token would become that token: a turn could end in the middle of a message."""
        for message in messages:
            if (found := self.control_in(message.content)) is not None:
                raise Unusable(f"a message spells the control token {found}")

    # what the template can do, found by rendering two small chats

    def _probe(self) -> int:
        """The end-of-turn token. Raises TemplateError where the template cannot serve."""
        try:
            bare, asked = self._text([ASK], ()), self._text([ASK], (), ask=True)
            whole, other = self._text([ASK, ONE], ()), self._text([ASK, OTHER], ())
        except Unusable as error:
            raise TemplateError(f"one question with one answer cannot be rendered: {error}") from None
        self._check_asking(bare, asked, whole)
        self._opening = asked[_alike(bare, asked) :]
        first, second = self._encode(whole), self._encode(other)
        after = first[len(first) - _alike(first[::-1], second[::-1]) :]
        controls = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        for token in after:
            if token in controls:
                return token
        raise TemplateError(
            "the chat template ends an answer with no control token, so a model could not learn to stop; "
            "let it write eos_token after each assistant message"
        )

    def _check_asking(self, bare: str, asked: str, whole: str) -> None:
        if ONE.content not in whole:
            raise TemplateError("the chat template leaves out what the assistant says")
        between = whole[len(asked) : whole.index(ONE.content)]
        if bare == asked and between.strip():
            raise TemplateError(
                "the chat template has no generation prompt (add_generation_prompt changes nothing), so a model could not be "
                f"asked for an answer; let it write {between!r} where add_generation_prompt is set"
            )
        prefix = self._encode(asked)
        if not whole.startswith(asked) or self._encode(whole)[: len(prefix)] != prefix:
            raise TemplateError(
                f"the chat template's generation prompt {asked[_alike(bare, asked) :]!r} is not how its answers begin, "
                "so sampling and training would differ; use another chat template"
            )

    # plain text

    def document(self, text: str) -> list[int]:
        """A raw document: begin-of-text where the tokenizer has it added, the text, end-of-text."""
        return self._alone(self.making_document(text))

    def making_document(self, text: str) -> Making[list[int]]:
        """As `document`, one of many."""
        return self._closed([*self._text_start, *(yield text)])

    def completion(self, row: Completion) -> Rendering:
        """Plain text and its continuation; the boundary is the longest common token prefix of the prompt alone and the whole."""
        return self._alone(self.making_completion(row))

    def making_completion(self, row: Completion) -> Making[Rendering]:
        """As `completion`, one of many."""
        prompt = [*self._text_start, *(yield row.prompt)]
        tokens = self._closed([*self._text_start, *(yield row.prompt + row.completion)])
        start = max(1, _alike(prompt, tokens))
        return tokens, [place >= start for place in range(len(tokens))]

    @cached_property
    def frame(self) -> tuple[list[int], list[int], list[int]]:
        """What the tokenizer puts before a text, between two, and behind the last. Nothing between two: it knows no pairs.

        Raises TemplateError where it does something else to texts.
        """
        one, other = self._encode("a"), self._encode("b")
        alone, both = self._encode("a", special=True), list(self.tokenizer("a", "b", verbose=False)["input_ids"])
        start = next((place for place in range(len(alone)) if alone[place : place + len(one)] == one), 0)
        head, tail = alone[:start], alone[start + len(one) :]
        between = both[len(head) + len(one) : len(both) - len(tail) - len(other)]
        if self.tokenizer.sep_token_id is None or self.tokenizer.sep_token_id not in between:
            between, both = [], [*head, *one, *other, *tail]
        if alone != [*head, *one, *tail] or both != [*head, *one, *between, *other, *tail]:
            raise TemplateError("the tokenizer puts two texts together in a way that is not known; take another model")
        return head, between, tail

    def making_texts(self, text: str, second: str | None = None) -> Making[list[int]]:
        """A text, or two, as the tokenizer itself gives them to a model; two are lines of one where it knows no pairs."""
        for each in (text, second or ""):
            if (found := self.control_in(each)) is not None:
                raise Unusable(f"a text spells the control token {found}")
        head, between, tail = self.frame
        tokens = [*head, *(yield text if second is None or between else f"{text}\n{second}")]
        if second is not None and between:
            tokens += [*between, *(yield second)]
        if len(tokens) == len(head):
            raise Unusable("a text without tokens")
        return [*tokens, *tail]

    def making_chat(self, messages: Sequence[Message]) -> Making[list[int]]:
        """A conversation, through the end of its last answer; where it ends with a question, all that the policy would answer."""
        if messages[-1].role == "assistant":
            tokens, _ = yield from self.making_conversation(Conversation(tuple(messages)), "last")
            return tokens
        self._refuse_control_tokens(messages)
        return list((yield self._text(messages, (), ask=True)))

    def pieces(self, tokens: Sequence[int], max_tokens: int) -> list[Rendering]:
        """A document cut to `max_tokens`: each further piece begins with the last token before it, as context only.

        So every token but the first of the document is trained exactly once.
        """
        if max_tokens < 2:
            raise ValueError(f"max_tokens is {max_tokens}, but a piece of a document needs 2: one token to see, one to predict")
        starts = range(0, len(tokens) - 1, max_tokens - 1)
        cut = [list(tokens[start : start + max_tokens]) for start in starts]
        return [(piece, [False] + [True] * (len(piece) - 1)) for piece in cut]

    def _closed(self, tokens: list[int]) -> list[int]:
        return tokens if tokens[-1:] == [self.text_end_id] else [*tokens, self.text_end_id]

    def _find_text_start(self) -> list[int]:
        """The begin-of-text token, if the tokenizer adds one to plain text."""
        begin = self.tokenizer.bos_token_id
        added = self._encode("a", special=True)[:1] == [begin] != self._encode("a")[:1]
        return [begin] if begin is not None and added else []

    # for people

    def spans(self, tokens: Sequence[int], train: Sequence[bool]) -> list[tuple[str, bool]]:
        """The text of each run of tokens and whether it is trained, control tokens included."""
        edges = [i for i in range(len(tokens)) if i == 0 or train[i] != train[i - 1]] + [len(tokens)]
        return [(self.decode(tokens[a:b]), bool(train[a])) for a, b in pairwise(edges)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _refuse_losses(message: Message, answer: str) -> None:
    """A template that silently leaves out what an answer says would teach something else than the data."""
    if not all(str(call["name"]) in answer for call in message.tool_calls):
        raise Unusable("the chat template leaves out tool calls")
    if "".join(message.content.split()) not in "".join(answer.split()):
        raise Unusable("the chat template leaves out part of an answer")


def _control_tokens(tokenizer: Any) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)


def _one_of(words: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, words))) if words else None


def _alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
