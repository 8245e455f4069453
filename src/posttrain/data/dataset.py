"""The `data:` section: sources read, rows parsed, rendered and counted. Nothing is left out without a count and a reason."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from posttrain.component import Settings
from posttrain.data import classified as classified  # whose formats are registered with it
from posttrain.data import comparisons as comparisons
from posttrain.data.format import Format, Unusable, detect
from posttrain.data.render import Making, Template
from posttrain.data.rows import making_row
from posttrain.data.source import Raw, Source
from posttrain.errors import DataError, InputError
from posttrain.text import (
    Classified,
    Completion,
    Conversation,
    Labelled,
    Message,
    Preference,
    Problem,
    Ranking,
    RenderedRow,
    Rendering,
    Row,
    Steps,
    Text,
    shown_label,
)  # fmt: skip

TOO_LONG = "longer than max_tokens"


@dataclass(frozen=True, slots=True)
class Dropped:
    """How many rows were left out for one reason, and where the first of them stands."""

    count: int
    first: str


class Drops:
    """Counts what is left out, by reason."""

    def __init__(self, before: Mapping[str, Dropped] | None = None) -> None:
        self.found: dict[str, Dropped] = dict(before or {})

    def add(self, reason: str, where: str) -> None:
        known = self.found.get(reason)
        self.found[reason] = Dropped(known.count + 1, known.first) if known else Dropped(1, where)

    @property
    def total(self) -> int:
        return sum(dropped.count for dropped in self.found.values())

    def lines(self, rows: int) -> list[str]:
        """For people; with a warning where most rows are gone."""
        lines = [f"dropped {each.count:,}: {reason} (first: {each.first})" for reason, each in self.found.items()]
        if 2 * self.total > rows:
            lines.append(f"warning: {self.total / rows:.0%} of the rows were dropped")
        return lines

    def refuse_nothing(self, name: str, rows: int) -> None:
        """Raises DataError where no row of a source is left: a mix would silently be another one."""
        if self.total < rows:
            return
        reasons = "; ".join(f"{each.count:,} {reason} (first: {each.first})" for reason, each in self.found.items())
        raise DataError(f"{name}: none of the {rows:,} rows can be used: {reasons}")


def merged(parts: list[dict[str, Dropped]]) -> dict[str, Dropped]:
    """The counts of several sources together; the first place of each reason is that of the first source that has it."""
    total: dict[str, Dropped] = {}
    for part in parts:
        for reason, each in part.items():
            known = total.get(reason, Dropped(0, each.first))
            total[reason] = Dropped(known.count + each.count, known.first)
    return total


@dataclass(frozen=True, slots=True)
class Loaded:
    """Parsed rows, one list per source, and what was left out on the way."""

    names: list[str]
    formats: list[str]
    rows: list[list[Row]]
    counts: list[int]
    left_out: list[dict[str, Dropped]]
    found: bool = False

    @property
    def count(self) -> int:
        """Rows read, usable or not."""
        return sum(self.counts)

    @property
    def dropped(self) -> dict[str, Dropped]:
        return merged(self.left_out)

    @property
    def usable(self) -> int:
        return sum(map(len, self.rows))

    @property
    def all(self) -> list[Row]:
        return [row for source in self.rows for row in source]

    @property
    def needs_chat(self) -> bool:
        """Whether some row is a chat, so that the tokenizer must have a chat template."""
        plain = [Text, Completion, Classified]
        return any(type(row) not in plain or getattr(row, "messages", ()) for rows in self.rows for row in rows)

    def summary(self) -> list[str]:
        how = " (found from the columns of the first row)" if self.found else ""
        kinds = [f"{name}: format {kind}{how}" for name, kind in zip(self.names, self.formats, strict=True)]
        return [*kinds, f"{self.usable:,} of {self.count:,} rows are usable", *Drops(self.dropped).lines(self.count)]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Rows as the model sees them, one list per source, in the order of the files.

    places[s][i] is the file and line of rows[s][i]; a document that was cut gives several rows of one place.
    """

    rows: list[list[RenderedRow]]
    places: list[list[str]]
    count: int
    dropped: dict[str, Dropped]

    @property
    def sequences(self) -> list[Rendering]:
        return [sequence for rows in self.rows for row in rows for sequence in row.sequences]

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for tokens, _ in self.sequences)

    @property
    def trained(self) -> int:
        return sum(sum(train) for _, train in self.sequences)

    @property
    def longest(self) -> int:
        return max(len(tokens) for tokens, _ in self.sequences)

    @property
    def usable(self) -> int:
        return self.count - Drops(self.dropped).total

    def refuse_beyond(self, context: int | None) -> None:
        """Raises DataError where a row is longer than a model's context."""
        if context is not None and self.longest > context:
            raise DataError(
                f"the longest row has {self.longest} tokens, but the model's context is {context}; "
                f"set data.max_tokens: {context} (longer rows are then dropped and counted)"
            )

    def summary(self) -> list[str]:
        learned = f", {self.trained:,} of them trained" if self.trained else ""  # a class is learned from no token
        shape = f"{len(self.sequences):,} sequences, {self.tokens:,} tokens{learned}, longest {self.longest:,}"
        return [f"{self.usable:,} of {self.count:,} rows are usable: {shape}", *Drops(self.dropped).lines(self.count)]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class Data(Settings):
    """What a stage learns from. A plain string, or a list, is its sources."""

    sources: Annotated[list[SerializeAsAny[Source]], BeforeValidator(_as_list), Field(min_length=1)]
    """Files, hub data sets or inline rows; several are mixed by their weights. One alone needs no list."""
    format: SerializeAsAny[Format] | None = None
    """What the columns mean; found from the first row of each source where it is not given."""
    max_tokens: int = Field(1024, ge=2)
    """The longest row in tokens. Documents (format text) are cut into pieces of this length; nothing else is ever cut."""
    too_long: Literal["drop", "error"] = "drop"
    """What happens to a longer row: left out whole and counted, or refused."""
    learn: Literal["all", "last"] = "all"
    """Which assistant messages of a conversation are trained."""

    @model_validator(mode="before")
    @classmethod
    def _from_sources(cls, value: Any) -> Any:
        if isinstance(value, Path):
            value = str(value)
        return {"sources": value} if isinstance(value, str | list) else value

    @model_validator(mode="after")
    def _weighs_all_or_none(self) -> Self:
        without = [source.label() for source in self.sources if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"sources: {', '.join(without)} has no weight, but others have; give every source a weight, or none")
        return self

    def check(self) -> None:
        """Refuses what can be refused before a tokenizer is loaded: files, slices, the columns of the first row."""
        for source in self.sources:
            source.check()
            raw = source.first()
            if raw is not None:
                (self.format or detect(raw)).check_columns(raw)

    def fingerprint(self) -> str:
        """sha256 hex that changes whenever the data change."""
        return hashlib.sha256("\n".join(source.fingerprint() for source in self.sources).encode()).hexdigest()

    def read(self) -> Loaded:
        """Every row of every source. Raises DataError for malformed data, and where no row of a source can be used."""
        loaded = Loaded([], [], [], [], [], self.format is None)
        for source in self.sources:
            raws, drops = list(source.read()), Drops()
            format = self.format or detect(raws[0])
            loaded.rows.append(list(parsed(raws, format, drops)))
            drops.refuse_nothing(source.label(), len(raws))
            loaded.names.append(source.label())
            loaded.formats.append(format.kind)
            loaded.counts.append(len(raws))
            loaded.left_out.append(drops.found)
        return loaded

    def render(self, loaded: Loaded, template: Template) -> Rendered:
        """The rows as tokens and marks. Raises DataError where none is left, or one is too long and `too_long` is error."""
        rows: list[list[RenderedRow]] = []
        places: list[list[str]] = []
        left_out: list[dict[str, Dropped]] = []
        for name, source, count, before in zip(loaded.names, loaded.rows, loaded.counts, loaded.left_out, strict=True):
            drops, kept = Drops(before), []
            for row, made in zip(source, template.together(self.rendered(row, template) for row in source), strict=True):
                if isinstance(made, Unusable):
                    drops.add(str(made), row.where)
                elif isinstance(made, InputError):
                    raise made
                else:
                    kept += [(each, row.where) for each in made]
            drops.refuse_nothing(name, count)
            rows.append([each for each, _ in kept])
            places.append([where for _, where in kept])
            left_out.append(drops.found)
        return Rendered(rows, places, loaded.count, merged(left_out))

    def rendered(self, row: Row, template: Template) -> Making[list[RenderedRow]]:
        """What is trained on for one row: one rendered row, or one for each piece of a document."""
        if isinstance(row, Text):
            document = yield from template.making_document(row.text)
            return [RenderedRow((piece,)) for piece in template.pieces(document, self.max_tokens)]
        made = yield from making_row(row, template, self.learn)
        for tokens, _ in made.sequences:  # a pair goes with its longer side
            self._refuse_long(len(tokens), row.where)
        return [made]

    def _refuse_long(self, length: int, where: str) -> None:
        if length <= self.max_tokens:
            return
        if self.too_long == "error":
            what = f"{where}: {length:,} tokens, but max_tokens is {self.max_tokens:,}"
            raise DataError(f"{what}; raise data.max_tokens, or drop such rows with data.too_long: drop")
        raise Unusable(TOO_LONG)


def parsed(raws: list[Raw], format: Format, drops: Drops) -> Iterator[Row]:
    """The usable rows of one source. Raises DataError where two problems share an id, which addresses their random draws."""
    seen: dict[str, str] = {}
    for raw in raws:
        try:
            row = format.parse(raw)
        except Unusable as reason:
            drops.add(str(reason), raw.where)
            continue
        if isinstance(row, Problem):
            if row.id in seen:
                what = f'{row.where}: the id "{row.id}" stands already at {seen[row.id]}'
                raise DataError(f"{what}; ids address random draws, so each must be unique")
            seen[row.id] = row.where
        yield row


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model will see it: runs of text, and whether each is trained."""

    where: str
    spans: list[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class Description:
    """What `posttrain data` says of some data."""

    loaded: Loaded
    rendered: Rendered | None
    examples: list[Example]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        last = self.rendered or self.loaded
        found: dict[str, Any] = {
            "sources": [{"name": n, "format": f} for n, f in zip(self.loaded.names, self.loaded.formats, strict=True)],
            "format_found": self.loaded.found,
            "rows": last.count,
            "usable": last.usable,
            "dropped": {reason: {"count": each.count, "first": each.first} for reason, each in last.dropped.items()},
            "examples": [
                {"where": each.where, "spans": [{"text": text, "trained": trained} for text, trained in each.spans]}
                for each in self.examples
            ],
        }
        if self.rendered:
            sizes = {"sequences": len(self.rendered.sequences), "tokens": self.rendered.tokens}
            found |= sizes | {"trained": self.rendered.trained, "longest": self.rendered.longest}
        return found

    def lines(self) -> list[str]:
        """For people: the summary, then the examples with ⟦ ⟧ around what is trained."""
        said = self.loaded.summary()
        if self.rendered:
            said = said[: len(self.loaded.names)] + self.rendered.summary()
        for each in self.examples:
            text = "".join(f"⟦{text}⟧" if trained else text for text, trained in each.spans)
            said += ["", f"{each.where}:", *(f"    {line}" for line in text.split("\n"))]
        return said


def describe(data: str | Path | Data, template: Template | None = None, show: int = 3) -> Description:
    """Reads data (a path will do), counts, and shows the first rows: as tokens where a template is given, else as text."""
    if not isinstance(data, Data):
        data = Data.model_validate({"sources": {"kind": "file", "path": str(data)}})
    loaded = data.read()
    rows = loaded.all
    answered = not any(isinstance(row, Problem) for row in rows)
    rendered = data.render(loaded, template) if template and answered else None
    if rendered and template:
        kinds = chain(*([kind] * len(each) for kind, each in zip(loaded.formats, rendered.rows, strict=True)))
        placed = zip(chain(*rendered.places), chain(*rendered.rows), kinds, strict=True)
        examples = [
            Example(where + said, template.spans(*each))
            for where, row, kind in islice(placed, show)
            for each, said in zip(row.sequences, _said(row, kind), strict=True)
        ]
    else:
        examples = [Example(row.where, spans) for row in rows[:show] for spans in _views(row, template)]
    return Description(loaded, rendered, examples)


def _said(row: RenderedRow, kind: str) -> list[str]:
    """What the label or the numbers of a row say of each of its sequences."""
    if row.label is not None:
        return [f" ({shown_label(row.label)})"]
    if kind == "preference":
        return [" (chosen)", " (rejected)"]
    scored = kind in {"labelled", "ranking", "graded"}
    return [f" ({number:g})" for number in row.numbers] if scored else [""] * len(row.sequences)


def _views(row: Row, template: Template | None) -> list[list[tuple[str, bool]]]:
    """A row without a mask: plain text, or the prompt of a problem as the policy will see it."""
    if isinstance(row, Problem):
        answer = [] if row.answer is None else [(f"\n[answer] {row.answer}", False)]
        text = template.decode(template.prompt(row.prompt)) if template else _chat(row.prompt)
        return [[(text, False), *answer]]
    if isinstance(row, Preference | Labelled | Ranking | Steps):
        return [[(f"{_chat(row.prompt)}\n[{name}] ", False), (_chat(side), True)] for name, side in _sides(row)]
    if isinstance(row, Conversation):
        return [[(_chat((message,)) + "\n", message.role == "assistant") for message in row.messages]]
    if isinstance(row, Classified):
        text = _chat(row.messages) if row.messages else "\n".join(filter(None, [row.text, row.second]))
        return [[(f"{text}\n[label] {shown_label(row.label)}", False)]]
    if isinstance(row, Completion):
        return [[(row.prompt, False), (row.completion, True)]]
    return [[(row.text if len(row.text) <= 400 else row.text[:400] + "...", True)]]


def _sides(row: Preference | Labelled | Ranking | Steps) -> list[tuple[str, tuple[Message, ...]]]:
    """The answers of a row, each with what is said of it."""
    if isinstance(row, Preference):
        return [("chosen", row.chosen), ("rejected", row.rejected)]
    if isinstance(row, Labelled):
        return [("good" if row.good else "bad", row.completion)]
    if isinstance(row, Ranking):
        return [(f"{score:g}", answer) for score, answer in zip(row.scores, row.completions, strict=True)]
    steps = "\n".join(f"{step} [{right:g}]" for step, right in zip(row.steps, row.right, strict=True))
    return [("steps", (Message("assistant", steps),))]


def _chat(messages: Any) -> str:
    calls = [" ".join([message.content, *(str(dict(call)) for call in message.tool_calls)]) for message in messages]
    return "\n".join(f"{message.role}: {said}" for message, said in zip(messages, calls, strict=True))
