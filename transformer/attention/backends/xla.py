"""`jax.nn.dot_product_attention` as XLA fuses it: simple, exact, and with an array of all pairs.

B batch, T query position, S key position, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec
from transformer.attention.spec.tile import Tile
from transformer.types import Array, Float


def xla(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    spec: AttentionSpec,
) -> Float[Array, "B T N H"]:
    """Attention by `jax.nn.dot_product_attention`, with the mask as an array."""
    (B, T, N, _), S = q_BTNH.shape, k_BSKH.shape[1]
    allowed = spec.mask.allowed(Tile.whole(B, N, T, S))
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], T, S))
    # JAX's own function mixes types, even if the program runs under a stricter promotion rule.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            bias=spec.score.bias_BNTS,
            mask=allowed,
            scale=spec.score.scale,
            implementation="xla",
        )
    if allowed is None:
        return out
    # A query with no key gives zeros here, as in the reference, rather than the mean of the values.
    some_key = jnp.any(allowed, axis=-1)  # [B_, N_, T]
    return jnp.where(jnp.moveaxis(some_key, 1, 2)[..., None], out, 0)


def supports_xla(request: AttentionShapes) -> str | None:
    """Why XLA cannot serve this call, or None."""
    if request.spec.dropout is not None:
        return "it has no dropout"
    if request.spec.score.soft_cap is not None:
        return "it has no logit soft-cap"
    if request.spec.score.mod is not None:
        return "it has no score_mod"
    if request.value_dim != request.head_dim:
        return f"it needs values as wide as keys, and they are {request.value_dim} and {request.head_dim}"
    return None
