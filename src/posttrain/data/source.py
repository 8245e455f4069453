"""Where rows come from: a file, a hub data set, or the recipe itself.

A source yields each row as the file has it, with its place (`train.jsonl:17`), and stops with that place at anything that is
not a row. It judges no columns: that is the format's part.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from pydantic import Field, ModelWrapValidatorHandler, PositiveFloat, field_validator, model_validator

from posttrain.component import Component, imported
from posttrain.errors import DataError
from posttrain.paths import PREFIX, resolve

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as the file has it; `where` is the file and line (parquet and .json: the number of the row)."""

    value: dict[str, Any]
    where: str


class Source(Component):
    """Rows, and what share of a mix they make."""

    default_kind = "file"
    plain_string = "the path of a file"

    weight: PositiveFloat | None = None
    """Share in a mix: a source of weight 2 gives twice the rows of one of weight 1. By default a source's own number of rows."""
    rows: str | None = None
    """A slice of the rows by position: "0:2000", "7500:", ":100"; it must lie inside the data."""

    @model_validator(mode="wrap")
    @classmethod
    def _build_kind(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A plain string that names no kind is the path of a file."""
        if cls.is_family() and isinstance(value, str) and value not in cls.kinds and not _is_user_class(value):
            value = {"kind": "file", "path": value}
        return super()._build_kind(value, handler)  # type: ignore[operator]

    @field_validator("rows")
    @classmethod
    def _is_a_slice(cls, value: str | None) -> str | None:
        match = re.fullmatch(r"(\d*):(\d*)", value) if value is not None else None
        if value is not None and not match:
            raise ValueError(f'{value!r} is not a slice of rows; write it like "0:2000", "7500:" or ":100"')
        if match and match[2] and int(match[1] or 0) >= int(match[2]):
            raise ValueError(f"{value!r} holds no row: it ends before it begins")
        return value

    def label(self) -> str:
        """How messages name this source."""
        raise NotImplementedError

    def all_rows(self) -> Iterator[Raw]:
        """Every row, the slice not yet applied."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuses what can be refused cheaply, before anything heavy is loaded."""

    def first(self) -> Raw | None:
        """The first row, for checks; None where reading it would cost something."""
        return next(self.read())

    def read(self) -> Iterator[Raw]:
        """The rows of the slice. Raises DataError where the data are malformed, empty, or shorter than the slice."""
        start, _, stop = (self.rows or ":").partition(":")
        first, last = int(start or 0), int(stop) if stop else None
        seen = 0
        for raw in self.all_rows():
            seen += 1
            if seen > first:
                yield raw
            if seen == last:
                return
        if seen == 0:
            raise DataError(f"{self.label()}: is empty: it has no rows")
        if seen <= first or last is not None:
            raise DataError(f'{self.label()}: rows "{self.rows}" reaches past the end: there are {seen:,} rows')

    def fingerprint(self) -> str:
        """sha256 over the rows: changes whenever what is read changes."""
        digest = hashlib.sha256()
        for raw in self.read():
            digest.update(json.dumps(raw.value, default=str).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def _is_user_class(value: str) -> bool:
    """`my_package.module:MyClass`, as against the path of a file."""
    return not value.startswith(PREFIX) and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value) is not None


class Inline(Source, kind="inline"):
    """Rows written in the recipe itself."""

    items: list[dict[str, Any]] = Field(min_length=1)
    """The rows, each a mapping of columns."""

    def label(self) -> str:
        return "inline"

    def all_rows(self) -> Iterator[Raw]:
        return (Raw(item, f"inline:{number}") for number, item in enumerate(self.items, 1))


class Made(Source, kind="function"):
    """Rows that a Python function makes: `my_package.module:my_function` returns or yields mappings of columns.

    It has to give the same rows whenever it is called; their hash is part of what a run records.
    """

    path: str
    """The function."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """What it is called with, by name."""

    @field_validator("path")
    @classmethod
    def _can_be_called(cls, path: str) -> str:
        if not callable(imported(path)):
            raise ValueError(f"{path!r} is no function")
        return path

    def label(self) -> str:
        return self.path

    def all_rows(self) -> Iterator[Raw]:
        try:
            for number, row in enumerate(imported(self.path)(**self.arguments), 1):
                if not isinstance(row, dict):
                    raise DataError(f"{self.path}:{number}: a {type(row).__name__}, not a mapping of columns")
                yield Raw(row, f"{self.path}:{number}")
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, OSError) as error:
            what = f"raised {type(error).__name__}: {error}"
            raise DataError(f"{self.path}: {what}; mend the function, or its `arguments`") from None


class StageRows(Source, kind="stage"):
    """The rows that another stage of the recipe makes."""

    stage: str
    """The stage's name."""

    def label(self) -> str:
        return f"the rows of stage {self.stage}"

    def first(self) -> Raw | None:
        return None  # they are not made yet

    def all_rows(self) -> Iterator[Raw]:
        raise DataError(f"{self.label()}: only a recipe's stage can read them")


class Hub(Source, kind="hub"):
    """A data set of the hub, or anything else that `datasets.load_dataset` loads."""

    path: str
    """Name of the data set, such as `openai/gsm8k`."""
    name: str | None = None
    """Its configuration, where it has several."""
    split: str = "train"
    """Which split; the library's slices such as `train[:1000]` work too."""
    revision: str | None = None
    """Commit or tag. Pin it, and the data cannot change under a recipe."""

    def label(self) -> str:
        return self.path

    def first(self) -> Raw | None:
        return None  # a check downloads nothing

    def all_rows(self) -> Iterator[Raw]:
        import datasets

        try:
            table = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{self.path}: the hub data set cannot be loaded: {reason}") from None
        for number, value in enumerate(table, 1):
            yield Raw(dict(value), f"{self.path}[{self.split}]:{number}")


class File(Source, kind="file"):
    """A .jsonl, .json, .csv, .parquet or .txt file, gzipped or not; a .txt file is one document."""

    path: str
    """The file; `posttrain:data/...` is one that comes with the package."""

    def label(self) -> str:
        return self.path

    def suffix(self) -> str:
        path = resolve(self.path)
        return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()

    def check(self) -> None:
        if "\0" in self.path:
            raise DataError(f"{self.path!r}: is no name of a file")
        path = resolve(self.path)
        try:
            if path.is_dir():
                raise DataError(f"{self.path}: is a directory; name one file in it")
            if not path.exists():
                raise DataError(f"{self.path}: no such file{_nearest(path)}")
            if path.stat().st_size == 0:
                raise DataError(f"{self.path}: is empty: it has no rows")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        if self.suffix() not in SUFFIXES:
            raise DataError(f"{self.path}: the format of the file is told by its name, which must end in {', '.join(SUFFIXES)}")

    def all_rows(self) -> Iterator[Raw]:
        self.check()
        return {".jsonl": self._jsonl, ".json": self._json, ".csv": self._csv, ".parquet": self._parquet, ".txt": self._txt}[
            self.suffix()
        ]()

    def fingerprint(self) -> str:
        """sha256 over the file's bytes and the slice."""
        self.check()
        digest = hashlib.sha256(f"rows {self.rows or ':'}\n".encode())
        try:
            with open(resolve(self.path), "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        return digest.hexdigest()

    def _lines(self) -> Iterator[bytes]:
        """The lines with their ends. Raises DataError with the line at which gzip data are cut or damaged."""
        number = 0
        try:
            with _opened(resolve(self.path)) as stream:
                for number, line in enumerate(stream, 1):  # noqa: B007
                    yield line
        except EOFError:
            raise DataError(f"{self.path}:{number + 1}: the gzip data end early: the file is cut short; copy it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self.path}:{number + 1}: damaged gzip data ({error}); copy the file again") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def _text(self, line: bytes, number: int) -> str:
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            what = f"not UTF-8 text (byte {error.start + 1} of the line)"
            raise DataError(f"{self.path}:{number}: {what}; is this really a {self.suffix()} file?") from None

    def _whole(self) -> str:
        return "".join(self._text(line, number) for number, line in enumerate(self._lines(), 1))

    def _jsonl(self) -> Iterator[Raw]:
        for number, line in enumerate(self._lines(), 1):
            text = self._text(line, number)
            if not text.strip():
                continue
            cut = not line.endswith(b"\n")
            hint = "the last line is cut short; copy the file again" if cut else "each line must be one whole JSON object"
            yield self._object(self._parsed(text.rstrip("\r\n"), number, hint), f"{self.path}:{number}")

    def _json(self) -> Iterator[Raw]:
        found = self._parsed(self._whole(), 1, "one object a line is a .jsonl file, this name promises one list")
        if not isinstance(found, list):
            raise DataError(f"{self.path}:1: expected a list of objects, found {shown(found)}")
        return (self._object(value, f"{self.path}:{number}") for number, value in enumerate(found, 1))

    def _parsed(self, text: str, first_line: int, hint: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            line = first_line + error.lineno - 1
            raise DataError(f"{self.path}:{line}: column {error.colno}: not valid JSON: {error.msg}; {hint}") from None
        except RecursionError:
            raise DataError(f"{self.path}:{first_line}: not usable JSON: nested too deeply") from None
        except ValueError as error:  # an integer of thousands of digits
            raise DataError(f"{self.path}:{first_line}: not usable JSON: {error}") from None

    def _object(self, value: Any, where: str) -> Raw:
        if not isinstance(value, dict):
            raise DataError(f'{where}: expected an object such as {{"prompt": ...}}, found {shown(value)}')
        return Raw(value, where)

    def _csv(self) -> Iterator[Raw]:
        csv.field_size_limit(sys.maxsize)  # a cell may hold a long document
        reader = csv.reader(io.StringIO(self._whole(), newline=""), strict=True)
        names: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{self.path}:{line}: not valid CSV: {error}") from None
            if cells is None:
                return
            if not cells:
                continue  # a blank line
            if not names:
                names = cells
                if len(set(names)) < len(names):
                    raise DataError(f"{self.path}:{line}: two columns have the same name; rename one of {', '.join(names)}")
            elif len(cells) != len(names):
                raise DataError(f"{self.path}:{line}: {len(cells)} cells, but the header names {len(names)} columns")
            else:
                yield Raw(dict(zip(names, cells, strict=True)), f"{self.path}:{line}")

    def _parquet(self) -> Iterator[Raw]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(resolve(self.path)) as file:
                for batch in file.iter_batches():
                    for value in batch.to_pylist():
                        number += 1
                        yield Raw(value, f"{self.path}:{number}")
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{self.path}:{number + 1}: not a whole parquet file: {reason}; copy it again") from None

    def _txt(self) -> Iterator[Raw]:
        yield Raw({"text": self._whole()}, f"{self.path}:1")


def _opened(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed where they are gzip, whatever the file is called."""
    stream = open(path, "rb")  # noqa: SIM115
    if stream.read(2) == GZIP:
        stream.close()
        return gzip.open(path, "rb")  # type: ignore[return-value]
    stream.seek(0)
    return stream


def _nearest(path: Path) -> str:
    """`; the nearest name there is ...`, or that the folder is missing too."""
    if not path.parent.is_dir():
        return "; its folder does not exist either"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f'; the nearest name in that folder is "{near[0]}"' if near else ""


def shown(value: Any) -> str:
    """A value as messages show it: `3 (integer)`, `"yes" (text)`, `a list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (true or false)"
    if isinstance(value, int | float):
        return f"{value} ({'integer' if isinstance(value, int) else 'number'})"
    if isinstance(value, str):
        text = json.dumps(value if len(value) <= 40 else value[:37] + "...", ensure_ascii=False)
        return f"{text.encode('utf-8', 'backslashreplace').decode()} (text)"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
