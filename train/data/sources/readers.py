"""File formats: reads documents from one file, compressed or not. Every error names file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import shutil
import sqlite3
import sys
import tempfile
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from train.data.sources.records import Document, Records, kind_of
from transformer.errors import UserError, first_line
from transformer.paths import check_file

Format = Literal["text", "python", "jsonl", "csv", "parquet", "sqlite", "conll"]

_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".db": "sqlite",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
    ".conll": "conll",
}
_CHUNK_BYTES = 1 << 20
_ROWS = 4096
"""Rows of a Parquet file that are in memory together."""
_NOT_TEXT = {
    ".json": "set format: jsonl if it has one object per line",
    ".tsv": "write it with commas, as .csv",
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z", ".rar"), "unpack it"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx"), "write it as .parquet, .csv or .jsonl"),
    **dict.fromkeys(
        (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npy", ".npz", ".pkl", ".pickle", ".h5"), "it holds arrays"
    ),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub"), "convert it to plain text"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".wav", ".mp4"), "it holds no text"),
}
"""Suffixes of files that are not plain text, with what to do. Whatever they are, `format: text` reads them as text."""
_BEGINNING = 8192
"""Bytes of a file with an unknown suffix in which a zero byte shows that it is not text."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How to turn files into documents. `read` is the only entry point; the rest is one method per format."""

    format: Literal["auto"] | Format
    records: Records
    """Turns rows into documents; its `rejects` collect all errors."""
    separator: str = ""
    query: str = ""

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
            "conll": self._conll,
        }
        check_file(path)
        try:
            if self.format == "auto" and form == "text":
                check_is_text(path)
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
                # A line may have a Windows line ending.
                text = self._decode(data.removesuffix(b"\r") if self.separator == "\n" else data, path, line)
                line += data.count(b"\n") + self.separator.count("\n")
                if text:
                    yield Document(f"{name}#{number}" if self.separator else name, text)

    def _decode(self, data: bytes, path: Path, line: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            self.records.rejects.add(f"{path}:{line}", f"not valid UTF-8 (byte 0x{data[error.start]:02x})")
            return ""

    def _python(self, path: Path, name: str) -> Iterator[Document]:
        # Python source declares its own encoding (PEP 263). The standard library's tests hold a few files that are
        # broken on purpose: no user can fix those, so they never stop a run.
        data = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            yield Document(name, data.decode(encoding))
        except (SyntaxError, UnicodeDecodeError) as error:
            self.records.rejects.skip(str(path), f"not valid Python source text ({error})")

    def _jsonl(self, path: Path, name: str) -> Iterator[Document]:
        with open_bytes(path) as stream:
            for line, data in enumerate(stream, start=1):
                if data.isspace():
                    continue
                place = f"{path}:{line}"
                try:
                    row = json.loads(data.decode("utf-8", "surrogateescape"))
                except (json.JSONDecodeError, RecursionError) as error:
                    self.records.rejects.add(place, f"malformed JSON ({error})")
                    continue
                if not isinstance(row, dict):
                    self.records.rejects.add(place, f"expected a JSON object, got {kind_of(row)}")
                elif document := self.records.document(row, f"{name}:{line}", place):
                    yield document

    def _csv(self, path: Path, name: str) -> Iterator[Document]:
        csv.field_size_limit(sys.maxsize)  # a document may be longer than the module's limit of 128 KiB
        with open_bytes(path) as stream:
            rows = csv.DictReader(data.decode("utf-8", "surrogateescape") for data in stream)
            try:
                fields = [field.removeprefix("\ufeff") for field in rows.fieldnames or ()]
            except csv.Error as error:
                raise UserError(f"{path}:1: malformed CSV ({error}); fix its header") from None
            if fields:
                self.records.columns(fields, f"{path}:1")
            rows.fieldnames = fields
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    self.records.rejects.add(f"{path}:{rows.line_num}", f"malformed CSV ({error})")
                    continue
                place = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    self.records.rejects.add(place, f"malformed CSV (not the header's {len(fields)} fields)")
                elif document := self.records.document(row, f"{name}:{rows.line_num}", place):
                    yield document

    def _parquet(self, path: Path, name: str) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # In memory that does not grow with the file, or with its row groups.
            with pq.ParquetFile(path, buffer_size=_CHUNK_BYTES) as file:
                columns = self.records.columns(file.schema_arrow.names, str(path))
                number = 0
                for batch in file.iter_batches(_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        if document := self.records.document(row, f"{name}:{number}", f"{path}:{number}"):
                            yield document
        except pa.ArrowException as error:
            raise UserError(f"{path}: not a readable Parquet file ({first_line(error)}); make it again") from error

    def _conll(self, path: Path, name: str) -> Iterator[Document]:
        """Columns separated by white space, one word per line and an empty line after each text: `words` are the first
        column, `tags` the last (Tjong Kim Sang & De Meulder 2003). Lines that mark a new document are not words."""
        rows: list[list[str]] = []
        with open_bytes(path) as stream:
            for line, data in enumerate(itertools.chain(stream, [b""]), start=1):
                columns = data.decode("utf-8", "surrogateescape").split()
                if columns and columns[0] != "-DOCSTART-":
                    rows.append(columns)
                elif not columns and rows:
                    place, first = f"{path}:{line - len(rows)}", f"{name}:{line - len(rows)}"
                    if min(map(len, rows)) < 2:
                        self.records.rejects.add(place, "a line of this text has a word and no tag")
                    else:
                        row = {"words": [row[0] for row in rows], "tags": [row[-1] for row in rows]}
                        if document := self.records.document(row, first, place):
                            yield document
                    rows = []

    def _sqlite(self, path: Path, name: str) -> Iterator[Document]:
        with tempfile.TemporaryDirectory() as folder:
            log = write_ahead_log(path)
            if log is not None:
                # Rows that are in the log alone are part of the database, but SQLite would write next to a file that is not
                # ours to read them.
                copy = Path(folder, path.name)
                shutil.copyfile(path, copy)
                shutil.copyfile(log, copy.with_name(log.name))
                yield from self._rows(copy.as_uri(), path, name)
            else:
                yield from self._rows(f"{path.absolute().as_uri()}?mode=ro&immutable=1", path, name)

    def _rows(self, uri: str, path: Path, name: str) -> Iterator[Document]:
        # A tokenizer that is trained on these documents requests them from its own threads, one at a time.
        connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        try:
            rows = connection.execute(self.query)
            columns = [column[0] for column in rows.description or ()]
            if len(columns) == 1 and len(self.records.fields.by_setting()) == 1:
                columns = [self.records.fields.text]  # a single column is the text, whatever its name
            self.records.columns(columns, f"{path}: query")
            for number, values in enumerate(rows, start=1):
                row = dict(zip(columns, values, strict=True))
                if document := self.records.document(row, f"{name}:{number}", f"{path}: row {number}"):
                    yield document
        except sqlite3.Error as error:
            raise UserError(f"{path}: query: {error}; check the query and that this is a SQLite database") from error
        finally:
            connection.close()


def write_ahead_log(path: Path) -> Path | None:
    """The file in which SQLite keeps rows that are not in the database's own file yet; None if there are none."""
    log = path.with_name(f"{path.name}-wal")
    return log if log.exists() and log.stat().st_size else None


def format_of(path: Path) -> Format:
    """The format that a file's name implies: `pages.jsonl.gz` is `jsonl`, and an unknown one is `text`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1], "text") if suffixes else "text"


def check_is_text(path: Path) -> None:
    """Raise a `UserError` for a file whose name has no known format, and which is not plain text by its name or beginning."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    if suffixes and (advice := _NOT_TEXT.get(suffixes[-1])):
        raise UserError(f"{path}: {suffixes[-1]} files are not read as text: {advice}, or set format: text")
    with open_bytes(path) as stream:
        if b"\0" in stream.read(_BEGINNING):
            raise UserError(f"{path}: not a text file (it has zero bytes); set format to what it is, or format: text")


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
