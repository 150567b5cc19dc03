"""What a step predicts: how much of it there is for the work that it costs, and how often each class comes."""

from __future__ import annotations

import dataclasses

import numpy as np

from train.config import RunConfig
from train.data.label_arrays import NONE
from train.data.objective_config import ROWS
from train.data.store import Prepared
from train.data.tagged import tokens_per_word
from train.loss import LossConfig
from train.program import Program
from transformer.errors import UserError
from transformer.models.families import flops_per_token


def per_target(config: RunConfig, prepared: Prepared, program: Program) -> tuple[float, str]:
    """Floating-point operations of a training step for each thing that it predicts, and what to call it: each token, a hidden
    one among many, a word, or a whole row, of which a pair has two."""
    objective, tokens, unit = config.objective, 1.0, "tok"
    if objective.kind in ROWS:
        tokens, unit = float(config.tokens_per_example), "row"
    elif objective.kind == "token_classification":
        tokens, unit = float(np.mean([tokens_per_word(array) for array in prepared.train])), "word"
    elif objective.hides:
        tokens, unit = 1 / objective.mask_rate, "hidden tok"
    passes = program.trained.passes(program.abstract.params)
    return passes * tokens * flops_per_token(config.model, config.sequence_length), unit


def class_weights(loss: LossConfig, prepared: Prepared) -> LossConfig:
    """The same with `balanced` weights as numbers: N / (C · n) for a class with n of all N labels, of C classes.

    Raises `UserError` unless there is a weight for each class.
    """
    names = prepared.meta.labels
    if isinstance(loss.class_weights, tuple) and len(loss.class_weights) != len(names):
        raise UserError(
            f"loss.class_weights: got {len(loss.class_weights)} numbers; there are {len(names)} classes: {', '.join(names)}"
        )
    if loss.class_weights != "balanced":
        return loss
    labels = [np.asarray(array.labels) for array in prepared.train if array.labels is not None]
    counts = sum(np.bincount(own[own != NONE], minlength=len(names)) for own in labels)
    weights = tuple(float(weight) for weight in np.sum(counts) / (len(names) * np.maximum(counts, 1)))
    return dataclasses.replace(loss, class_weights=weights)
