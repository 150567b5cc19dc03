"""Chat and instruction tuning: predicting what the assistant says in dialogues (Ouyang et al. 2022, section 3.1).

Axes: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from train.data.examples.dialogues import Dialogues, tokens_per_target
from train.data.examples.pack import Examples, Packing
from train.data.examples.rows import TooLong
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums, of_tokens
from train.objectives.objective import BatchShapes, Objective, places_of, row_shapes, weight_shape
from transformer.errors import UserError
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class Chat(Objective):
    """Predicts what the assistant says in dialogues, from all that was said before (instruction tuning)."""

    kind: Literal["chat"] = "chat"
    too_long: TooLong = "drop"
    """What happens to a dialogue that is longer than a row: it is left out, or loses its end. The number of such dialogues is
    reported."""

    families = ("gpt",)
    label_kind = "turns"
    packings = ("documents",)
    use = ("talk to it", "manyheads chat {}")

    def _check_documents(self, prepared: Prepared) -> None:
        super()._check_documents(prepared)
        if prepared.meta.label_kind != self.label_kind:
            raise UserError(f"objective.kind: {self.kind!r} needs dialogues; set holds: dialogues in the sources")

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return Dialogues(array, length, self.too_long, shown=shown)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        return row_shapes(rows, length, ("tokens", "targets", "segments", "positions")) | weight_shape(rows, length)

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """The mean over the tokens that the assistant writes, whose `weights` [B, T] are 1."""
        output = model(batch["tokens"], **places_of(batch), key=key)
        return of_tokens(model, output, batch, config)

    def tokens_per_prediction(self, prepared: Prepared, tokens_per_example: int) -> float:
        return float(np.mean([tokens_per_target(array) for array in prepared.train]))
