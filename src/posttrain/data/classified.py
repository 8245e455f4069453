"""Rows that say what a text is."""

import math
from typing import Any

from posttrain.data.format import Format, Unusable, as_text, wrong
from posttrain.data.source import Raw
from posttrain.text import Classified, Label, Message


class ClassifiedTexts(Format, kind="classified"):
    """A `text` and its `label`: a name, true or false, a number, or a list of names where several may be right.

    A `second` text goes with it where two are judged together; a conversation (`messages`, or a `prompt` and perhaps a
    `completion`) may stand in its place.
    """

    needs = ("label",)
    either = ("text", "messages", "prompt")
    may = ("second", "completion")
    makes = frozenset({"Classified"})

    def row(self, raw: Raw) -> Classified:
        label = self._label(raw)
        if (name := self.which(raw)) != "text":
            return Classified("", label, None, self._messages(raw, name), raw.where)
        has_second = self.column("second") in raw.value or "second" in self.fields
        return Classified(self.plain(raw, "text"), label, self.plain(raw, "second") if has_second else None, (), raw.where)

    def _messages(self, raw: Raw, name: str) -> tuple[Message, ...]:
        found = self.turns(raw, name, "user")
        if name == "prompt" and self.cell(raw, "completion") is not None:
            found += self.turns(raw, "completion", "assistant")
        return found

    def _label(self, raw: Raw) -> Label:
        value, place = self.cell(raw, "label"), f'column "{self.column("label")}"'
        if isinstance(value, list):
            return tuple(dict.fromkeys(_name(each, raw.where, f"{place}[{index}]") for index, each in enumerate(value)))
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise wrong(raw.where, place, "a finite number", value)
            return value
        return _name(value, raw.where, place)


def _name(value: Any, where: str, place: str) -> str:
    """One label. Raises Unusable where there is none."""
    if value is None:
        raise Unusable("empty label")
    if isinstance(value, int):
        return str(value).lower()
    return as_text(value, "label", where, place)
