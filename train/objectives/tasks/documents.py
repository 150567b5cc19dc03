"""The held-out documents of a task: from outputs of the evaluation step to predictions, metrics and a report."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from train.data.examples.rows import TaskRows
from train.data.prepared.store import Prepared
from train.data.sources.records import Document
from train.files import whole_file, writing
from train.objectives.tasks.task import Labelling, Prediction, Rows, Task


class TaskDocuments:
    """A task with the documents whose labels it predicts.

    Args:
        sources: the examples of each array of documents, whose ids continue from one array to the next, and the documents.
    """

    def __init__(self, task: Task, names: Labelling, sources: Sequence[tuple[TaskRows, Sequence[Document]]]) -> None:
        self._task, self._names, self._sources = task, names, sources
        self._first_id = np.cumsum([0, *(len(examples) for examples, _ in sources)])

    @classmethod
    def held_out(cls, task: Task, prepared: Prepared, length: int) -> TaskDocuments:
        """The held-out documents, in rows of `length` tokens, numbered as in evaluation batches."""
        sources = [
            (task.rows(array, prepared.tokenizer, length), prepared.held_out(array)) for array in prepared.validation
        ]
        return cls(task, Labelling(prepared.tokenizer, prepared.meta.labels), sources)

    def predictions(self, parts: Sequence[Rows]) -> list[Prediction]:
        """The predictions for documents whose examples are in `parts`, the outputs of batches; rows of padding are skipped."""
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        # In the order of the documents, whatever that of the batches was.
        order = np.argsort(rows["example"], kind="stable")
        rows = {name: values[order] for name, values in rows.items()}
        ids = rows.pop("example")
        found = []
        for number, (examples, documents) in enumerate(self._sources):
            is_own = (ids >= self._first_id[number]) & (ids < self._first_id[number + 1])
            own = {name: values[is_own] for name, values in rows.items()}
            if is_own.any():
                found += self._task.predictions(
                    examples, documents, ids[is_own] - self._first_id[number], own, self._names
                )
        return found

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """The task's metrics; empty without predictions."""
        return self._task.scores(predictions, self._names.labels) if predictions else {}

    def finish(self, predictions: Sequence[Prediction], directory: Path) -> list[str]:
        """Write the predictions and the pictures into a run's folder, and return the lines to print.

        Raises `UserError` if they cannot be written.
        """
        if not predictions:
            return []
        path = directory / "predictions.jsonl"
        write_predictions(predictions, path)
        lines = self._task.describe(predictions, self._names.labels, directory)
        return [*lines, f"{len(predictions)} predictions: {path}"]


def write_predictions(predictions: Iterable[Prediction], path: Path) -> int:
    """Write one prediction per line, as they come; the file is whole, or there is none. How many there are.

    Raises `UserError` if the file cannot be written, and whatever `predictions` raises.
    """
    path = path.resolve()  # a link stays a link
    count = 0
    with writing(path):
        # What is no file on a disk, such as a pipe, cannot be replaced by one.
        place = contextlib.nullcontext(path) if path.exists() and not path.is_file() else whole_file(path)
        with place as partial, partial.open("w", encoding="utf-8") as stream:
            for one in predictions:
                stream.write(f"{json.dumps(one, ensure_ascii=False)}\n")
                count += 1
    return count
