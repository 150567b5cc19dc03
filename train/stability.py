"""Updates that are skipped: those of a loss or gradient that is not finite, and of loss spikes.

For spikes a loss is compared with the exponential mean m and variance v of the losses before it whose updates were made: its
z-score is (loss - m) / √v.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from transformer.errors import Config, require
from transformer.resume import Free, OnResume
from transformer.types import Array, Float, Int

_SMALLEST_DEVIATION = 1e-3
"""Of the mean: losses that hardly differ, such as those of a batch that is learned by heart, have no spikes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityConfig(Config):
    """What is done about steps whose loss or gradient is not finite, or whose loss is far above those before."""

    on_resume: ClassVar[OnResume] = OnResume.ASK

    max_skipped: Free[int] = 10
    """Stop after this many updates in a row were skipped."""
    spike_threshold: float | None = None
    """z-score from which a loss is a spike: standard deviations above the mean of the losses before it (6 is usual); null: none
    is."""
    spike_window: int = 128
    """Steps over which mean and deviation are taken, exponentially weighted. In the first ones of a run no loss is a spike."""
    on_spike: Literal["skip", "rollback"] = "skip"
    """`skip`: the update is not made; `rollback`: the run goes back to the newest checkpoint of checkpoint.every, and passes over
    all batches since then, up to that of the spike (Chowdhery et al. 2022, section 5.1)."""
    max_rollbacks: int = 5
    """Stop after this many rollbacks to the same checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        threshold = self.spike_threshold
        require(self, "spike_threshold", threshold is None or 0 < threshold < float("inf"), "allowed: above 0, or null")
        require(self, "spike_window", self.spike_window >= 2, "allowed: 2 or more")
        for field in ("max_skipped", "max_rollbacks"):
            require(self, field, getattr(self, field) >= 1, "allowed: 1 or more")


STABILITY = StabilityConfig()


def z_score(loss: Float[Array, ""], moments_2: Float[Array, 2], count: Int[Array, ""], window: int) -> Float[Array, ""]:
    """How many standard deviations a loss is above those before it; 0 while fewer than `window` are known.

    Args:
        moments_2: their mean and variance.
        count: how many there are.
    """
    mean, variance = moments_2
    deviation = jnp.maximum(jnp.sqrt(variance), _SMALLEST_DEVIATION * jnp.abs(mean))
    z = (loss - mean) / jnp.maximum(deviation, jnp.finfo(jnp.float32).tiny)
    return jnp.where(count >= window, z, 0.0)


def moments_after(
    loss: Float[Array, ""], moments_2: Float[Array, 2], count: Int[Array, ""], window: int
) -> Float[Array, 2]:
    """Mean and variance with one more loss: of all of them at first, then exponentially weighted (West 1979)."""
    mean, variance = moments_2
    weight = jnp.maximum(1 / (count.astype(jnp.float32) + 1), 1 / window)
    above = loss - mean
    return jnp.stack([mean + weight * above, (1 - weight) * (variance + weight * above * above)])
