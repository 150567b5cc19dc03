"""Regression: predicting a number for a document, or for a pair.

Axes: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from train.data.examples.labelled import LabelledDocuments
from train.data.examples.rows import TaskRows, TooLong
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.sources.records import Document
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums, with_added_loss
from train.objectives.objective import BatchShapes, Outputs, label_shape
from train.objectives.tasks.task import Labelling, Prediction, Rows, Task, forward, with_gold
from transformer.errors import require
from transformer.models.bert import BertConfig
from transformer.models.families import ModelConfig
from transformer.models.heads import ClassificationHeadConfig
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Predicts the number of a document, or of a pair; the loss is the squared error."""

    kind: Literal["regression"] = "regression"
    too_long: TooLong = "drop"
    """What happens to a document longer than a row: it is left out, or cut. The number of such documents is reported."""

    heads = ("classification",)
    label_kind = "number"
    loss_settings = ()
    metrics = ("pearson", "spearman", "mse")
    lower_is_better = ("loss", "mse")
    document_fields = ()

    def check_model(self, model: ModelConfig) -> None:
        super().check_model(model)
        if isinstance(model, BertConfig) and isinstance(model.head, ClassificationHeadConfig):
            wanted = "a regression predicts one number; allowed: 1"
            require(model.head, "num_labels", model.head.num_labels in (1, None), wanted)
            wanted = "a regression has no classes; allowed: false"
            require(model.head, "multi_label", not model.head.multi_label, wanted)

    def num_labels(self, prepared: Prepared) -> int:
        return 1

    def for_any_document(self) -> Self:
        return dataclasses.replace(self, too_long="truncate")

    def rows(self, array: TokenArray, tokenizer: Tokenizer, length: int, *, shown: bool = False) -> TaskRows:
        return LabelledDocuments(array, tokenizer, length, self.too_long, numbers=True, shown=shown)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        return super().batch(rows, length, data) | label_shape(rows, dtype=jnp.float32)

    def outputs(
        self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None
    ) -> tuple[LossSums, Outputs]:
        """The squared error, and `values` [B]."""
        output = forward(model, batch, key)
        with jax.named_scope("loss"):
            values_B, weights_B = output.logits[:, 0], batch["weights"][:, 0]
            error = jnp.sum(jnp.square(values_B - batch["labels"]) * weights_B)
            sums = LossSums(error, error, jnp.sum(weights_B))
        return with_added_loss(sums, output), {"values": values_B}

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows, names: Labelling
    ) -> list[Prediction]:
        found = []
        for index, value in zip(indices, rows["values"], strict=True):
            document = documents[examples.documents[index]]
            found.append(with_gold({"id": document.id, "label": float(value)}, document.label))
        return found

    def scores(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, float]:
        """Pearson's and Spearman's correlation (0 if undefined because all numbers are equal), and mean squared error."""
        from scipy.stats import pearsonr, spearmanr

        gold, predicted = (np.array([one[name] for one in predictions], np.float64) for name in ("gold", "label"))
        constant = len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(predicted) == 0
        return {
            "pearson": 0.0 if constant else float(pearsonr(gold, predicted).statistic),
            "spearman": 0.0 if constant else float(spearmanr(gold, predicted).statistic),
            "mse": float(np.mean(np.square(gold - predicted))),
        }
