"""What the columns of a row mean.

A format turns a row of a file into something to learn from or to grade. A row that cannot be used raises `Unusable`: it is left
out and counted by that reason. A row that shows that the file or the format is the wrong one raises DataError and stops the run.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from posttrain.component import Component, did_you_mean
from posttrain.data.source import Raw, shown
from posttrain.errors import DataError
from posttrain.text import ROLES, Completion, Conversation, Message, Preference, Problem, Row, Text

ALIASES = {
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("instruction", "question", "query", "input", "problem"),
    "completion": ("response", "output", "answer", "solution", "reply", "target"),
    "text": ("content", "document", "body", "story"),
    "chosen": ("preferred", "winner", "response_a"),
    "rejected": ("dispreferred", "loser", "response_b"),
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
    may: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[frozenset[str]] = frozenset()
    """The names of the row types in posttrain.text that it gives."""

    fields: dict[str, str] = Field(default_factory=dict)
    """Which column holds what, where the file calls it otherwise: `{completion: response}`; or a text made of several columns:
    `{completion: "{solution}\\n#### {answer}"}`."""

    @model_validator(mode="after")
    def _knows_its_fields(self) -> Self:
        for name in self.fields:
            if name not in self.needs + self.may:
                known = self.needs + self.may
                raise ValueError(f"format {self.kind} has no field {name!r}{did_you_mean(name, known)}")
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
            column = self.column(name)
            lacking = [each for each in _woven(column) or [column] if each not in raw.value]
            if not lacking:
                continue
            column = lacking[0]
            has = ", ".join(f'"{each}"' for each in raw.value) or "no columns"
            if name in self.fields:
                remedy = f"format.fields.{name} must name a column that every row has"
            else:
                remedy = f"map it: format.fields.{name}: {_stand_in(name, raw.value, self.needs) or '<its column>'}"
            raise DataError(f'{raw.where}: format {self.kind} needs the column "{column}"; this row has {has}; {remedy}')

    def cell(self, raw: Raw, name: str) -> Any:
        column = self.column(name)
        if not _woven(column):
            return raw.value.get(column)
        if any(raw.value[each] is None for each in _woven(column)):
            return None
        return re.sub(r"\{(\w+)\}", lambda match: str(raw.value[match[1]]), column)

    def plain(self, raw: Raw, name: str) -> str:
        """A column of text. Raises Unusable where it is null or blank, DataError where it is something else."""
        return _plain(self.cell(raw, name), name, raw.where, f'column "{self.column(name)}"')

    def turns(self, raw: Raw, name: str, role: str) -> tuple[Message, ...]:
        """A column that holds one text (said by `role`), one message, or a list of messages."""
        value = self.cell(raw, name)
        if value is None or value in ("", []):
            raise Unusable(f"empty {name}")
        if isinstance(value, str):
            return (Message(role, self.plain(raw, name)),)
        if isinstance(value, dict):
            value = [value]
        return _messages(value, raw.where, self.column(name), "text, a message or a list of messages")


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
            raise _wrong(raw.where, f'column "{self.column(name)}"', "text or an integer", value)
        return value


class Preferences(Format, kind="preference"):
    """Two answers to one `prompt`: `chosen` is better than `rejected`, with probability `prefer` (1 by default)."""

    needs = ("chosen", "rejected")
    makes = frozenset({"Preference"})
    may = ("prompt", "prefer")

    def row(self, raw: Raw) -> Preference:
        chosen, rejected = self.turns(raw, "chosen", "assistant"), self.turns(raw, "rejected", "assistant")
        if self.column("prompt") in raw.value:
            prompt = self.turns(raw, "prompt", "user")
            if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:  # the answers repeat their prompt
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        else:
            prompt = _shared(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            if chosen and rejected and not prompt:
                raise Unusable("chosen and rejected share no prompt")
        if chosen == rejected:
            raise Unusable("chosen and rejected are the same")
        if not all(any(message.role == "assistant" for message in side) for side in (chosen, rejected)):
            raise Unusable("no assistant message to learn from")
        return Preference(prompt, chosen, rejected, self._prefer(raw), raw.where)

    def _prefer(self, raw: Raw) -> float:
        value = self.cell(raw, "prefer")
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise _wrong(raw.where, f'column "{self.column("prefer")}"', "a probability from 0 to 1", value)
        return float(value)


def detect(raw: Raw) -> Format:
    """The format that the columns of a row speak for. Raises DataError where none does."""
    has = set(raw.value)
    answers = has & {"completion", "response", "output", "reply"}
    if "messages" in has:
        return Messages()
    if {"chosen", "rejected"} <= has:
        return Preferences()
    if {"prompt", "completion"} <= has:
        return PromptCompletion()
    if "prompt" in has and not answers:
        return Problems()
    if "text" in has:
        return RawText()
    columns = ", ".join(f'"{each}"' for each in raw.value) or "no columns"
    needed = "; ".join(f"{kind} ({', '.join(Format.kinds[kind].needs)})" for kind in sorted(Format.kinds))
    kind = "prompt_completion" if has & {"prompt", *ALIASES["prompt"]} else "messages"
    fields = {name: _stand_in(name, raw.value, Format.kinds[kind].needs) for name in Format.kinds[kind].needs if name not in has}
    mapping = ", ".join(f"{name}: {column or '<its column>'}" for name, column in fields.items())
    raise DataError(
        f"{raw.where}: no format fits the columns {columns}; "
        f"name one and map its columns, such as format: {{kind: {kind}, fields: {{{mapping}}}}}; formats: {needed}"
    )


def _stand_in(name: str, columns: Mapping[str, Any], needs: tuple[str, ...]) -> str | None:
    """The column that probably holds what `name` asks for."""
    free = [column for column in columns if column not in needs]
    known = [alias for alias in ALIASES.get(name, ()) if alias in free]
    near = difflib.get_close_matches(name, free, n=1, cutoff=0.6) or known
    return near[0] if near else None


def _wrong(where: str, place: str, expected: str, value: Any) -> DataError:
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


def _plain(value: Any, name: str, where: str, place: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable(f"empty {name}")
    if not isinstance(value, str):
        raise _wrong(where, place, "text", value)
    return value


def _messages(value: Any, where: str, column: str, expected: str) -> tuple[Message, ...]:
    if value is None:
        raise Unusable("empty messages")
    if not isinstance(value, list):
        raise _wrong(where, f'column "{column}"', expected, value)
    return tuple(_message(each, where, f"{column}[{index}]") for index, each in enumerate(value))


def _message(value: Any, where: str, place: str) -> Message:
    if not isinstance(value, dict):
        raise _wrong(where, place, "a message with role and content", value)
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
        raise _wrong(where, f"{place}.content", "text", content)
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
        raise _wrong(where, place, "a list of calls", value)
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
        raise _wrong(where, f"{place}.arguments", "an object", arguments)
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
        raise _wrong(where, place, "a list of tools", value)
    return tuple(value)


def _shared(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages that two conversations begin with alike."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return first[:same]
