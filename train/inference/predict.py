"""`manyheads predict`: predicts labels of new documents with an encoder that was fine-tuned on a task."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.config import RunConfig
from train.data.examples.rows import text_sizes
from train.data.prepared.store import TokenArray
from train.data.sources.readers import Reader, format_of
from train.data.sources.records import Document, Rejects
from train.data.sources.source_config import FilesSource, RecordSource, SourceConfig
from train.data.tokenization.tokenise import encode_documents
from train.data.tokenization.tokenizer import Tokenizer
from train.files import check_place
from train.objectives import OBJECTIVES, Task
from train.objectives.tasks.documents import TaskDocuments, write_predictions
from train.objectives.tasks.task import Labelling, Prediction
from train.parallel.mesh import use_mesh
from train.run.run_files import LoadedRun, load_run
from train.run.step import make_eval_step
from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.models.families import make_model

_TASKS: list[Any] = [one for one in OBJECTIVES.values() if issubclass(one, Task)]
_LONGEST = 512
"""Tokens of the longest row of an import; its context may be much longer."""
_LENGTHS = 64
"""Row lengths are rounded up to a multiple of this many tokens if all documents are short."""


def predict(run: Path, file: str, out: Path | None = None, step: str = "best") -> None:
    """Write the model's prediction for each document of a file, as one JSON line: its id, label and scores.

    Args:
        file: one text per line (.txt), or records with the fields of the run's source (.jsonl, .csv, .parquet, .conll); `-`:
            standard input, with one text per line, or JSON lines if a document has several fields.
        out: where to write; None: standard output.

    Raises:
        UserError: no such run or checkpoint, a run with another objective, or a file that cannot be read or written.
    """
    if out is not None:
        check_place(out)
    loaded, task, source = as_task_run(load_run(run, step), str(run))
    if not isinstance(source, RecordSource):
        raise UserError(f"{run}: its documents are synthetic (source {source.kind}), so no fields of a file match them")
    documents = read_documents(source, file)
    found = predictions(loaded, task, documents, file)
    if out is not None:
        write_predictions(found, out)
        print(f"{len(found)} predictions: {out}")
        return
    for one in found:
        print(json.dumps(one, ensure_ascii=False))


def as_task_run(loaded: LoadedRun, name: str) -> tuple[LoadedRun, Task, SourceConfig]:
    """The run with its task, and the source that describes its documents; an import has the task of its head.

    Raises:
        UserError: another objective.
    """
    if loaded.config.objective.kind == "none":
        loaded = dataclasses.replace(loaded, config=_as_task(loaded.config))
    task = loaded.config.objective
    if not isinstance(task, Task):
        use = "a run that was fine-tuned on a task" if task.use is None else task.use[1].format(name)
        kinds = ", ".join(one.kind_name() for one in _TASKS)
        if task.kind == "none":
            raise UserError(
                f"{name}: the imported model has no head that predicts labels; fine-tune it on a task ({kinds}) first, by a "
                f"config with init_from: {name}"
            )
        raise UserError(f"{name}: predict needs a run with a task ({kinds}); its objective is {task.kind}. Use {use}")
    return loaded, task, loaded.config.data.sources[0]


def read_documents(source: RecordSource, file: str) -> list[Document]:
    """The documents of a file, without labels; in a text file, the lines that are not blank.

    Raises `UserError` for an unreadable file, a record with an empty text, and a file without documents.
    """
    # Words may be given as a text or as a list.
    is_text = format_of(Path(file)) == "text" if file != "-" else not source.fields.target and not source.fields.choices
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
        format="auto" if file != "-" else "text" if is_text else "jsonl",
        records=records,
        separator="\n" if is_text else "",
    )
    with tempfile.TemporaryDirectory() as folder:
        path, name = Path(file), Path(file).name
        if file == "-":
            path, name = Path(folder, "stdin"), "stdin"
            path.write_bytes(sys.stdin.buffer.read())
        documents = [document for document in reader.read(path, name) if document.text.strip()]
    if not documents:
        raise UserError(f"{file}: it has no documents")
    if is_text:
        # Named by their lines, as records are.
        documents = [one._replace(id=f"{name}:{int(one.id.rpartition('#')[2]) + 1}") for one in documents]
    return documents


def predictions(loaded: LoadedRun, task: Task, documents: Sequence[Document], name: str) -> list[Prediction]:
    """The prediction for each document, in order; documents that are too long are cut, with a message."""
    config, task = loaded.config, task.for_any_document()
    if task.label_kind == "tags":
        # The words of a plain text are separated by white space.
        documents = [one if one.words else one._replace(words=tuple(one.text.split())) for one in documents]
    array = array_of(documents, loaded.tokenizer, name)
    length = min(config.sequence_length, _row_length(array, loaded.tokenizer))
    examples = task.rows(array, loaded.tokenizer, length, shown=True)
    graphdef = graphdef_of(functools.partial(make_model, config.model))
    parts = []
    with use_mesh(loaded.mesh, loaded.config.mesh.rules):
        step = make_eval_step(graphdef, task)
        for batch in _batches(len(examples), config.batch_size):
            rows = examples.gather(np.maximum(batch, 0)) | {"example": batch.astype(np.int32)}
            parts.append(jax.device_get(step(loaded.params, jax.tree.map(jnp.asarray, rows))[1]))
    names = Labelling(loaded.tokenizer, loaded.labels)
    return TaskDocuments(task, names, [(examples, documents)]).predictions(parts)


def _as_task(config: RunConfig) -> RunConfig:
    """The config of an import with the task of its head; any other config unchanged."""
    for task in (one() for one in _TASKS):
        if task.document_fields is not None and task.suits(config.model):
            source = FilesSource(path="*.jsonl", **dict(task.document_fields))
            return dataclasses.replace(
                config,
                length=min(config.model.max_length, _LONGEST),
                objective=task,
                data=dataclasses.replace(config.data, sources=(source,)),
            )
    return config


def _row_length(array: TokenArray, tokenizer: Tokenizer) -> int:
    """The length of a row that holds any of the documents whole."""
    longest = sum(int(text_sizes(side).max()) for side in (array, array.target) if side is not None)
    return -(-(longest + 2 + tokenizer.separators) // _LENGTHS) * _LENGTHS


def array_of(documents: Sequence[Document], tokenizer: Tokenizer, name: str) -> TokenArray:
    """The documents as tokens, in memory. Raises `UserError` if they have different numbers of choices."""
    if other := [document for document in documents if len(document.choices) != len(documents[0].choices)]:
        raise UserError(
            f"{other[0].id}: {len(other[0].choices)} choices, where others have {len(documents[0].choices)}"
        )
    found = encode_documents((tokenizer, tokenizer), list(documents))
    sides = [[one.sides[0] for one in found], [ids for one in found for ids in one.sides[1:]]]
    end = np.array([tokenizer.end_of_text], tokenizer.dtype)
    arrays = []
    for ids in sides:
        offsets = np.cumsum([1, *(len(one) + 1 for one in ids)])
        tokens = np.concatenate([end, *(part for one in ids for part in (one, end))])
        arrays.append(TokenArray(name, tokens, offsets))
    return dataclasses.replace(arrays[0], target=arrays[1]) if sides[1] else arrays[0]


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    """The numbers below `count` in batches of one size, padded with -1."""
    for first in range(0, count, size):
        numbers = np.arange(first, first + size)
        yield np.where(numbers < count, numbers, -1)
