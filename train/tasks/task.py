"""What is made of the outputs of a task: predictions, document by document, and the metrics of those."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.objective_config import ObjectiveConfig
from train.data.records import Document
from train.data.rows import TaskRows
from train.data.tokenizer import Tokenizer

Prediction = dict[str, Any]
"""What is told of a document, as JSON: `id`, `label`, `scores`; and `gold`, where the document has a label."""

Rows = dict[str, np.ndarray]
"""What a model told of some examples, [N, ...] by name."""


class Task(abc.ABC):
    """A task of labelled documents.

    Args:
        labels: the names of the classes, or tags, by their numbers.
    """

    def __init__(self, objective: ObjectiveConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        self.objective, self.tokenizer, self.labels = objective, tokenizer, tuple(labels)

    @abc.abstractmethod
    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows
    ) -> list[Prediction]:
        """Of each document that the examples `indices` [N] are about, whose outputs are `rows`.

        Args:
            examples: of an array of `documents`.
        """

    @abc.abstractmethod
    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """The metrics of `train.selection.METRICS`, of predictions that have `gold`; there is at least one."""

    def report(self, predictions: Sequence[Prediction], directory: Path) -> list[str]:
        """Lines for people, at the end of a run; pictures go into `directory`."""
        return []


def with_gold(prediction: Prediction, gold: Any) -> Prediction:
    """The prediction with the document's label, where it has one."""
    return prediction if gold is None else prediction | {"gold": gold}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last dim, in float64."""
    shifted = np.exp(np.asarray(logits, np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
