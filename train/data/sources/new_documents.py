"""The documents of a file to which a trained model is applied: without labels, none left out, read as they are needed."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from train.data.sources.readers import Reader, format_of
from train.data.sources.records import Document, Rejects
from train.data.sources.source_config import RecordSource
from train.files import writing
from transformer.errors import UserError

STANDARD_INPUT = "-"


def new_documents(source: RecordSource, file: str) -> Iterator[Document]:
    """The documents of a file, in its order; of a text file, the lines that are not blank.

    Args:
        source: names the fields of records.
        file: a path, or `-`: standard input, which is copied to a temporary file; text if a document has one field, else JSON
            lines.

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
    reader = Reader(
        format="auto" if not from_input else "text" if is_text else "jsonl",
        records=records,
        separator="\n" if is_text else "",
    )
    return _read(reader, file, is_text=is_text)


def _read(reader: Reader, file: str, *, is_text: bool) -> Iterator[Document]:
    is_empty = True
    with _on_disk(file) as (path, name):
        for document in reader.read(path, name):
            if not document.text.strip():
                continue
            is_empty = False
            # A line of text is named by its number, as records are.
            line = int(document.id.rpartition("#")[2]) + 1 if is_text else 0
            yield document._replace(id=f"{name}:{line}") if is_text else document
    if is_empty:
        raise UserError(f"{file}: it has no documents")


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
