"""Where a token stands: sinusoidal and rotary positions. Learned ones are an `Embedding` of the position.

B batch, T position, D embed, N heads, H head_dim.
"""

from __future__ import annotations

import jax.numpy as jnp

from transformer.types import Array, Float, Int


def sinusoidal(positions_BT: Int[Array, "B T"], dim: int, *, max_period: float = 10_000.0) -> Float[Array, "B T D"]:
    """Sines in the even features and cosines in the odd ones (Vaswani et al. 2017, section 3.5), [B, T, dim], float32."""
    angles = _angles(positions_BT, dim, max_period)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions_BT.shape, dim)


def rotary(
    x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], *, max_period: float = 10_000.0
) -> Float[Array, "B T N H"]:
    """Rotate each pair (i, i + H/2) of features by an angle that grows with the position.

    Su et al. 2021, equation 34, with the pairs of GPT-NeoX: a head's first half with its second. The products of
    rotated queries and keys depend on the distance of their positions alone. Angles in float32.
    """
    angles = _angles(positions_BT, x_BTNH.shape[-1], max_period)[:, :, None, :]  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def _angles(positions_BT: Array, dim: int, max_period: float) -> Array:
    """Position times frequency, [B, T, dim/2]; the periods run geometrically from 2π to 2π·max_period."""
    if dim % 2:
        raise ValueError(f"positions of sines and cosines need an even dim; got {dim}")
    frequencies = max_period ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return positions_BT[..., None].astype(jnp.float32) * frequencies
