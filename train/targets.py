"""How much work a step does for each thing that it predicts."""

from __future__ import annotations

from train.config import RunConfig
from train.data.store import Prepared
from train.program import Program
from transformer.models.families import flops_per_token


def flops_per_prediction(config: RunConfig, prepared: Prepared, program: Program) -> float:
    """Floating-point operations of a training step for each thing that it predicts: a token, a hidden token, a word, a row."""
    passes = program.trained.passes(program.abstract.params)
    tokens = config.objective.tokens_per_prediction(prepared, config.tokens_per_example)
    return passes * tokens * flops_per_token(config.model, config.sequence_length)
