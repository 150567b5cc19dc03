"""Readers: documents from one file, compressed or not, by its format. Every error names file and line."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sqlite3
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from train.data.sources.conll import conll_texts
from train.data.sources.file_formats import Format, check_is_text, format_of, suffix_of
from train.data.sources.json_items import json_items
from train.data.sources.records import Document, Records, kind_of
from train.data.sources.tables import TableFormat
from train.text_files import DEFAULT_ENCODING, invalid_bytes, not_valid, open_text, reading, unix_lines
from transformer.errors import UserError, first_line, shown
from transformer.paths import check_file

FOLDER = "folder"
"""The field of plain text files that holds the name of the folder in which a file is."""
_CHUNK = 1 << 20
"""Bytes, or characters, of a file that are read at once."""
_ROWS = 4096
"""Rows of a Parquet file that are in memory together."""
_TABBED = (".tsv", ".tab")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How to turn files into documents. `read` is the only entry point; the rest is one method per format."""

    format: Literal["auto"] | Format
    records: Records
    """Turns rows into documents; its `rejects` collect all errors."""
    encoding: str = DEFAULT_ENCODING
    """Of text without a byte order mark."""
    separator: str = ""
    table: TableFormat = TableFormat()
    query: str = ""

    def read(self, path: Path, name: str, folder: str = "") -> Iterator[Document]:
        """The documents of the file at `path`, in its order, none of them empty.

        `name` begins each document's id, and `folder` is the name of the folder in which it is. Raises `UserError` for a file
        that cannot be opened or is damaged, and for a faulty document if `rejects` is set to stop.
        """
        form = format_of(path) if self.format == "auto" else self.format
        readers: dict[str, Callable[[Path, str], Iterator[Document]]] = {
            "text": lambda path, name: self._text(path, name, folder),
            "python": self._python,
            "json": self._json,
            "jsonl": self._jsonl,
            "csv": self._csv,
            "parquet": self._parquet,
            "sqlite": self._sqlite,
            "conll": self._conll,
        }
        check_file(path)
        if self.format == "auto" and form == "text":
            check_is_text(path)
        with reading(path):
            for document in readers[form](path, name):
                if document.text:
                    yield document

    def _text(self, path: Path, name: str, folder: str) -> Iterator[Document]:
        separator = unix_lines(self.separator)
        # A separator with a line end is the same one in a file with Windows line ends.
        newline: Literal[""] | None = None if "\n" in separator else ""
        is_record = len(self.records.fields.by_setting()) > 1
        line = 1
        with open_text(path, self.encoding, newline=newline, plain=self.format == "auto") as stream:
            for number, text in enumerate(_split(stream, separator)):
                id = f"{name}#{number}" if separator else name
                if fault := invalid_bytes(text):
                    below, column, what = fault
                    self.records.rejects.add(f"{path}:{line + below - 1}", not_valid(stream, column, what))
                elif text and not is_record:
                    yield Document(id, text)
                elif text:
                    row = {self.records.fields.text: text, FOLDER: folder}
                    if document := self.records.document(row, id, f"{path}:{line}"):
                        yield document
                line += unix_lines(text).count("\n") + separator.count("\n")

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
        with open_text(path, self.encoding) as stream:
            for line, data in enumerate(stream, start=1):
                if data.isspace():
                    continue
                place = f"{path}:{line}"
                try:
                    row = json.loads(data)
                except (ValueError, RecursionError) as error:
                    at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                    self.records.rejects.add(place, f"malformed JSON ({reason}{at}): {shown(data.strip())}")
                    continue
                if not isinstance(row, dict):
                    self.records.rejects.add(place, f"expected a JSON object, got {kind_of(row)}")
                elif document := self.records.document(row, f"{name}:{line}", place):
                    yield document

    def _json(self, path: Path, name: str) -> Iterator[Document]:
        """A list of objects; or, as many .json files are, one object per line."""
        with open_text(path, self.encoding) as stream:
            items = json_items(stream)
            if items is None:
                yield from self._jsonl(path, name)
                return
            for number, (line, row) in enumerate(items, start=1):
                place = f"{path}:{line}"
                if isinstance(row, str):
                    self.records.rejects.add(place, row)
                elif document := self.records.document(row, f"{name}:{number}", place):
                    yield document

    def _csv(self, path: Path, name: str) -> Iterator[Document]:
        tabbed = suffix_of(path) in _TABBED
        table = dataclasses.replace(self.table, delimiter=self.table.delimiter or "\t" * tabbed)
        header: list[str] | None = None
        with open_text(path, self.encoding) as stream:
            for line, row in table.rows(stream, self.records.fields, f"{path}:1"):
                place = f"{path}:{line}"
                if isinstance(row, str):
                    self.records.rejects.add(place, row)
                elif header is None:
                    header = row
                    self._check_columns(header, place)
                elif document := self.records.document(
                    dict(zip(header, row, strict=True)), f"{name}:{line}", place
                ):  # fmt: skip
                    yield document

    def _check_columns(self, header: list[str], place: str) -> None:
        try:
            self.records.columns(header, place)
        except UserError as error:
            if self.table.columns:
                raise
            raise UserError(
                f"{error}; if this is a row, and the file has no header, name its columns in columns"
            ) from None

    def _parquet(self, path: Path, name: str) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # In memory that does not grow with the file, or with its row groups.
            with pq.ParquetFile(path, buffer_size=_CHUNK) as file:
                columns = self.records.columns(file.schema_arrow.names, str(path))
                number = 0
                for batch in file.iter_batches(_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        record = self.records.of_arrow(row)
                        if document := self.records.document(record, f"{name}:{number}", f"{path}:{number}"):
                            yield document
        except pa.ArrowException as error:
            raise UserError(f"{path}: not a readable Parquet file ({first_line(error)}); make it again") from error

    def _conll(self, path: Path, name: str) -> Iterator[Document]:
        with open_text(path, self.encoding) as stream:
            for line, row in conll_texts(stream):
                place = f"{path}:{line}"
                if isinstance(row, str):
                    self.records.rejects.add(place, row)
                elif document := self.records.document(row, f"{name}:{line}", place):
                    yield document

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


def _split(stream: TextIO, separator: str) -> Iterator[str]:
    """The pieces of a stream between separators, never holding more than one piece and one chunk in memory."""
    if not separator:
        yield stream.read()
        return
    rest = ""
    while chunk := stream.read(_CHUNK):
        *pieces, rest = (rest + chunk).split(separator)
        yield from pieces
    yield rest
