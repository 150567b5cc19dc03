"""What a step minimises.

B batch, T position, V vocab. Losses are sums with the weight they were taken over, never means: the mean over the whole
global batch is taken once, however it was cut into microbatches and devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from transformer.errors import require
from transformer.types import Array, Float, Int, PRNGKeyArray

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Additions to the cross-entropy."""

    z_loss: float = 0.0
    """Weight of log(Z)², which keeps the logits' normaliser near 1 (1e-4 is usual)."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread evenly over the vocabulary."""

    def __post_init__(self) -> None:
        require(self, "z_loss", self.z_loss >= 0, "allowed: 0 or more")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "allowed: 0 or more, below 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over tokens, in float32."""

    loss: Float[Array, ""]
    """What is minimised, z-loss and smoothing included."""
    nll: Float[Array, ""]
    """Negative log-likelihood of the targets, in nats."""
    weight: Float[Array, ""]
    """Number of target tokens."""

    def __add__(self, other: LossSums) -> LossSums:
        return jax.tree.map(jnp.add, self, other)

    @staticmethod
    def zero() -> LossSums:
        """The sum of nothing."""
        return LossSums(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def cross_entropy(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    config: LossConfig,
) -> LossSums:
    """Cross-entropy with label smoothing (Szegedy et al. 2016) and z-loss (Chowdhery et al. 2022, section 5)."""
    logits = logits_BTV.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum in place of a gather: its gradient is elementwise, where a gather's is a scatter, and it stays local
    # when the vocabulary is sharded.
    is_target = jnp.arange(logits.shape[-1]) == targets_BT[..., None]
    nll = log_z - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    loss = nll
    if config.label_smoothing:
        uniform = log_z - jnp.mean(logits, axis=-1)
        loss = (1 - config.label_smoothing) * nll + config.label_smoothing * uniform
    if config.z_loss:
        loss += config.z_loss * jnp.square(log_z)
    return LossSums(jnp.sum(loss * weights_BT), jnp.sum(nll * weights_BT), jnp.sum(weights_BT))


def causal(model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None) -> LossSums:
    """Predict each next token.

    Args:
        batch: tokens, targets [B, T] int32 and weights [B, T] float32; positions and segments [B, T] where documents are
            packed.
        key: turns dropout on.
    """
    output = model(batch["tokens"], positions_BT=batch.get("positions"), segments_BT=batch.get("segments"), key=key)
    with jax.named_scope("loss"):
        return cross_entropy(output.logits, batch["targets"], batch["weights"], config)
