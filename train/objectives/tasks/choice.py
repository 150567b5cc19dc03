"""Multiple choice: predicting which of several texts continues another (Devlin et al. 2018, section 4.4).

Axes: B examples, Q choices, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from train.data.examples.choices import Choices
from train.data.examples.rows import TaskRows, TooLong
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.sources.records import Document
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums, of_rows, with_added_loss
from train.objectives.objective import BatchShapes, Outputs, label_shape, weight_shape
from train.objectives.tasks.classification import both, class_predictions
from train.objectives.tasks.task import Labelling, Prediction, Rows, Task, check_labels, forward
from train.parallel.mesh import MeshConfig
from transformer.errors import UserError, require
from transformer.models.heads import choices
from transformer.sharding import constrain
from transformer.types import Keys

_NAMES = ("tokens", "positions", "segments", "token_types")


@dataclass(frozen=True, kw_only=True)
class Choice(Task):
    """Predicts which of several texts continues another."""

    kind: Literal["choice"] = "choice"
    num_choices: int = 4
    """Number of choices."""
    too_long: TooLong = "drop"
    """What happens to a document longer than a row with any choice: it is left out, or cut. The number of such documents is
    reported."""

    heads = ("choice",)
    label_kind = "class"
    least_length = 5
    metrics = ("accuracy",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "num_choices", self.num_choices >= 2, "allowed: 2 or more")

    def check_mesh(self, mesh: MeshConfig) -> None:
        allowed = "a choice needs all of its rows together; allowed: gpipe"
        require(mesh, "schedule", mesh.schedule != "1f1b", allowed)

    def _check_documents(self, prepared: Prepared) -> None:
        self._check_label_kind(prepared)
        if not prepared.pairs:
            raise UserError("objective.kind: 'choice' needs texts with choices; set choice_fields of the sources")
        for array in (*prepared.train, *prepared.validation):
            if array.others != self.num_choices:
                raise UserError(
                    f"objective.num_choices: got {self.num_choices}; the documents of {array.name} have {array.others} choices"
                )
        check_labels(prepared, self.num_choices, "objective.num_choices")

    def for_any_document(self) -> Self:
        return dataclasses.replace(self, too_long="truncate")

    @property
    def rows_per_example(self) -> int:
        return self.num_choices

    def rows(self, array: TokenArray, tokenizer: Tokenizer, length: int, *, shown: bool = False) -> TaskRows:
        if array.others != self.num_choices:
            raise UserError(
                f"{array.name}: its documents have {array.others} choices; the model was trained on {self.num_choices}"
            )
        return Choices(array, tokenizer, length, self.too_long, shown=shown)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        shape = jax.ShapeDtypeStruct((rows, self.num_choices, length), jnp.int32)
        return dict.fromkeys(_NAMES, shape) | weight_shape(rows) | label_shape(rows)

    def outputs(
        self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None
    ) -> tuple[LossSums, Outputs]:
        """The cross-entropy over the choices, whose arrays are [B, Q, T]; and `logits` [B, Q]."""
        Q, T = batch["tokens"].shape[1:]
        rows = {name: constrain(batch[name].reshape(-1, T), "batch", "seq") for name in _NAMES}
        if "lengths" in batch:
            rows["lengths"] = constrain(batch["lengths"].reshape(rows["tokens"].shape[0], -1), "batch", None)
        output = forward(model, rows, key)
        with jax.named_scope("loss"):
            logits_BQ = choices(output.logits, Q)
            sums = of_rows(logits_BQ, batch["labels"], batch["weights"], config)
        return with_added_loss(sums, output), {"logits": logits_BQ}

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows, names: Labelling
    ) -> list[Prediction]:
        return class_predictions(examples, documents, indices, rows, names)

    def scores(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(*both(predictions)))}
