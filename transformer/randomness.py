"""Random numbers of a model: a key for each row of a batch, and dropout, whose bits are a hash of the row's key and the place.

B batch.

A row's numbers depend on its own key and on nothing else: they are the same however a batch is divided into microbatches, over
devices, or over the stages of a pipeline. Where a function takes a key, it takes one for the whole batch, or an array of B keys.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from transformer.differentiation import own_transpose
from transformer.types import Array, Bool, Float, Int, Key, Keys, UInt32


def row_keys(key: Keys, num_rows: int, start: int | Int[Array, ""] = 0) -> Key[Array, " B"]:
    """A key for each of `num_rows` rows.

    Args:
        key: one for the batch; or one for each example, which has the same number of consecutive rows.
        start: number of the first row, with one key for the batch.

    Raises:
        ValueError: a number of keys that does not divide that of the rows.
    """
    key = _typed(key)
    if key.ndim == 0:
        return fold_in(jnp.broadcast_to(key, (num_rows,)), start + jnp.arange(num_rows))
    several, rest = divmod(num_rows, key.shape[0])
    if rest:
        raise ValueError(f"key: {key.shape[0]} keys for a batch of {num_rows} rows; expected 1, or one for each row")
    return key if several == 1 else fold_in(jnp.repeat(key, several), jnp.arange(num_rows) % several)


def split(key: Keys, count: int) -> Key[Array, "count ..."]:
    """`count` keys, or `count` for each row, as `jax.random.split`."""
    key, divide = _typed(key), functools.partial(jax.random.split, num=count)
    return divide(key) if key.ndim == 0 else jax.vmap(divide, out_axes=1)(key)


def fold_in(key: Keys, number: int | Int[Array, ...]) -> Keys:
    """A key from a key and a number, as `jax.random.fold_in`; for each row, of its own number or of one for all."""
    key = _typed(key)
    if key.ndim == 0:
        return jax.random.fold_in(key, number)
    return jax.vmap(jax.random.fold_in, in_axes=(0, 0 if jnp.ndim(number) else None))(key, number)


def seeds_of(key: Keys, num_rows: int) -> UInt32[Array, "B 2"]:
    """Two words for each row, from which `dropout_mask` makes its bits."""
    words = jax.random.key_data(row_keys(key, num_rows))
    # Keys of other generators than Threefry have four words, of which two may repeat the others; times an odd number, no bit is
    # lost.
    return words if words.shape[1] == 2 else words[:, :2] + words[:, -2:] * (_ODD[0] - np.uint32(1))


def gumbel(key: Keys, like: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Gumbel noise in the shape and type of an array, of which each row has its own."""

    def noise(key: Array) -> Array:
        return jax.random.gumbel(key, like.shape[1:], like.dtype)

    return jax.vmap(noise)(row_keys(key, like.shape[0]))


def dropout(x: Float[Array, "B ..."], rate: float, key: Keys | None) -> Float[Array, "B ..."]:
    """Zero each element with probability `rate` and scale the rest by 1/(1-rate); the identity without a key.

    Srivastava et al. 2014, inverted so that inference needs no scaling. The backward pass makes the mask again.
    """
    if rate == 0 or key is None:
        return x

    def masked(seeds_B2: Array, x: Array) -> Array:
        is_kept, scale = dropout_mask(seeds_B2, rate, _numbered(x.shape[1:]))
        return jnp.where(is_kept, x * jnp.asarray(scale, x.dtype), jnp.zeros_like(x))

    return own_transpose(masked, seeds_of(key, x.shape[0]), x)


def dropout_mask(
    seeds_B2: UInt32[Array, "B 2"], rate: float, *places: UInt32[Array, ...]
) -> tuple[Bool[Array, "B ..."], float]:
    """Which elements dropout keeps, each with probability 1 - rate, and the factor that they are multiplied by.

    The rate is rounded to a multiple of 2⁻³². A few integer operations for each element, which the compiler puts into the
    operation that reads the mask: Threefry would take most of the time of a small layer.

    Args:
        places: where in its row an element is: numbers that broadcast together to the shape of a row.
    """
    dropped = min(round(rate * 2**32), 2**32 - 1)
    return _hash(seeds_B2, *places) >= jnp.uint32(dropped), 2**32 / (2**32 - dropped)


def _typed(key: Array) -> Keys:
    """A key of `jax.random.key`, also from one of `jax.random.PRNGKey`, which is an array of two numbers."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _numbered(shape: tuple[int, ...]) -> Array:
    """The elements of a row, numbered in order; made from the place in each dim, so that a dim may be sharded."""
    number = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        number = number * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return number


def _hash(seeds_B2: Array, *places: Array) -> Array:
    """Uniform bits of a row's seeds and a place, uint32.

    The last place goes through the 32-bit finaliser of Wellons (2018, "Prospecting for hash functions"), with the second seed in
    its middle. Each place before it changes both seeds, so that rows of the plane have equal bits only if both are equal.
    """
    *outer, last = places
    first, second = (seeds_B2[:, word].reshape(-1, *(1,) * last.ndim) for word in (0, 1))
    for place in outer:
        number = place.astype(jnp.uint32)[None]
        first, second = _mixed(first + number * _ODD[0], 0), _mixed(second ^ number * _ODD[1], 0)
    return _mixed(first + last.astype(jnp.uint32)[None] * _ODD[0], second)


def _mixed(x: Array, between: Array | int) -> Array:
    x = (x ^ x >> 16) * _MULTIPLIERS[0]
    x = (x ^ x >> 15 ^ jnp.uint32(between)) * _MULTIPLIERS[1]
    return x ^ x >> 16


_ODD = (np.uint32(0x9E3779B1), np.uint32(0x85EBCA77))
_MULTIPLIERS = (np.uint32(0x7FEB352D), np.uint32(0x846CA68B))
