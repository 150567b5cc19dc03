"""`manyheads predict`: predicts labels of new documents with an encoder that was fine-tuned on a task."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from train.config import RunConfig
from train.data.examples.pack import with_lengths
from train.data.examples.rows import LongTexts, text_sizes
from train.data.prepared.store import TokenArray
from train.data.sources.new_documents import new_documents
from train.data.sources.records import Document
from train.data.sources.source_config import FilesSource, RecordSource, SourceConfig
from train.data.tokenization.tokenise import batches, encode_documents
from train.data.tokenization.tokenizer import Tokenizer
from train.files import check_place
from train.objectives import OBJECTIVES, MultiLabelClassification, Task
from train.objectives.tasks.documents import TaskDocuments, write_predictions
from train.objectives.tasks.task import Labelling, Prediction
from train.parallel.mesh import use_mesh
from train.program.step import make_eval_step
from train.report.display import console
from train.run.run_files import LoadedRun, load_run
from train.text_files import DEFAULT_ENCODING
from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.models.families import make_model

_TASKS: list[Any] = [one for one in OBJECTIVES.values() if issubclass(one, Task)]
_LONGEST = 512
"""Tokens of the longest row of an import; its context may be much longer."""
_SHORTEST_ROW = 64
"""Tokens of the shortest rows; longer documents have rows of twice as many, and so on."""
CHUNK = 4096
"""Documents that are in memory together, rounded down to whole batches."""
CHUNK_CHARACTERS = 1 << 22
"""Characters of text after which there are fewer."""


def predict(
    run: Path, file: str, out: Path | None = None, step: str = "best", encoding: str = DEFAULT_ENCODING, *,
    threshold: float | None = None,
) -> None:  # fmt: skip
    """Write the model's prediction for each document of a file, as one JSON line: its id, label and scores.

    A blank line of a text file has the label null.

    Args:
        file: one text per line (.txt), or records with the fields of the run's source (.jsonl, .csv, .parquet, .conll); `-`:
            standard input, with one text per line, or JSON lines if a document has several fields.
        out: where to write; None: standard output.
        encoding: of a file without a byte order mark.
        threshold: of multi-label classification: the probability from which on a class is predicted; the run's by default.

    Raises:
        UserError: no such run or checkpoint, a run with another objective, a threshold that is out of range or that the task does
            not have, or a file that cannot be read or written.
    """
    if out is not None:
        check_place(out)
    loaded, task, source = as_task_run(load_run(run, step), str(run))
    if not isinstance(source, RecordSource):
        raise UserError(f"{run}: its documents are synthetic (source {source.kind}), so no fields of a file match them")
    task = with_threshold(task, threshold)
    found = iter_predictions(loaded, task, new_documents(source, file, encoding), file)
    if out is None:
        for one in found:
            print(json.dumps(one, ensure_ascii=False))
        return
    with counting("predicting") as advance:
        count = write_predictions(_advancing(found, advance), out)
    print(f"{count} predictions: {out}")


def with_threshold(task: Task, threshold: float | None) -> Task:
    """The task with another threshold, if one is given. Raises `UserError` for a task that has none, and one out of range."""
    if threshold is None:
        return task
    if not isinstance(task, MultiLabelClassification):
        raise UserError(
            f"threshold: got {threshold:g}; only multi_label_classification has one, and this is {task.kind}"
        )
    return dataclasses.replace(task, threshold=threshold)


@contextlib.contextmanager
def counting(title: str) -> Iterator[Callable[[int], None]]:
    """Yield `advance(documents)`; a terminal shows how many are done. How many there will be is not known."""
    out_to = console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(16),
        TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out_to, transient=True, disable=not out_to.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda count: progress.advance(task, count)


def _advancing(found: Iterable[Prediction], advance: Callable[[int], None]) -> Iterator[Prediction]:
    for one in found:
        yield one
        advance(1)


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


def predictions(loaded: LoadedRun, task: Task, documents: Iterable[Document], name: str) -> list[Prediction]:
    """The prediction for each document, in order; documents that are too long are cut, with a message.

    Args:
        name: what the documents are called in messages.

    Raises:
        UserError: documents with different numbers of choices, or with another number than the model's.
    """
    return list(iter_predictions(loaded, task, documents, name))


def iter_predictions(loaded: LoadedRun, task: Task, documents: Iterable[Document], name: str) -> Iterator[Prediction]:
    """As `predictions`, in bounded memory: documents are taken as their predictions are asked for, some thousands at a time.

    A document without text has the label None.
    """
    config, task = loaded.config, task.for_any_document()
    if task.label_kind == "tags":
        # The words of a plain text are separated by white space.
        documents = (one if one.words else one._replace(words=tuple(one.text.split())) for one in documents)
    step = make_eval_step(graphdef_of(functools.partial(make_model, config.model)), task)
    names = Labelling(loaded.tokenizer, loaded.labels)
    # Whole batches, so that only the last one is padded.
    most = max(1, CHUNK // config.batch_size) * config.batch_size
    too_long = LongTexts(0, 0)
    for given in batches(_with_as_many_choices(documents), most, CHUNK_CHARACTERS):
        chunk = [one for one in given if not _is_blank(one)]
        if not chunk:
            yield from map(_no_prediction, given)
            continue
        array = array_of(chunk, loaded.tokenizer, name)
        length = min(config.sequence_length, _row_length(array, loaded.tokenizer))
        examples = task.rows(array, loaded.tokenizer, length)
        too_long += examples.too_long
        parts = []
        with use_mesh(loaded.mesh, loaded.config.mesh.rules):
            for batch in _batches(len(examples), config.batch_size):
                rows = with_lengths(examples.gather(np.maximum(batch, 0)), 1) | {"example": batch.astype(np.int32)}
                parts.append(jax.device_get(step(loaded.params, jax.tree.map(jnp.asarray, rows))[1]))
        found = iter(TaskDocuments(task, names, [(examples, chunk)]).predictions(parts))
        yield from (_no_prediction(one) if _is_blank(one) else next(found) for one in given)
    too_long.say(name)


def _is_blank(document: Document) -> bool:
    return not (document.text.strip() or document.words or document.target or document.choices)


def _no_prediction(document: Document) -> Prediction:
    return {"id": document.id, "label": None}


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
    """The length of a row that holds any of the documents whole, one of few: each is a program to compile."""
    first, second = (0 if side is None else int(text_sizes(side).max()) for side in (array, array.target))
    # A question may take half of its row. What is cut from it must not depend on the documents next to it.
    longest = first + max(first, second) if array.target is not None else first
    return max(_SHORTEST_ROW, 1 << (longest + 1 + tokenizer.separators).bit_length())


def _with_as_many_choices(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents. Raises `UserError` for one with another number of choices than the first."""
    choices = None
    for document in documents:
        choices = len(document.choices) if choices is None else choices
        if len(document.choices) != choices:
            raise UserError(f"{document.id}: {len(document.choices)} choices, where others have {choices}")
        yield document


def array_of(documents: Sequence[Document], tokenizer: Tokenizer, name: str) -> TokenArray:
    """The documents, which have the same number of choices, as tokens, in memory."""
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
