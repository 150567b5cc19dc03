"""What every kind of attention over an encoder's states has in common.

B batch, S source position, D features of the query, E features of an encoder state, A alignment features, M features and V value
features of fast weights.

An alignment is made of two calls: `prepare(states, valid, summary)`, once a source, computes all that depends on no query;
`alignment(query, source, step)` gives the context of one query and, where they exist, its weights.
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
from transformer.types import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """An encoder's states, and what attention made of them once for all queries."""

    valid_BS: Bool[Array, "B S"]
    states_BSE: Float[Array, "B S E"]
    """The annotations of Bahdanau et al. 2014."""
    summary_BE: Float[Array, "B E"]
    """The last state: of each direction, the one that has read everything."""
    keys_BSA: Float[Array, "B S A"] | None = None
    """What scores the states, where that depends on no query."""
    fast_BMV: Float[Array, "B M V"] | None = None
    """Fast weights that all the states have written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentBase(Config):
    """What the configs of all kinds answer."""

    def check(self, query_dim: int, memory_dim: int) -> str | None:
        """What keeps this kind from queries and states of these widths, or None."""
        return None

    def flops(self, query_dim: int, memory_dim: int, length: int) -> float:
        """Of one query, and of one state's key: a multiply-add counts as two."""
        return 0.0


def check_dim(config: Any) -> None:
    """Raise a `ConfigError` for a layer of no features."""
    require(config, "dim", config.dim is None or config.dim >= 1, "allowed: 1 or more, or null")


def dim_of(config: Any, query_dim: int) -> int:
    """A config's `dim` with its default filled in."""
    return query_dim if config.dim is None else config.dim


class Alignment(nnx.Module):
    """Base of all kinds of attention over the states of an encoder."""

    def prepare(
        self, states_BSE: Float[Array, "B S E"], valid_BS: Bool[Array, "B S"], summary_BE: Float[Array, "B E"]
    ) -> Source:
        """What the decoder reads at each step, with everything that depends on no query."""
        return Source(valid_BS, states_BSE, summary_BE)

    def __call__(
        self,
        query_BD: Float[Array, "B D"],
        source: Source,
        step_B: Int[Array, " B"],
        *,
        key: PRNGKeyArray | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B S"] | None]:
        """The context, and the weights where they are asked for and exist.

        Args:
            step_B: the number of the query, for local_m.
            key: draws the state that hard attention takes; without one it is the likeliest.
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
    """A linear layer to alignment features, or with no `out_shape` to a score."""
    return Linear(
        (in_dim,), out_shape, axes=("embed", "mlp") if out_shape else ("mlp",), use_bias=use_bias,
        kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
    )  # fmt: skip
