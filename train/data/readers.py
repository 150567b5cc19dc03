"""File formats: from one file, compressed or not, to documents. Every fault is named by file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sqlite3
import sys
import tokenize
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

from transformer.errors import UserError, nearest

Format = Literal["text", "python", "jsonl", "csv", "parquet", "sqlite"]

_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".db": "sqlite",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
}
_CHUNK_BYTES = 1 << 20


class Document(NamedTuple):
    """One text of a corpus, or one pair of texts. Its id is stable from run to run."""

    id: str
    text: str
    target: str | None = None
    """The other side of a pair."""
    group: str = ""
    """What this document belongs to, such as a chapter; empty: nothing but itself."""
    label: str | None = None
    """The document's class."""

    @property
    def sides(self) -> tuple[str, ...]:
        """The text, and in a pair the other side's."""
        return (self.text,) if self.target is None else (self.text, self.target)

    @property
    def split_by(self) -> str:
        """What the validation split goes by: documents of one group are held out together."""
        return self.group or self.id


class Fields(NamedTuple):
    """The fields of a record that make up a document; a dotted path such as `translation.fr` reaches inside."""

    text: str
    target: str = ""
    group: str = ""
    label: str = ""

    def by_setting(self) -> dict[str, str]:
        """The fields that are wanted, by the setting which names them."""
        named = {
            "text_field": self.text,
            "target_field": self.target,
            "group_field": self.group,
            "label_field": self.label,
        }
        return {setting: field for setting, field in named.items() if field}

    def columns(self, known: list[str]) -> list[str]:
        """The columns among `known` to read, each once. Raises `KeyError` with a reason for one that is missing."""
        found = []
        for setting, field in self.by_setting().items():
            root = field if field in known else field.partition(".")[0]
            if root not in known:
                raise KeyError(missing_field(setting, field, known))
            found.append(root)
        return list(dict.fromkeys(found))


@dataclass
class Rejects:
    """What happens to a document that cannot be read: the first one stops everything, or all are counted."""

    on_error: Literal["stop", "skip"] = "stop"
    count: int = 0
    first: str = ""

    def add(self, place: str, reason: str) -> None:
        """Count the document at `place` (`FILE:LINE`), or raise a `UserError` that says what is wrong with it."""
        if self.on_error == "stop":
            raise UserError(f"{place}: {reason}; mend it, or leave such documents out with on_error: skip")
        self.skip(place, reason)

    def skip(self, place: str, reason: str) -> None:
        """Count the document at `place` without stopping."""
        self.count += 1
        self.first = self.first or f"{place}: {reason}"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How to turn files into documents. `read` is the only entrance; the rest is one method per format."""

    format: Literal["auto"] | Format
    fields: Fields
    separator: str
    query: str
    rejects: Rejects
    labels: tuple[str, ...] = ()
    """Documents of other classes are passed over; empty: none are."""

    def read(self, path: Path, name: str) -> Iterator[Document]:
        """The documents of the file at `path`, in its order, none of them empty.

        `name` begins each document's id. Raises `UserError` for a file that cannot be opened or is damaged, and for
        a faulty document if `rejects` is set to stop.
        """
        form = format_of(path) if self.format == "auto" else self.format
        readers: dict[str, Callable[[Path, str], Iterator[Document]]] = {
            "text": self._text,
            "python": self._python,
            "jsonl": self._jsonl,
            "csv": self._csv,
            "parquet": self._parquet,
            "sqlite": self._sqlite,
        }
        try:
            for document in readers[form](path, name):
                if document.text:
                    yield document
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: damaged or cut short ({error}); fetch or compress it again") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); check path and disk") from error

    def _text(self, path: Path, name: str) -> Iterator[Document]:
        line = 1
        with open_bytes(path) as stream:
            for number, data in enumerate(_split(stream, self.separator.encode())):
                text = self._decode(data, path, line)
                line += data.count(b"\n") + self.separator.count("\n")
                if text:
                    yield Document(f"{name}#{number}" if self.separator else name, text)

    def _decode(self, data: bytes, path: Path, line: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            self.rejects.add(f"{path}:{line}", f"not valid UTF-8 (byte 0x{data[error.start]:02x})")
            return ""

    def _python(self, path: Path, name: str) -> Iterator[Document]:
        # Python source says its own encoding (PEP 263). The standard library's tests hold a few files that are
        # broken on purpose: no user can mend those, so they never stop a run.
        data = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            yield Document(name, data.decode(encoding))
        except (SyntaxError, UnicodeDecodeError) as error:
            self.rejects.skip(str(path), f"not valid Python source text ({error})")

    def _jsonl(self, path: Path, name: str) -> Iterator[Document]:
        with open_bytes(path) as stream:
            for line, data in enumerate(stream, start=1):
                if data.isspace():
                    continue
                place = f"{path}:{line}"
                try:
                    row = json.loads(data.decode("utf-8", "surrogateescape"))
                except (json.JSONDecodeError, RecursionError) as error:
                    self.rejects.add(place, f"malformed JSON ({error})")
                    continue
                if not isinstance(row, dict):
                    self.rejects.add(place, f"expected a JSON object, got {type(row).__name__}")
                elif document := self.document(row, f"{name}:{line}", place):
                    yield document

    def _csv(self, path: Path, name: str) -> Iterator[Document]:
        csv.field_size_limit(sys.maxsize)  # a document may well be longer than the module's 128 KiB
        with open_bytes(path) as stream:
            rows = csv.DictReader(data.decode("utf-8", "surrogateescape") for data in stream)
            fields = [field.removeprefix("\ufeff") for field in rows.fieldnames or ()]
            if fields:
                self.columns(fields, f"{path}:1")
            rows.fieldnames = fields
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    self.rejects.add(f"{path}:{rows.line_num}", f"malformed CSV ({error})")
                    continue
                place = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    self.rejects.add(place, f"malformed CSV (not the header's {len(fields)} fields)")
                elif document := self.document(row, f"{name}:{rows.line_num}", place):
                    yield document

    def _parquet(self, path: Path, name: str) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                columns = self.columns(file.schema_arrow.names, str(path))
                number = 0
                for batch in file.iter_batches(columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        if document := self.document(row, f"{name}:{number}", f"{path}:{number}"):
                            yield document
        except pa.ArrowException as error:
            raise UserError(f"{path}: not a Parquet file that can be read ({_line(error)}); make it again") from error

    def _sqlite(self, path: Path, name: str) -> Iterator[Document]:
        # Read-only and immutable: no journal is written beside a file that is not ours. A tokenizer that is trained on
        # these documents asks for them from threads of its own, one at a time.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        try:
            rows = connection.execute(self.query)
            columns = [column[0] for column in rows.description or ()]
            if len(columns) == 1 and len(self.fields.by_setting()) == 1:
                columns = [self.fields.text]  # the only column is the text, whatever its name
            self.columns(columns, f"{path}: query")
            for number, values in enumerate(rows, start=1):
                row = dict(zip(columns, values, strict=True))
                if document := self.document(row, f"{name}:{number}", f"{path}: row {number}"):
                    yield document
        except sqlite3.Error as error:
            raise UserError(f"{path}: query: {error}; check the query and that this is a SQLite database") from error
        finally:
            connection.close()

    def columns(self, known: list[str], place: str) -> list[str]:
        """The columns of a table to read. Raises `UserError` for one that the table lacks."""
        try:
            return self.fields.columns(known)
        except KeyError as error:
            raise UserError(f"{place}: {error.args[0]}") from None

    def document(self, row: Mapping[str, Any], id: str, place: str) -> Document | None:
        """The document that a record holds; None for one to pass over, and after telling `rejects` about a fault."""
        values = {}
        for setting, field in self.fields.by_setting().items():
            try:
                values[setting] = value_at(row, field)
            except KeyError:
                self.rejects.add(place, missing_field(setting, field, list(row)))
                return None
        label = None
        if self.fields.label:
            # Before the text: what is wrong with a document that is passed over is no matter.
            label = self._label(values["label_field"], place)
            if label is None or (self.labels and label not in self.labels):
                return None
        text = self._valid(values["text_field"], self.fields.text, place)
        if text is None:
            return None
        target = None
        if self.fields.target:
            target = self._valid(values["target_field"], self.fields.target, place)
            if target is None:
                return None
            for field, side in ((self.fields.text, text), (self.fields.target, target)):
                if not side.strip():
                    self.rejects.add(place, f"field {field!r} is empty, and so is one side of the pair")
                    return None
        group = values.get("group_field", "")
        if group is None:
            self.rejects.add(place, f"field {self.fields.group!r} holds nothing")
            return None
        return Document(id, text, target, str(group).encode("utf-8", "replace").decode(), label) if text else None

    def _label(self, value: Any, place: str) -> str | None:
        """The class that a field holds, else None after telling `rejects` about `place`."""
        field = self.fields.label
        if value is None or (isinstance(value, str) and not value.strip()):
            self.rejects.add(place, f"field {field!r} is empty, and the document has no class")
            return None
        # Data sets often number their classes.
        return str(value) if isinstance(value, int) else self._valid(value, field, place)

    def _valid(self, value: Any, field: str, place: str) -> str | None:
        """`value` if it is text that UTF-8 can hold, else None after telling `rejects` about `place`."""
        if not isinstance(value, str):
            self.rejects.add(place, f"field {field!r} holds {type(value).__name__}, not text")
            return None
        try:
            value.encode()
        except UnicodeEncodeError:  # an undecodable byte that `surrogateescape` kept, or a lone "\ud800" in JSON
            self.rejects.add(place, f"field {field!r} is not valid UTF-8")
            return None
        return value


def value_at(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field of a record, which a dotted path finds inside others. Raises `KeyError` if it is missing."""
    if field in row:
        return row[field]
    root, _, rest = field.partition(".")
    inner = row.get(root)
    if not rest or not isinstance(inner, Mapping):
        raise KeyError(field)
    return value_at(inner, rest)


def format_of(path: Path) -> Format:
    """The format that a file's name tells: `pages.jsonl.gz` is `jsonl`, whatever is not known is `text`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1], "text") if suffixes else "text"


def is_compressed(path: Path) -> bool:
    """Whether the file's size says nothing about the size of its text."""
    return path.suffix.lower() in _COMPRESSED


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed by its suffix: .gz, .bz2, .xz, .zst. Raises `OSError`."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(cast("Any", pa.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def missing_field(setting: str, field: str, fields: list[str]) -> str:
    """The reason why a record lacks a field that `setting` names: what was looked for, and what there is."""
    known = ", ".join(map(str, fields)) or "none"
    return f"no field {field!r} (there is {known}); set {setting}.{nearest(field, fields)}"


def _split(stream: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """The pieces of a stream between separators, never holding more than one piece and one chunk in memory."""
    if not separator:
        yield stream.read()
        return
    rest = b""
    while chunk := stream.read(_CHUNK_BYTES):
        *pieces, rest = (rest + chunk).split(separator)
        yield from pieces
    yield rest


def _line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return str(error).strip().partition("\n")[0]
