"""Classification of a document, or of a pair (Devlin et al. 2018, section 4.1).

Axes: B rows, T positions, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np

from train.data.examples.labelled import LabelledDocuments, commonest_share
from train.data.examples.rows import TaskRows, TooLong
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.sources.records import Document
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import DEFAULT_LOSS, Batch, LossConfig, LossSums, of_rows, with_added_loss
from train.objectives.objective import BatchShapes, Outputs, label_shape
from train.objectives.tasks.classes import WeightedClasses
from train.objectives.tasks.report import ClassScores, class_table, draw_classes, draw_confusion
from train.objectives.tasks.task import Labelling, Prediction, Rows, forward, softmax, with_gold
from transformer.errors import UserError, require
from transformer.models.bert import BertConfig
from transformer.models.families import ModelConfig
from transformer.models.heads import CLASSES, ClassificationHeadConfig, DecomposableHeadConfig
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class Classification(WeightedClasses):
    """Predicts the class of a document, or of a pair."""

    kind: Literal["classification"] = "classification"
    too_long: TooLong = "drop"
    """What happens to a document longer than a row: it is left out, or cut. The number of such documents is reported."""

    heads = ("classification", "structured", "decomposable")
    label_kind = "class"
    metrics = ("accuracy", "f1", "matthews")
    document_fields = ()

    def check_model(self, model: ModelConfig) -> None:
        super().check_model(model)
        if isinstance(model, BertConfig) and isinstance(model.head, CLASSES):
            allowed = "allowed: 2 or more classes; for numbers objective.kind: regression"
            require(model.head, "num_labels", model.head.classes >= 2, allowed)
            if isinstance(model.head, ClassificationHeadConfig):
                one = "allowed with objective 'classification', which predicts one class: false"
                require(model.head, "multi_label", not model.head.multi_label, one)

    def check_classes(self, prepared: Prepared, model: ModelConfig) -> None:
        super().check_classes(prepared, model)
        if isinstance(model, BertConfig) and isinstance(model.head, DecomposableHeadConfig) and not prepared.pairs:
            raise UserError(
                "model.head.kind: got 'decomposable', which compares two texts, but the sources give single ones; set their "
                "target_field"
            )

    def for_any_document(self) -> Self:
        return dataclasses.replace(self, too_long="truncate")

    def rows(self, array: TokenArray, tokenizer: Tokenizer, length: int, *, shown: bool = False) -> TaskRows:
        return LabelledDocuments(array, tokenizer, length, self.too_long, shown=shown)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        return super().batch(rows, length, data) | label_shape(rows)

    def outputs(
        self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None
    ) -> tuple[LossSums, Outputs]:
        """The cross-entropy, weighted by class, and `logits` [B, C]."""
        return self._outputs(model, batch, config, self.weights, key)

    def evaluate(self, model: Any, batch: Batch, config: LossConfig = DEFAULT_LOSS) -> tuple[LossSums, Outputs]:
        return self._outputs(model, batch, config.plain(), None, None)

    def _outputs(
        self, model: Any, batch: Batch, config: LossConfig, weights: Sequence[float] | None, key: Keys | None
    ) -> tuple[LossSums, Outputs]:
        output = forward(model, batch, key)
        with jax.named_scope("loss"):
            sums = of_rows(output.logits, batch["labels"], batch["weights"], config, weights)
        return with_added_loss(sums, output), {"logits": output.logits}

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows, names: Labelling
    ) -> list[Prediction]:
        return class_predictions(examples, documents, indices, rows, names)

    def scores(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, float]:
        """Accuracy, the mean of the classes' F1 (of those that occur), and Matthews' correlation coefficient."""
        from sklearn.metrics import accuracy_score, f1_score

        gold, predicted = both(predictions)
        return {
            "accuracy": float(accuracy_score(gold, predicted)),
            "f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
            "matthews": _matthews(gold, predicted),
        }

    def describe(self, predictions: Sequence[Prediction], labels: Sequence[str], directory: Path) -> list[str]:
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        gold, predicted = both(predictions)
        scored = precision_recall_fscore_support(gold, predicted, labels=list(labels), zero_division=0)
        classes = [
            ClassScores(name, float(precision), float(recall), float(f1), int(count))
            for name, precision, recall, f1, count in zip(labels, *scored, strict=True)
        ]
        draw_confusion(confusion_matrix(gold, predicted, labels=list(labels)), labels, directory / "confusion.png")
        draw_classes(classes, directory / "classes.png")
        return [class_table(classes), f"pictures: {directory / 'confusion.png'}, {directory / 'classes.png'}"]

    def baseline(self, validation: Sequence[TokenArray]) -> str:
        share = commonest_share(validation)
        return "" if share is None else f" (the commonest class: {share:.2%})"


def class_predictions(
    examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows, names: Labelling
) -> list[Prediction]:
    """The likeliest class of each document, by `logits` [N, C], and the probability of each."""
    found = []
    for index, likely_C in zip(indices, softmax(rows["logits"]), strict=True):
        document = documents[examples.documents[index]]
        scores = {name: round(float(part), 6) for name, part in zip(names.labels, likely_C, strict=True)}
        prediction = {"id": document.id, "label": names.labels[int(likely_C.argmax())], "scores": scores}
        found.append(with_gold(prediction, document.label))
    return found


def both(predictions: Sequence[Prediction]) -> tuple[list[str], list[str]]:
    """The gold labels and the predicted ones."""
    return [one["gold"] for one in predictions], [one["label"] for one in predictions]


def _matthews(gold: list[str], predicted: list[str]) -> float:
    from sklearn.metrics import matthews_corrcoef

    # With a single class it is undefined; the library also gives 0, with a warning.
    return float(matthews_corrcoef(gold, predicted)) if len({*gold, *predicted}) > 1 else 0.0
