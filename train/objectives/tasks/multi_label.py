"""Multi-label classification: which of the classes a document, or a pair, has: none, one or several.

Axes: B rows, T positions, N examples, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from train.data.examples.labelled import LabelledDocuments
from train.data.examples.rows import TaskRows, TooLong
from train.data.prepared.store import Prepared, TokenArray
from train.data.sources.records import Document
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums, of_labels, with_added_loss
from train.objectives.objective import BatchShapes, Outputs, label_shape
from train.objectives.tasks.report import ClassScores, class_table, draw_classes
from train.objectives.tasks.task import Labelling, Prediction, Rows, Task, forward, with_gold
from transformer.errors import UserError, require
from transformer.models.bert import BertConfig
from transformer.models.families import ModelConfig
from transformer.models.heads import ClassificationHeadConfig
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class MultiLabelClassification(Task):
    """Predicts which of the classes a document, or a pair, has; each class is a decision of its own."""

    kind: Literal["multi_label_classification"] = "multi_label_classification"
    threshold: float = 0.5
    """The probability from which on a class is predicted."""
    too_long: TooLong = "drop"
    """What happens to a document longer than a row: it is left out, or cut. The number of such documents is reported."""

    heads = ("classification",)
    label_kind = "classes"
    loss_settings = ()
    metrics = ("accuracy", "f1_micro", "f1_macro")
    document_fields = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "threshold", 0 < self.threshold < 1, "allowed: above 0, below 1")

    def check_model(self, model: ModelConfig) -> None:
        super().check_model(model)
        if isinstance(model, BertConfig) and isinstance(model.head, ClassificationHeadConfig):
            require(model.head, "multi_label", model.head.multi_label, f"allowed with objective {self.kind!r}: true")

    def check_classes(self, prepared: Prepared, model: ModelConfig) -> None:
        names, given = prepared.meta.labels, getattr(getattr(model, "head", None), "classes", None)
        if len(names) != given:
            raise UserError(
                f"model.head.num_labels: got {given}; the data has {len(names)} classes: {', '.join(names) or 'none'}"
            )

    def for_any_document(self) -> Self:
        return dataclasses.replace(self, too_long="truncate")

    def rows(self, array: TokenArray, tokenizer: Tokenizer, length: int, *, shown: bool = False) -> TaskRows:
        return LabelledDocuments(array, tokenizer, length, self.too_long, several=True, shown=shown)

    def model_batch(self, rows: int, model: ModelConfig) -> BatchShapes:
        return label_shape(rows, getattr(getattr(model, "head", None), "classes", 1))

    def outputs(
        self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None
    ) -> tuple[LossSums, Outputs]:
        """The mean over the classes of each decision's cross-entropy, and `logits` [B, C]."""
        output = forward(model, batch, key)
        with jax.named_scope("loss"):
            # Documents without labels have one column, of -1.
            labels_BC = jnp.broadcast_to(batch["labels"], output.logits.shape)
            least = math.log(self.threshold / (1 - self.threshold))
            sums = of_labels(output.logits, labels_BC, batch["weights"][:, 0], least=least)
        return with_added_loss(sums, output), {"logits": output.logits}

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows, names: Labelling
    ) -> list[Prediction]:
        """`label` is a list: the classes whose probability reaches the threshold, in the order of the classes."""
        found = []
        for index, logits_C in zip(indices, rows["logits"], strict=True):
            document = documents[examples.documents[index]]
            likely_C = 1 / (1 + np.exp(-np.asarray(logits_C, np.float64)))
            scores = {name: round(float(part), 6) for name, part in zip(names.labels, likely_C, strict=True)}
            chosen = [name for name, part in zip(names.labels, likely_C, strict=True) if part >= self.threshold]
            gold = None if document.label is None else list(document.label)
            found.append(with_gold({"id": document.id, "label": chosen, "scores": scores}, gold))
        return found

    def scores(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, float]:
        """The share of documents of which all classes are right (subset accuracy); the F1 of all decisions together (micro); and
        the mean of the classes' F1, of those that occur (macro)."""
        gold, predicted = (_hot(predictions, name, labels).astype(bool) for name in ("gold", "label"))
        occurs = (gold | predicted).any(0)
        f1_C = _decisions(gold, predicted)[2][occurs]
        return {
            "accuracy": float((gold == predicted).all(1).mean()),
            "f1_micro": float(_decisions(gold.reshape(-1, 1), predicted.reshape(-1, 1))[2][0]),
            "f1_macro": float(f1_C.mean()) if occurs.any() else 0.0,
        }

    def describe(self, predictions: Sequence[Prediction], labels: Sequence[str], directory: Path) -> list[str]:
        gold, predicted = (_hot(predictions, name, labels).astype(bool) for name in ("gold", "label"))
        scored = (*_decisions(gold, predicted), gold.sum(0))
        classes = [
            ClassScores(name, float(precision), float(recall), float(f1), int(count))
            for name, precision, recall, f1, count in zip(labels, *scored, strict=True)
        ]
        draw_classes(classes, directory / "classes.png")
        none = [
            f"{int((~one.any(1)).sum())} {what}" for one, what in ((gold, "have none"), (predicted, "are given none"))
        ]
        return [
            class_table(classes),
            f"of {len(predictions)} documents {' and '.join(none)} of the classes",
            f"picture: {directory / 'classes.png'}",
        ]


def _hot(predictions: Sequence[Prediction], field: str, labels: Sequence[str]) -> np.ndarray:
    """Which classes each prediction's field has, [N, C] bool."""
    return np.array([[name in set(one[field]) for name in labels] for one in predictions], bool).reshape(
        -1, len(labels)
    )


def _decisions(gold_NC: np.ndarray, predicted_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 [C] of each class; 0 where they are not defined. (sklearn takes a single class for two.)"""
    both_C, gold_C, predicted_C = (one.sum(0) for one in (gold_NC & predicted_NC, gold_NC, predicted_NC))
    over = [(both_C, predicted_C), (both_C, gold_C), (2 * both_C, gold_C + predicted_C)]
    precision_C, recall_C, f1_C = (a / np.maximum(b, 1) for a, b in over)
    return precision_C, recall_C, f1_C
