"""Scores on held-out text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
from flax import nnx

from train.objective import Batch, LossSums


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model makes of a text it has not seen."""

    loss: float
    """Negative log-likelihood, nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """Bits per byte of UTF-8 text, comparable across tokenizers and with file compressors; None where bytes are unknown."""
    tokens: int


def evaluate(
    step: Callable[[nnx.State, Batch], LossSums], params: nnx.State, batches: Iterable[Batch]
) -> list[LossSums]:
    """Run `step`, which `make_eval_step` made, over all batches; the sums of each, on the host."""
    # Sums stay on the device until the end: reading each would wait for it.
    return jax.device_get([step(params, batch) for batch in batches])


def scores_of(parts: list[LossSums], bytes_per_token: float | None) -> Scores:
    """The mean over tokens, not over batches.

    Args:
        bytes_per_token: of the held-out text as a whole.
    """
    # Python floats: the sums add in float64.
    weight = sum(float(part.weight) for part in parts)
    loss = sum(float(part.nll) for part in parts) / max(weight, 1.0)
    bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    return Scores(loss, math.exp(min(loss, 700.0)), bits, int(weight))
