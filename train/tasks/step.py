"""The evaluation step of a task: its sums, and what the model tells of each row, for metrics that are no sums."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from train.data.objective_config import ObjectiveConfig
from train.loss import Batch, LossConfig, LossSums
from train.tasks.losses import TASK_LOSSES, Outputs
from transformer.pipeline import PLAIN, Schedule, scheduled


def make_task_step(graphdef: Any, objective: ObjectiveConfig, schedule: Schedule = PLAIN) -> jax.stages.Wrapped:
    """The jitted `(params, batch) -> (sums, outputs)` without dropout, smoothing, z-loss or class weights.

    Every device ends with the outputs of all rows, so that every process reads the same. They have `example` [B] too where the
    batch has it.
    """
    options = {"answer_length": objective.answer_length} if objective.kind == "answer" else {}

    def step(params: nnx.State, batch: Batch) -> tuple[LossSums, Outputs]:
        with scheduled(schedule):
            sums, outputs = TASK_LOSSES[objective.kind](nnx.merge(graphdef, params), batch, LossConfig(), **options)
        if "example" in batch:
            outputs |= {"example": batch["example"]}
        if not jax.sharding.get_abstract_mesh().empty:
            outputs = jax.lax.with_sharding_constraint(outputs, PartitionSpec())
        return sums, outputs

    return jax.jit(step)
