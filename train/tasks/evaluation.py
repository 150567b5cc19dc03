"""The held-out documents of a task: from what the evaluation step gives to predictions, metrics and a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.config import RunConfig
from train.data.cache import writing
from train.data.examples import task_rows
from train.data.objective_config import ObjectiveConfig
from train.data.records import Document
from train.data.rows import TaskRows
from train.data.store import Prepared
from train.data.tokenizer import Tokenizer
from train.tasks.answers import Answering
from train.tasks.classes import Choice, Classification, Regression
from train.tasks.tags import TokenClassification
from train.tasks.task import Prediction, Rows, Task

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "token_classification": TokenClassification,
    "answer": Answering,
    "choice": Choice,
}
"""The task of each objective for labelled documents."""


def make_task(objective: ObjectiveConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Task:
    """The objective's task; `labels` are the names of its classes, or tags."""
    return TASKS[objective.kind](objective, tokenizer, labels)


class TaskEvaluation:
    """A task with the documents that it is told on.

    Args:
        sources: of each array of documents its examples, in the order in which their ids count on, and the documents.
    """

    def __init__(self, task: Task, sources: Sequence[tuple[TaskRows, Sequence[Document]]]) -> None:
        self.task, self._sources = task, sources
        self._first_id = np.cumsum([0, *(len(examples) for examples, _ in sources)])

    @classmethod
    def of_held_out(cls, config: RunConfig, prepared: Prepared) -> TaskEvaluation:
        """Of a run's held-out documents, as its evaluation batches count them."""
        task = make_task(config.objective, prepared.tokenizer, prepared.meta.labels)
        common = (prepared.tokenizer, config.sequence_length, config.objective)
        sources = [(task_rows(array, *common), prepared.held_out(array)) for array in prepared.validation]
        return cls(task, sources)

    def predictions(self, parts: Sequence[Rows]) -> list[Prediction]:
        """Of the documents whose examples are in `parts`, the outputs of some batches; rows of padding are passed over."""
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        ids = rows.pop("example")
        found = []
        for number, (examples, documents) in enumerate(self._sources):
            is_own = (ids >= self._first_id[number]) & (ids < self._first_id[number + 1])
            own = {name: values[is_own] for name, values in rows.items()}
            if is_own.any():
                found += self.task.predictions(examples, documents, ids[is_own] - self._first_id[number], own)
        return found

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """The task's metrics; none without a prediction."""
        return self.task.metrics(predictions) if predictions else {}

    def finish(self, predictions: Sequence[Prediction], directory: Path) -> list[str]:
        """Write the predictions into a run's folder, draw the pictures there, and give lines for people.

        Raises `UserError` if they cannot be written.
        """
        if not predictions:
            return []
        path = directory / "predictions.jsonl"
        write_predictions(predictions, path)
        return [*self.task.report(predictions, directory), f"{len(predictions)} predictions: {path}"]


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """One a line. Raises `UserError` if the file cannot be written."""
    with writing(path):
        path.write_text("".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in predictions), encoding="utf-8")
