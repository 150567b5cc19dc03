"""Class weights in a loss. C classes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from train.data.prepared.label_arrays import NONE
from train.data.prepared.store import Prepared
from train.objectives.tasks.task import Task, check_labels
from transformer.errors import UserError, require
from transformer.models.bert import BertConfig
from transformer.models.families import ModelConfig
from transformer.models.heads import CLASSES, TokensHeadConfig


@dataclass(frozen=True, kw_only=True)
class WeightedClasses(Task):
    """A task whose labels are classes, with optional class weights in the training loss."""

    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    """The weight of each class in the training loss, which is then a weighted mean, in the order of the classes' names;
    `balanced`: inversely proportional to the classes' frequencies; null: uniform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.class_weights, tuple):
            holds = min(self.class_weights, default=-1) >= 0 and sum(self.class_weights) > 0
            require(self, "class_weights", holds, "allowed: numbers, 0 or more, not all 0; balanced; or null")

    def num_labels(self, prepared: Prepared) -> int:
        check_labels(prepared, found := len(prepared.meta.labels))
        return found

    def check_classes(self, prepared: Prepared, model: ModelConfig) -> None:
        if isinstance(model, BertConfig) and isinstance(model.head, (*CLASSES, TokensHeadConfig)):
            check_labels(prepared, model.head.classes)

    def with_data(self, prepared: Prepared) -> Self:
        """With `balanced` weights as numbers: N / (C · n) for a class with n of all N labels.

        Raises `UserError` unless there is a weight for each class.
        """
        names = prepared.meta.labels
        if isinstance(self.class_weights, tuple) and len(self.class_weights) != len(names):
            raise UserError(
                f"objective.class_weights: got {len(self.class_weights)} numbers; there are {len(names)} classes: "
                f"{', '.join(names)}"
            )
        if self.class_weights != "balanced":
            return self
        labels = [np.asarray(array.labels) for array in prepared.train if array.labels is not None]
        counts = sum(np.bincount(own[own != NONE], minlength=len(names)) for own in labels)
        weights = tuple(float(weight) for weight in np.sum(counts) / (len(names) * np.maximum(counts, 1)))
        return dataclasses.replace(self, class_weights=weights)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """`class_weights` as numbers. Raises `UserError` if they depend on data that is not available."""
        if self.class_weights == "balanced":
            raise UserError(
                "objective.class_weights: only `manyheads train` knows the frequencies of classes; give numbers"
            )
        return self.class_weights
