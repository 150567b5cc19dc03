"""Scores on held-out text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
from flax import nnx

from train.objective import Batch, LossSums

_UNDER_WAY = 2
"""Batches whose sums are waited for no sooner than this many later."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model makes of a text it has not seen."""

    loss: float
    """Negative log-likelihood, nats per token, or per row."""
    perplexity: float | None
    """Of tokens; None for classes of rows."""
    bits_per_byte: float | None
    """Bits per byte of UTF-8 text, comparable across tokenizers and with file compressors; None where bytes are unknown."""
    tokens: int
    """What was predicted: tokens, or rows."""
    accuracy: float | None = None
    """The part of the rows whose likeliest class is theirs; None for tokens."""

    def __str__(self) -> str:
        """The scores that there are, for people."""
        parts = {
            "perplexity": (self.perplexity, ".2f"), "bits per byte": (self.bits_per_byte, ".4f"),
            "accuracy": (self.accuracy, ".2%"),
        }  # fmt: skip
        known = "".join(f"  {name} {value:{form}}" for name, (value, form) in parts.items() if value is not None)
        return f"loss {self.loss:.4f}{known}"


def evaluate(
    step: Callable[[nnx.State, Batch], LossSums], params: nnx.State, batches: Iterable[Batch]
) -> list[LossSums]:
    """Run `step`, which `make_eval_step` made, over all batches; the sums of each, on the host."""
    parts: list[LossSums] = []
    for batch in batches:
        parts.append(step(params, batch))
        # Reading each would wait for it. More than a few under way gain nothing, and on virtual devices, which share the
        # threads of one processor, they can wait for each other until the collectives give up.
        if len(parts) > _UNDER_WAY:
            jax.block_until_ready(parts[-_UNDER_WAY - 1])
    return jax.device_get(parts)


def scores_of(parts: list[LossSums], bytes_per_token: float | None) -> Scores:
    """The mean over tokens, or rows, not over batches.

    Args:
        bytes_per_token: of the held-out text as a whole.
    """
    # Python floats: the sums add in float64.
    weight = sum(float(part.weight) for part in parts)
    loss = sum(float(part.nll) for part in parts) / max(weight, 1.0)
    bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    correct = [float(part.correct) for part in parts if part.correct is not None]
    if correct:
        return Scores(loss, None, None, int(weight), sum(correct) / max(weight, 1.0))
    return Scores(loss, math.exp(min(loss, 700.0)), bits, int(weight))
