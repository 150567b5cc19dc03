"""Base class of the tasks of labelled documents, on which an encoder is fine-tuned.

Axes: B rows, T positions, N examples.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from train.data.examples.pack import Examples, Packing
from train.data.examples.rows import TaskRows
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.sources.records import Document, LabelKind
from train.data.tokenization.tokenizer import CLS, SEP, Tokenizer
from train.loss import DEFAULT_LOSS, Batch, LossConfig, LossSums
from train.objectives.objective import BatchShapes, Objective, Outputs, objectives, places_of, row_shapes, weight_shape
from transformer.errors import ConfigError, UserError
from transformer.models.families import ModelConfig
from transformer.randomness import row_keys
from transformer.types import Keys

Prediction = dict[str, Any]
"""The prediction for a document, as JSON: `id`, `label`, `scores`; and `gold`, if the document has a label."""

Rows = dict[str, np.ndarray]
"""The outputs of examples, [N, ...] by name."""

_LABELS: dict[LabelKind | None, str] = {
    "class": "a class", "classes": "a list of classes", "number": "a number", "tags": "a tag for each word", "answers": "answers",
}  # fmt: skip


@dataclass(frozen=True)
class Labelling:
    """What turns a model's outputs into predictions with names and words."""

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    """The names of the classes, or tags, by their numbers."""


@dataclass(frozen=True, kw_only=True)
class Task(Objective):
    """A task of labelled documents: one document, or one pair, per row."""

    label_kind: ClassVar[LabelKind]
    document_fields: ClassVar[tuple[tuple[str, str], ...] | None] = None
    """The fields of a record for an imported model, as settings of a source; None: imports are not supported."""
    families = ("bert",)
    takes_pairs: ClassVar[bool | None] = None
    packings: ClassVar[tuple[Packing, ...]] = ("documents",)
    packs = False
    least_length = 3
    unit = "row"
    use = ("predict", "manyheads predict {} --file FILE")

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return (CLS, SEP)

    def suits(self, model: ModelConfig) -> bool:
        """Whether a model has a head for this task."""
        try:
            self.check_model(model)
        except ConfigError:
            return False
        return True

    def _check_documents(self, prepared: Prepared) -> None:
        super()._check_documents(prepared)
        self._check_label_kind(prepared)

    def _check_label_kind(self, prepared: Prepared) -> None:
        given, wanted = prepared.meta.label_kind, self.label_kind
        if given is None:
            raise UserError(
                f"objective.kind: {self.kind!r} needs documents with {_LABELS[wanted]}, but the sources give none; set their "
                "label_field"
            )
        if given != wanted:
            fitting = " or ".join(sorted(repr(one.kind_name()) for one in objectives() if one.label_kind == given))
            raise UserError(
                f"objective.kind: {self.kind!r} needs documents with {_LABELS[wanted]} (label_kind {wanted!r}), but the sources "
                f"give {_LABELS[given]}; set their label_kind, or the objective to {fitting}"
            )

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return self.rows(array, tokenizer, length, shown=shown)

    @abc.abstractmethod
    def rows(self, array: TokenArray, tokenizer: Tokenizer, length: int, *, shown: bool = False) -> TaskRows:
        """The examples of an array, which may lack the labels."""

    def for_any_document(self) -> Self:
        """The same task without leaving out long documents."""
        return self

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        types = ("token_types",) if data.pairs else ()
        names = ("tokens", "segments", "positions", *types)
        return row_shapes(rows, length, names) | weight_shape(rows)

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        return self.outputs(model, batch, config, key=key)[0]

    @abc.abstractmethod
    def outputs(
        self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None
    ) -> tuple[LossSums, Outputs]:
        """The loss, and for each row the outputs for its predictions.

        Args:
            batch: the arrays of `batch`; the label of a row of padding is -1, and its weights are 0.
            key: turns dropout on.
        """

    def evaluate(self, model: Any, batch: Batch, config: LossConfig = DEFAULT_LOSS) -> tuple[LossSums, Outputs]:
        return self.outputs(model, batch, config.plain())

    def tokens_per_prediction(self, prepared: Prepared, tokens_per_example: int) -> float:
        return float(tokens_per_example)

    @abc.abstractmethod
    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows, names: Labelling
    ) -> list[Prediction]:
        """The prediction for each document of the examples `indices` [N], whose outputs are `rows`.

        Args:
            examples: of an array of `documents`.
        """

    @abc.abstractmethod
    def scores(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, float]:
        """The metrics by name, of predictions that have `gold`; there is at least one."""

    def describe(self, predictions: Sequence[Prediction], labels: Sequence[str], directory: Path) -> list[str]:
        """Lines to print at the end of a run; pictures go into `directory`."""
        return []


def forward(model: Any, batch: Batch, key: Keys | None) -> Any:
    """The model's output for rows of one text, or two; with keys of examples, of which each may have several rows."""
    return model(
        batch["tokens"], **places_of(batch),
        token_types_BT=batch.get("token_types"),
        key=None if key is None else row_keys(key, batch["tokens"].shape[0]),
    )  # fmt: skip


def check_labels(prepared: Prepared, num_labels: int, field: str = "model.head.num_labels") -> None:
    """Raise a `UserError` unless `num_labels` matches the classes of the data; `field` is the setting of `num_labels`."""
    labels = prepared.meta.labels
    names = ", ".join(labels)
    if len(labels) == 1:
        raise UserError(f"data: all documents are of one class, {names}: there is nothing to distinguish")
    if len(labels) != num_labels:
        raise UserError(f"{field}: got {num_labels}; the data has {len(labels)} classes: {names}")


def with_gold(prediction: Prediction, gold: Any) -> Prediction:
    """The prediction with the document's label, if it has one."""
    return prediction if gold is None else prediction | {"gold": gold}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last dim, in float64."""
    shifted = np.exp(np.asarray(logits, np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
