"""What the columns of a row mean.

A format turns a row of a file into something to learn from or to grade. A row that cannot be used raises `Unusable`: it is left
out and counted by that reason. A row that shows that the file or the format is the wrong one raises DataError and stops the run.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from posttrain.component import Component, did_you_mean
from posttrain.data.source import Raw, shown
from posttrain.errors import DataError
from posttrain.text import ROLES, Completion, Conversation, Message, Problem, Row, Text

ALIASES = {
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("instruction", "question", "query", "input", "problem"),
    "completion": ("response", "output", "answer", "solution", "reply", "target"),
    "text": ("content", "document", "body", "story", "sentence", "sentence1", "premise", "question1"),
    "second": ("sentence2", "hypothesis", "question2", "text_pair"),
    "chosen": ("preferred", "winner", "response_a"),
    "rejected": ("dispreferred", "loser", "response_b"),
    "label": ("good", "liked", "thumbs_up", "desirable", "class", "sentiment"),
    "score": ("rating", "reward", "grade", "value"),
    "completions": ("responses", "answers", "candidates", "outputs", "solutions"),
    "scores": ("ratings", "rewards", "grades", "values"),
    "ranks": ("ranking", "order", "places"),
    "best": ("winner", "preferred", "choice"),
    "steps": ("lines", "rationale"),
    "labels": ("ratings", "correct", "right", "step_labels"),
}
UNREAD = ("reasoning_content", "reasoning", "thinking", "function_call", "weight", "train", "images", "audio")


class Unusable(Exception):
    """A row to leave out and count; the message is the reason, in the same words for all rows left out for it."""


@dataclass(frozen=True, slots=True)
class Prompted(Conversation):
    """A conversation whose first `context` messages are a prompt, never learned from."""

    context: int = 0


class Format(Component):
    """The meaning of columns."""

    needs: ClassVar[tuple[str, ...]] = ()
    either: ClassVar[tuple[str, ...]] = ()
    """Columns of which a row has one."""
    may: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[frozenset[str]] = frozenset()
    """The names of the row types in posttrain.text that it gives."""

    fields: dict[str, str] = Field(default_factory=dict)
    """Which column holds what, where the file calls it otherwise: `{completion: response}`; or a text made of several columns:
    `{completion: "{solution}\\n#### {answer}"}`."""

    @model_validator(mode="after")
    def _knows_its_fields(self) -> Self:
        known = self.needs + self.either + self.may
        for name in self.fields:
            if name not in known:
                raise ValueError(f"format {self.kind} has no field {name!r}{did_you_mean(name, known)}")
        if len(several := [name for name in self.either if name in self.fields]) > 1:
            raise ValueError(f"format {self.kind} reads one of {', '.join(self.either)}; fields maps {' and '.join(several)}")
        return self

    def column(self, name: str) -> str:
        return self.fields.get(name, name)

    def parse(self, raw: Raw) -> Row:
        """The row that `raw` holds. Raises Unusable or DataError."""
        self.check_columns(raw)
        _check_text(raw.value)
        return self.row(raw)

    def row(self, raw: Raw) -> Row:
        """As `parse`, for a row that has the columns and only valid text."""
        raise NotImplementedError

    def check_columns(self, raw: Raw) -> None:
        """Refuses a row that lacks a column, with the mapping that would help."""
        for name in self.needs:
            self._check_column(raw, name)
        if self.either:
            self._check_column(raw, self.which(raw))

    def _check_column(self, raw: Raw, name: str) -> None:
        column = self.column(name)
        lacking = [each for each in _woven(column) or [column] if each not in raw.value]
        if not lacking:
            return
        if name in self.fields:
            remedy = f"format.fields.{name} must name a column that every row has"
        else:
            remedy = f"map it: format.fields.{name}: {_stand_in(name, raw.value, self.needs) or '<its column>'}"
        what = f'{raw.where}: format {self.kind} needs the column "{lacking[0]}"'
        raise DataError(f"{what}; this row has {_quoted(raw.value)}; {remedy}")

    def which(self, raw: Raw) -> str:
        """The one of `either` that is read: a mapped one, or the one that the row has."""
        mapped = [name for name in self.either if name in self.fields]
        found = mapped or [name for name in self.either if name in raw.value]
        if len(found) == 1:
            return found[0]
        what = f"{raw.where}: format {self.kind} reads one of the columns {_quoted(self.either)}; this row has"
        if found:
            raise DataError(f"{what} {_quoted(found)}; choose one: format.fields.{found[0]}: {found[0]}")
        near = {name: _stand_in(name, raw.value, self.needs) for name in self.either}
        name = next((name for name in self.either if near[name]), self.either[0])
        raise DataError(f"{what} {_quoted(raw.value)}; map one: format.fields.{name}: {near[name] or '<its column>'}")

    def cell(self, raw: Raw, name: str) -> Any:
        column = self.column(name)
        if not _woven(column):
            return raw.value.get(column)
        if any(raw.value[each] is None for each in _woven(column)):
            return None
        return re.sub(r"\{(\w+)\}", lambda match: str(raw.value[match[1]]), column)

    def plain(self, raw: Raw, name: str) -> str:
        """A column of text. Raises Unusable where it is null or blank, DataError where it is something else."""
        return as_text(self.cell(raw, name), name, raw.where, f'column "{self.column(name)}"')

    def turns(self, raw: Raw, name: str, role: str) -> tuple[Message, ...]:
        """A column that holds one text (said by `role`), one message, or a list of messages."""
        return as_turns(self.cell(raw, name), name, role, raw.where, self.column(name))


def _woven(column: str) -> list[str]:
    """The columns that a text such as "{solution}\\n#### {answer}" is made of; none for the plain name of a column."""
    return re.findall(r"\{(\w+)\}", column)


class Messages(Format, kind="messages"):
    """A conversation: `messages`, a list of {role, content}, and `tools`; every assistant message is learned from."""

    needs = ("messages",)
    makes = frozenset({"Conversation"})
    may = ("tools",)

    def row(self, raw: Raw) -> Conversation:
        messages = _messages(self.cell(raw, "messages"), raw.where, self.column("messages"), "a list of messages")
        if not any(message.role == "assistant" for message in messages):
            raise Unusable("no assistant message to learn from")
        return Conversation(messages, _tools(self.cell(raw, "tools"), raw.where, self.column("tools")), raw.where)


class PromptCompletion(Format, kind="prompt_completion"):
    """A `prompt` and its `completion`, which alone is learned from. Two texts use no chat template; messages use the model's."""

    needs = ("prompt", "completion")
    makes = frozenset({"Conversation", "Completion"})
    may = ("tools",)

    def row(self, raw: Raw) -> Conversation | Completion:
        if isinstance(self.cell(raw, "prompt"), str):
            if isinstance(self.cell(raw, "completion"), list | dict):
                found = shown(self.cell(raw, "completion"))
                where = f'{raw.where}: column "{self.column("completion")}"'
                raise DataError(f"{where}: expected text like its prompt, found {found}; make both text or both messages")
            return Completion(self.plain(raw, "prompt"), self.plain(raw, "completion"), raw.where)
        prompt, completion = self.turns(raw, "prompt", "user"), self.turns(raw, "completion", "assistant")
        if not any(message.role == "assistant" for message in completion):
            raise Unusable("no assistant message to learn from")
        tools = _tools(self.cell(raw, "tools"), raw.where, self.column("tools"))
        if any(message.role == "assistant" for message in prompt):
            return Prompted(prompt + completion, tools, raw.where, len(prompt))
        return Conversation(prompt + completion, tools, raw.where)


class RawText(Format, kind="text"):
    """A document to read as it is: `text`. Every token is learned from but the first."""

    needs = ("text",)
    makes = frozenset({"Text"})

    def row(self, raw: Raw) -> Text:
        return Text(self.plain(raw, "text"), raw.where)


class Problems(Format, kind="problem"):
    """A `prompt` (text or messages) and what grades an answer to it: `answer`, and every further column as a fact."""

    needs = ("prompt",)
    makes = frozenset({"Problem"})
    may = ("answer", "id")

    def row(self, raw: Raw) -> Problem:
        prompt = self.turns(raw, "prompt", "user")
        answer = self._label(raw, "answer")
        name = self._label(raw, "id") or "-".join(raw.where.rsplit("/", 1)[-1].rsplit(":", 1))
        used = {self.column(each) for each in ("prompt", "answer", "id")}
        facts = {column: value for column, value in raw.value.items() if column not in used}
        return Problem(name, prompt, answer, facts, raw.where)

    def _label(self, raw: Raw, name: str) -> str | None:
        """Text, or an integer as text."""
        value = self.cell(raw, name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is not None and not isinstance(value, str):
            raise wrong(raw.where, f'column "{self.column(name)}"', "text or an integer", value)
        return value


CLEAR = ("messages", "preference", "ranking", "steps", "labelled", "graded", "prompt_completion")
"""The kinds that are known by their columns, those that ask for more of them first."""


def detect(raw: Raw) -> Format:
    """The format that the columns of a row speak for. Raises DataError where none does."""
    has = set(raw.value)
    for kind in CLEAR:
        format: type[Format] = Format.kinds[kind]
        if has.issuperset(format.needs) and (not format.either or has.intersection(format.either)):
            return format()
    if "prompt" in has and not has & {"completion", "response", "output", "reply"}:
        return Problems()
    if "text" in has:
        return RawText()
    needed = "; ".join(f"{kind} ({_asked(Format.kinds[kind])})" for kind in sorted(Format.kinds))
    kind = "prompt_completion" if has & {"prompt", *ALIASES["prompt"]} else "messages"
    fields = {name: _stand_in(name, raw.value, Format.kinds[kind].needs) for name in Format.kinds[kind].needs if name not in has}
    mapping = ", ".join(f"{name}: {column or '<its column>'}" for name, column in fields.items())
    raise DataError(
        f"{raw.where}: no format fits the columns {_quoted(raw.value)}; "
        f"name one and map its columns, such as format: {{kind: {kind}, fields: {{{mapping}}}}}; formats: {needed}"
    )


def _asked(format: type[Format]) -> str:
    """The columns that a format asks for, as a message lists them."""
    return ", ".join([*format.needs, *filter(None, [" or ".join(format.either)])])


def _quoted(columns: Iterable[str]) -> str:
    return ", ".join(f'"{each}"' for each in columns) or "no columns"


def _stand_in(name: str, columns: Mapping[str, Any], needs: tuple[str, ...]) -> str | None:
    """The column that probably holds what `name` asks for."""
    free = [column for column in columns if column not in needs]
    known = [alias for alias in ALIASES.get(name, ()) if alias in free]
    near = difflib.get_close_matches(name, free, n=1, cutoff=0.6) or known
    return near[0] if near else None


def wrong(where: str, place: str, expected: str, value: Any) -> DataError:
    remedy = "correct the row, or name another column in format.fields"
    return DataError(f"{where}: {place}: expected {expected}, found {shown(value)}; {remedy}")


def _check_text(value: Any) -> None:
    """Raises Unusable where some text in a row could not be written to a file or read by a tokenizer."""
    open_values = [value]
    while open_values:
        value = open_values.pop()
        if isinstance(value, str):
            if "\0" in value:
                raise Unusable("text with a NUL character")
            try:
                value.isascii() or value.encode()
            except UnicodeEncodeError:
                raise Unusable("text that is not valid Unicode") from None
        elif isinstance(value, dict):
            open_values += [*value, *value.values()]
        elif isinstance(value, list):
            open_values += value


def as_text(value: Any, name: str, where: str, place: str) -> str:
    """A value that is text. Raises Unusable where it is null or blank, DataError where it is something else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable(f"empty {name}")
    if not isinstance(value, str):
        raise wrong(where, place, "text", value)
    return value


def as_turns(value: Any, name: str, role: str, where: str, column: str) -> tuple[Message, ...]:
    """A value that is one text (said by `role`), one message, or a list of messages."""
    if value is None or value in ("", []):
        raise Unusable(f"empty {name}")
    if isinstance(value, str):
        return (Message(role, as_text(value, name, where, column)),)
    if isinstance(value, dict):
        value = [value]
    return _messages(value, where, column, "text, a message or a list of messages")


def _messages(value: Any, where: str, column: str, expected: str) -> tuple[Message, ...]:
    if value is None:
        raise Unusable("empty messages")
    if not isinstance(value, list):
        raise wrong(where, f'column "{column}"', expected, value)
    return tuple(_message(each, where, f"{column}[{index}]") for index, each in enumerate(value))


def _message(value: Any, where: str, place: str) -> Message:
    if not isinstance(value, dict):
        raise wrong(where, place, "a message with role and content", value)
    if "role" not in value or not ("content" in value or value.get("tool_calls")):
        has = ", ".join(f'"{each}"' for each in value) or "nothing"
        raise DataError(f'{where}: {place}: a message needs "role" and "content"; this one has {has}; rename them in the file')
    role, content = value["role"], value.get("content")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise DataError(f"{where}: {place}: unknown role {json.dumps(role)}{hint} (roles: {', '.join(ROLES)})")
    for key in UNREAD:
        if value.get(key) not in (None, "", []):
            raise DataError(f'{where}: {place}: has "{key}", which is not read; put what matters into "content", or take it out')
    calls = _calls(value.get("tool_calls"), where, f"{place}.tool_calls")
    if calls and role != "assistant":
        raise DataError(f"{where}: {place}: tool calls in a message of {role}; only the assistant calls tools")
    if isinstance(content, list):
        content = _joined(content, where, f"{place}.content")
    if content is not None and not isinstance(content, str):
        raise wrong(where, f"{place}.content", "text", content)
    said = content is not None and (content.strip() or role in ("system", "tool"))
    if not said and not calls:
        raise Unusable(f"empty {role} message")
    return Message(role, content or "", calls)


def _joined(parts: list[Any], where: str, place: str) -> str:
    """Content given as a list of parts, all of them text."""
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f'{where}: {place}[{index}]: expected {{"type": "text", "text": ...}}; only text can be learned from')
    return "".join(part["text"] for part in parts)


def _calls(value: Any, where: str, place: str) -> tuple[dict[str, Any], ...]:
    """Tool calls as {"name", "arguments"}, from that form or from {"type": "function", "function": {...}}."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong(where, place, "a list of calls", value)
    return tuple(_call(each, where, f"{place}[{index}]") for index, each in enumerate(value))


def _call(value: Any, where: str, place: str) -> dict[str, Any]:
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or "arguments" not in inner:
        raise DataError(f'{where}: {place}: a tool call needs "name" and "arguments"; found {shown(value)}')
    arguments = inner["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise Unusable("tool call arguments that are not valid JSON") from None
    if not isinstance(arguments, dict):
        raise wrong(where, f"{place}.arguments", "an object", arguments)
    return {"name": inner["name"], "arguments": arguments}


def _tools(value: Any, where: str, column: str) -> tuple[dict[str, Any], ...]:
    """The tools an assistant may call: a list of JSON schemas, or that list as JSON text."""
    place = f'column "{column}"'
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable("tools that are not valid JSON") from None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise wrong(where, place, "a list of tools", value)
    return tuple(value)
