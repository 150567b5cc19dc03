"""What mixers with heads share: sizes, checks, and the FLOPs of their projections.

N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from transformer.errors import require
from transformer.layers.position import RotaryConfig
from transformer.types import Array, Float

Backend = Literal["auto", "reference", "xla", "cudnn", "pallas", "blockwise", "ring", "ulysses"]
"""Implementations of softmax attention (`transformer.attention.dispatch`)."""
FeatureMap = Literal["identity", "relu", "elu", "dpfp", "favor"]
"""Names of `transformer.attention.linear.feature_maps.FEATURE_MAPS`."""


def head_sizes(config: Any, embed_dim: int) -> tuple[int, int, int]:
    """N, K and H of a config with their defaults filled in."""
    N = config.num_heads
    K = getattr(config, "num_kv_heads", None) or N
    return N, K, config.head_dim or max(embed_dim // N, 1)


def check_heads(config: Any) -> None:
    """Raise a `ConfigError` for numbers of heads that are below 1 or do not divide."""
    require(config, "num_heads", config.num_heads >= 1, "allowed: 1 or more")
    for field in ("num_kv_heads", "head_dim"):
        given = getattr(config, field, None)
        if given is not None:
            require(config, field, given >= 1, "allowed: 1 or more, or null")
    if (kv_heads := getattr(config, "num_kv_heads", None)) is not None:
        require(
            config,
            "num_kv_heads",
            config.num_heads % kv_heads == 0,
            f"allowed: a divisor of num_heads ({config.num_heads})",
        )


def check_width(config: Any, embed_dim: int) -> tuple[str, str] | None:
    """The field that prevents the heads from dividing `embed_dim` and what is allowed, or None."""
    if config.head_dim is None and embed_dim % config.num_heads:
        return "num_heads", f"allowed: a divisor of embed_dim ({embed_dim}), or set head_dim"
    return None


def check_chunk(config: Any) -> None:
    """Raise a `ConfigError` for a chunk of less than one token."""
    require(config, "chunk", config.chunk is None or config.chunk >= 1, "allowed: 1 or more, or null")


def check_rotary(position: Any, head_dim: int) -> tuple[str, str] | None:
    """The field that prevents rotary positions from pairing a head's features, or scaling each pair, and what is allowed; or
    None."""
    if not isinstance(position, RotaryConfig):
        return None
    dim, factors = position.dim(head_dim), position.scaling.short_factors
    if dim > 0 and dim % 2 == 0:
        if not factors or len(factors) == dim // 2:
            return None
        return "position", f"it has {len(factors)} longrope factors for {dim // 2} pairs of features; allowed: one each"
    return "head_dim", f"rotary positions rotate pairs of features, and would rotate {dim}; allowed: an even number"


def projection_flops(config: Any, embed_dim: int, *, num_in: int = 3) -> float:
    """FLOPs of one token's queries, keys, values and output; a multiply-add counts as two."""
    N, K, H = head_sizes(config, embed_dim)
    return 2.0 * embed_dim * (2 * N * H + (num_in - 1) * K * H)


def seen_keys(config: Any, length: int, *, causal: bool) -> float:
    """Mean number of keys that a token sees in a context of `length`: half of it if causal, and at most a window's width."""
    window, sinks = getattr(config, "window", None), getattr(config, "sinks", 0)
    if not causal:
        return float(length if window is None else min(2 * window + 1, length))
    if window is not None and (width := window + 1 + sinks) < length:
        return width - width * (width - 1) / (2 * length)
    return (length + 1) / 2


def weights_of_reading(
    read: Callable[[Float[Array, "B T K T"]], Float[Array, "B T N T"]],
    num_kv_heads: int,
    x_BTD: Float[Array, "B T D"],
    heads: bool | tuple[int, ...],
) -> Float[Array, "B n T T"]:
    """Weights among the tokens of one call: what each query reads of values that are one-hot.

    Args:
        heads: all of them (True), or those listed.
    """
    B, T, _ = x_BTD.shape
    one_hot = jnp.broadcast_to(jnp.eye(T, dtype=jnp.float32)[:, None], (B, T, num_kv_heads, T))
    return read(one_hot)[:, :, chosen_heads(heads)].swapaxes(1, 2)


def chosen_heads(heads: bool | tuple[int, ...]) -> list[int] | slice:
    """The index of the heads whose weights are asked for: all of them (True), or those named."""
    return list(heads) if isinstance(heads, tuple) else slice(None)


def refuse_masks(name: str, context: Any, *, causal_only: bool = False) -> None:
    """Raise a `ValueError` for a mask or a function of scores that a mixer cannot apply."""
    if context.mask is not None:
        raise ValueError(f"{name}: it takes no mask in addition to causality, documents and padding")
    if context.score_mod is not None:
        raise ValueError(f"{name}: it takes no score_mod; use softmax attention")
    if context.prefix_B is not None:
        raise ValueError(f"{name}: it takes no prefix that all tokens see; use softmax attention")
    if causal_only and not context.is_causal:
        raise ValueError(f"{name}: it reads only what came before; use softmax attention in an encoder")
