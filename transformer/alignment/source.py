"""What all kinds of attention over an encoder's states share.

B batch, S source position, D features of the query, E features of an encoder state, A alignment features, M features and V value
features of fast weights.

An alignment has two calls: `prepare(states, valid, summary)`, once per source, computes everything that does not depend on a
query; `alignment(query, source, step)` returns the context of one query and, if they exist, its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.errors import Config, require
from transformer.layers.linear import Linear
from transformer.types import Array, Bool, DTypeLike, Float, Int, Keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """An encoder's states, and what attention precomputes from them for all queries."""

    valid_BS: Bool[Array, "B S"]
    states_BSE: Float[Array, "B S E"]
    """The annotations of Bahdanau et al. 2014."""
    summary_BE: Float[Array, "B E"]
    """The last state; of each direction, the one that has read the whole source."""
    keys_BSA: Float[Array, "B S A"] | None = None
    """Keys that score the states, if they do not depend on a query."""
    fast_BMV: Float[Array, "B M V"] | None = None
    """Fast weights written by all the states."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentBase(Config):
    """Methods of the configs of all kinds."""

    def check(self, query_dim: int, memory_dim: int) -> str | None:
        """Why this kind cannot handle queries and states of these widths, or None."""
        return None

    def flops(self, query_dim: int, memory_dim: int, length: int) -> float:
        """FLOPs of one query, and of one state's key; a multiply-add counts as two."""
        return 0.0


def check_dim(config: Any) -> None:
    """Raise a `ConfigError` for a layer with no features."""
    require(config, "dim", config.dim is None or config.dim >= 1, "allowed: 1 or more, or null")


def dim_of(config: Any, query_dim: int) -> int:
    """A config's `dim` with its default filled in."""
    return query_dim if config.dim is None else config.dim


class Alignment(nnx.Module):
    """Base class of all kinds of attention over the states of an encoder."""

    def prepare(
        self, states_BSE: Float[Array, "B S E"], valid_BS: Bool[Array, "B S"], summary_BE: Float[Array, "B E"]
    ) -> Source:
        """What the decoder reads at each step, with everything precomputed that does not depend on a query."""
        return Source(valid_BS, states_BSE, summary_BE)

    def __call__(
        self,
        query_BD: Float[Array, "B D"],
        source: Source,
        step_B: Int[Array, " B"],
        *,
        key: Keys | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B S"] | None]:
        """The context, and the weights if they are asked for and exist.

        Args:
            step_B: the number of the query, for local_m.
            key: draws the state that hard attention takes; without a key it takes the most likely one.
        """
        raise NotImplementedError


def projection(
    in_dim: int,
    *out_shape: int,
    kernel_init: Callable[..., Array],
    use_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> Linear:
    """A linear layer to alignment features, or, without an `out_shape`, to a score."""
    return Linear(
        (in_dim,), out_shape, axes=("embed", "mlp") if out_shape else ("mlp",), use_bias=use_bias,
        kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
    )  # fmt: skip
