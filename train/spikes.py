"""Loss spikes: which loss counts as one, and what a run does about it.

A loss is compared with the exponential mean m and variance v of the losses before it whose updates were made: its z-score is
(loss - m) / √v.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from transformer.errors import Config, require
from transformer.resume import OnResume
from transformer.types import Array, Float, Int

WINDOW = 128
"""Steps over which mean and variance are taken where a config does not say."""
_SMALLEST_DEVIATION = 1e-3
"""Of the mean: losses that hardly differ, such as those of a batch that is learned by heart, have no spikes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig(Config):
    """What is done about steps whose loss is far above those before."""

    on_resume: ClassVar[OnResume] = OnResume.ASK

    threshold: float = 6.0
    """z-score from which a loss is a spike: standard deviations above the mean of the losses before it."""
    window: int = WINDOW
    """Steps over which mean and deviation are taken, exponentially weighted. In the first ones of a run no loss is a spike."""
    action: Literal["skip", "rollback"] = "skip"
    """`skip`: the update is not made; `rollback`: the run goes back to the newest checkpoint of checkpoint.every, and passes over
    all batches since then, up to that of the spike (Chowdhery et al. 2022, section 5.1)."""
    max_rollbacks: int = 5
    """Stop after this many rollbacks to the same checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "threshold", 0 < self.threshold < float("inf"), "allowed: above 0")
        require(self, "window", self.window >= 2, "allowed: 2 or more")
        require(self, "max_rollbacks", self.max_rollbacks >= 1, "allowed: 1 or more")


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
