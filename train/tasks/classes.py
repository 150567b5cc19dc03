"""Classes and numbers of documents, and choices: predictions and metrics, by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.records import Document
from train.data.rows import TaskRows
from train.tasks.report import ClassScores, class_table, draw_classes, draw_confusion
from train.tasks.task import Prediction, Rows, Task, softmax, with_gold


class Classification(Task):
    """The class of a document, or the number of a choice."""

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows
    ) -> list[Prediction]:
        found = []
        for index, likely_C in zip(indices, softmax(rows["logits"]), strict=True):
            document = documents[examples.documents[index]]
            scores = {name: round(float(part), 6) for name, part in zip(self.labels, likely_C, strict=True)}
            told = {"id": document.id, "label": self.labels[int(likely_C.argmax())], "scores": scores}
            found.append(with_gold(told, document.label))
        return found

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Accuracy, the mean of the classes' F1 (of those that occur), and Matthews' correlation coefficient."""
        from sklearn.metrics import accuracy_score, f1_score

        gold, told = _both(predictions)
        return {
            "accuracy": float(accuracy_score(gold, told)),
            "f1": float(f1_score(gold, told, average="macro", zero_division=0)),
            "matthews": _matthews(gold, told),
        }

    def report(self, predictions: Sequence[Prediction], directory: Path) -> list[str]:
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        gold, told = _both(predictions)
        scored = precision_recall_fscore_support(gold, told, labels=list(self.labels), zero_division=0)
        classes = [
            ClassScores(name, float(precision), float(recall), float(f1), int(count))
            for name, precision, recall, f1, count in zip(self.labels, *scored, strict=True)
        ]
        draw_confusion(confusion_matrix(gold, told, labels=list(self.labels)), self.labels, directory / "confusion.png")
        draw_classes(classes, directory / "classes.png")
        return [class_table(classes), f"pictures: {directory / 'confusion.png'}, {directory / 'classes.png'}"]


class Choice(Classification):
    """The number of the choice that goes on behind a text."""

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        return {"accuracy": super().metrics(predictions)["accuracy"]}

    def report(self, predictions: Sequence[Prediction], directory: Path) -> list[str]:
        return []


class Regression(Task):
    """The number of a document."""

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows
    ) -> list[Prediction]:
        found = []
        for index, value in zip(indices, rows["values"], strict=True):
            document = documents[examples.documents[index]]
            found.append(with_gold({"id": document.id, "label": float(value)}, document.label))
        return found

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Pearson's and Spearman's correlation (0 where all numbers are equal, of which none is told), and the mean squared
        error."""
        from scipy.stats import pearsonr, spearmanr

        gold, told = (np.array([one[name] for one in predictions], np.float64) for name in ("gold", "label"))
        constant = len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(told) == 0
        return {
            "pearson": 0.0 if constant else float(pearsonr(gold, told).statistic),
            "spearman": 0.0 if constant else float(spearmanr(gold, told).statistic),
            "mse": float(np.mean(np.square(gold - told))),
        }


def _both(predictions: Sequence[Prediction]) -> tuple[list[str], list[str]]:
    return [one["gold"] for one in predictions], [one["label"] for one in predictions]


def _matthews(gold: list[str], told: list[str]) -> float:
    from sklearn.metrics import matthews_corrcoef

    # Of a single class there is none to tell apart; the library says 0 too, with a warning.
    return float(matthews_corrcoef(gold, told)) if len({*gold, *told}) > 1 else 0.0
