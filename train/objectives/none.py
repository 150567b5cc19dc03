"""No objective: the config of weights that were imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from train.data.examples.pack import Examples, Packing
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums
from train.objectives.objective import BatchShapes, Objective
from transformer.errors import UserError
from transformer.models.families import ModelConfig
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class NoObjective(Objective):
    """No training objective: imported weights, for inference or to fine-tune."""

    kind: Literal["none"] = "none"

    families = ()
    loss_settings = ()

    def check_model(self, model: ModelConfig) -> None:
        """Any model is valid."""

    def check_data(self, prepared: Prepared, length: int) -> None:
        raise _nothing()

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        raise _nothing()

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        raise _nothing()

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        raise _nothing()

    def next_step(self, run: Any) -> str:
        return f"to fine-tune it: manyheads finetune {run} --data FILE, or set init_from: {run} in a config"


def _nothing() -> UserError:
    return UserError(
        "objective.kind: got 'none'; these are imported weights: name their folder in the init_from of a config with an objective"
    )
