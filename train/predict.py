"""`manyheads predict`: what an encoder that was fine-tuned on a task tells of new documents."""

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
from train.data.cache import check_place
from train.data.examples import task_rows
from train.data.objective_config import LABELLED, Kind
from train.data.readers import Format, Reader, format_of
from train.data.records import Document, Rejects
from train.data.rows import text_sizes
from train.data.source import SourceConfig
from train.data.store import TokenArray
from train.data.tokenise import encode_documents
from train.data.tokenizer import Tokenizer
from train.mesh import use_mesh
from train.run_files import LoadedRun, load_run
from train.tasks.evaluation import TaskEvaluation, make_task, write_predictions
from train.tasks.step import make_task_step
from train.tasks.task import Prediction
from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.models.families import make_model

_USES = {"seq2seq": "manyheads translate", "causal": "manyheads generate", "prefix": "manyheads generate"}
"""What there is for a run of another objective."""
_OF_HEADS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "classification": ("classification", {}),
    "tokens": ("token_classification", {"label_field": "tags", "label_kind": "tags"}),
    "answer": (
        "answer",
        {"text_field": "question", "target_field": "context", "label_field": "answers", "label_kind": "answers"},
    ),
}
"""What an import with a head tells, and the fields of its documents."""
_LONGEST = 512
"""Tokens of the longest row of an import, whose attention may reach much further."""
_LENGTHS = 64
"""Tokens of which a row has a multiple where all documents are short."""


def predict(run: Path, file: str, out: Path | None = None, step: str = "latest") -> None:
    """Write what the model tells of each document of a file, as JSON, one a line: its id, label and scores.

    Args:
        file: a text a line (.txt), or records with the fields of the run's source (.jsonl, .csv, .parquet, .conll); `-`: standard
            input, a text a line, or JSON where a document has several fields.
        out: where to write; None: standard output.

    Raises:
        UserError: no such run or checkpoint, one of another objective, or a file that cannot be read or written.
    """
    if out is not None:
        check_place(out)
    loaded = load_run(run, step)
    if loaded.config.objective.kind == "none":
        loaded = dataclasses.replace(loaded, config=_as_task(loaded.config))
    kind = loaded.config.objective.kind
    if kind not in LABELLED:
        use = f"{_USES[kind]} {run}" if kind in _USES else "a run that was fine-tuned on a task"
        raise UserError(
            f"{run}: objective {kind} tells nothing of documents; predict is for {', '.join(LABELLED)}. Use {use}"
        )
    documents = read_documents(loaded.config.data.sources[0], file)
    found = predictions(loaded, documents, file)
    if out is not None:
        write_predictions(found, out)
        print(f"{len(found)} predictions: {out}")
        return
    for one in found:
        print(json.dumps(one, ensure_ascii=False))


def read_documents(source: SourceConfig, file: str) -> list[Document]:
    """The documents of a file, without labels; of a text file, the lines that are not blank.

    Raises `UserError` for what cannot be read, a record with an empty text, and where there is none.
    """
    # Words are the words of a text as well as a list of them.
    is_text = format_of(Path(file)) == "text" if file != "-" else not source.fields.target and not source.fields.choices
    records = dataclasses.replace(source, on_error="stop").records(Rejects(advice=""))
    fields = records.fields._replace(label="", group="")
    # What is told of documents, or their vectors, comes in the order of the file: none is passed over.
    records = dataclasses.replace(records, fields=fields, labels=(), needs_text=True)
    if is_text and len(records.fields.by_setting()) > 1:
        names = ", ".join(field for _, field in records.fields.by_setting())
        raise UserError(
            f"{file}: a document of this run has the fields {names}; give a .jsonl or .csv file that has them"
        )
    form: Format = "text" if is_text else "jsonl" if file == "-" else format_of(Path(file))
    reader = Reader(format=form, records=records, separator="\n" if is_text else "")
    with tempfile.TemporaryDirectory() as folder:
        path, name = Path(file), Path(file).name
        if file == "-":
            path, name = Path(folder, "stdin"), "stdin"
            path.write_bytes(sys.stdin.buffer.read())
        documents = [document for document in reader.read(path, name) if document.text.strip()]
    if not documents:
        raise UserError(f"{file}: there is no document in it")
    if is_text and source.label_kind == "tags":
        return [document._replace(words=tuple(document.text.split())) for document in documents]
    return documents


def predictions(loaded: LoadedRun, documents: Sequence[Document], name: str) -> list[Prediction]:
    """What the model tells of each document, in their order; what is too long is cut, and said."""
    config = loaded.config
    objective = dataclasses.replace(config.objective, too_long="truncate")
    array = array_of(documents, loaded.tokenizer, name)
    if objective.kind == "choice" and array.others != objective.num_choices:
        raise UserError(
            f"{name}: its documents have {array.others} choices; the model was trained on {objective.num_choices}"
        )
    length = min(config.sequence_length, _row_length(array, loaded.tokenizer))
    examples = task_rows(array, loaded.tokenizer, length, objective, shown=True)
    graphdef = graphdef_of(functools.partial(make_model, config.model))
    parts = []
    with use_mesh(loaded.mesh, loaded.config.mesh.rules):
        step = make_task_step(graphdef, objective)
        for batch in _batches(len(examples), config.batch_size):
            rows = examples.gather(np.maximum(batch, 0)) | {"example": batch.astype(np.int32)}
            parts.append(jax.device_get(step(loaded.params, jax.tree.map(jnp.asarray, rows))[1]))
    task = make_task(objective, loaded.tokenizer, loaded.labels)
    return TaskEvaluation(task, [(examples, documents)]).predictions(parts)


def _as_task(config: RunConfig) -> RunConfig:
    """The config of an import with the task that its head is for; any other as it is."""
    kind, fields = _OF_HEADS.get(getattr(config.model, "head", ""), (None, {}))
    if kind is None:
        return config
    if kind == "classification" and getattr(config.model, "num_labels", 2) == 1:
        kind = "regression"
    source = SourceConfig(kind="files", path="*.jsonl", **fields)
    return dataclasses.replace(
        config,
        length=min(config.model.max_length, _LONGEST),
        objective=dataclasses.replace(config.objective, kind=kind),
        data=dataclasses.replace(config.data, sources=(source,)),
    )


def _row_length(array: TokenArray, tokenizer: Tokenizer) -> int:
    """What a row takes that holds any of the documents whole."""
    longest = sum(int(text_sizes(side).max()) for side in (array, array.target) if side is not None)
    return -(-(longest + 2 + tokenizer.separators) // _LENGTHS) * _LENGTHS


def array_of(documents: Sequence[Document], tokenizer: Tokenizer, name: str) -> TokenArray:
    """The documents as tokens, in memory. Raises `UserError` where they have unlike numbers of choices."""
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
    """The numbers below `count` in batches of one size, -1 behind the last."""
    for first in range(0, count, size):
        numbers = np.arange(first, first + size)
        yield np.where(numbers < count, numbers, -1)
