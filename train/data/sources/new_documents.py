"""The documents of a file to which a trained model is applied: without labels, none left out, read as they are needed."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from train.data.sources.file_formats import check_is_text, format_of
from train.data.sources.readers import Reader
from train.data.sources.records import Document, Rejects
from train.data.sources.source_config import FileFormatSource, RecordSource
from train.data.sources.tables import TableFormat
from train.files import writing
from train.text_files import DEFAULT_ENCODING, read_lines
from transformer.errors import UserError

STANDARD_INPUT = "-"


def new_documents(source: RecordSource, file: str, encoding: str = DEFAULT_ENCODING) -> Iterator[Document]:
    """The documents of a file, in its order; of a text file its lines, those that are blank too.

    Args:
        source: names the fields of records, and what separates those of a table.
        file: a path, or `-`: standard input, which is copied to a temporary file; text if a document has one field, else JSON
            lines.
        encoding: of a file without a byte order mark.

    Raises:
        UserError: an unreadable file, a record with an empty text, or a file without documents. A fault in the middle is raised
            when it is reached.
    """
    from_input = file == STANDARD_INPUT
    # Words may be given as a text or as a list.
    is_text = not source.fields.target and not source.fields.choices if from_input else format_of(Path(file)) == "text"
    records = dataclasses.replace(source, on_error="stop").records(Rejects(advice=""))
    fields = records.fields._replace(label="", group="")
    # Predictions and vectors come in the order of the file, so no document is skipped.
    records = dataclasses.replace(records, fields=fields, labels=(), needs_text=True)
    if is_text and len(records.fields.by_setting()) > 1:
        names = ", ".join(field for _, field in records.fields.by_setting())
        raise UserError(
            f"{file}: a document of this run has the fields {names}; give a .jsonl or .csv file that has them"
        )
    if is_text:
        return _lines(file, encoding)
    reader = Reader(
        format="jsonl" if from_input else "auto", records=records, encoding=encoding,
        table=source.table if isinstance(source, FileFormatSource) else TableFormat(),
    )  # fmt: skip
    return _records(reader, file)


def file_lines(file: str, encoding: str = DEFAULT_ENCODING) -> list[str]:
    """The lines of a text file, or of standard input (`-`), blank ones too. Raises `UserError`."""
    with _on_disk(file) as (path, _):
        return list(read_lines(path, encoding, name=_shown(file)))


def _lines(file: str, encoding: str) -> Iterator[Document]:
    is_empty = True
    with _on_disk(file) as (path, name):
        if file != STANDARD_INPUT:
            check_is_text(path)
        for number, line in enumerate(read_lines(path, encoding, name=_shown(file), plain=True), start=1):
            is_empty = is_empty and not line.strip()
            yield Document(f"{name}:{number}", line)
    if is_empty:
        raise UserError(f"{file}: it has no documents")


def _records(reader: Reader, file: str) -> Iterator[Document]:
    is_empty = True
    with _on_disk(file) as (path, name):
        for document in reader.read(path, name):
            is_empty = False
            yield document
    if is_empty:
        raise UserError(f"{file}: it has no documents")


def _shown(file: str) -> str:
    return "standard input" if file == STANDARD_INPUT else file


@contextlib.contextmanager
def _on_disk(file: str) -> Iterator[tuple[Path, str]]:
    """The path to read, and the name in ids. Standard input can be larger than the memory, and a reader needs a file."""
    if file != STANDARD_INPUT:
        yield Path(file), Path(file).name
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stdin")
        with writing(path), path.open("wb") as stream:
            shutil.copyfileobj(sys.stdin.buffer, stream)
        yield path, "stdin"
