"""Positions against their papers' formulas and properties."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.position import rotary, sinusoidal

RNG = np.random.default_rng(0)


def test_sinusoidal_is_the_papers():
    got = sinusoidal(jnp.arange(7)[None], 6)[0]
    position, i = np.indices((7, 3))
    angles = position / 10000 ** (2 * i / 6)
    np.testing.assert_allclose(got[:, 0::2], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(got[:, 1::2], np.cos(angles), atol=1e-6)


def test_rotary_products_depend_on_the_distance_alone():
    q, k = (jnp.asarray(RNG.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))

    def product(q_position, k_position):
        turned = [rotary(x, jnp.array([[p]])) for x, p in ((q, q_position), (k, k_position))]
        return np.sum(turned[0] * turned[1], axis=-1)

    np.testing.assert_allclose(product(9, 4), product(105, 100), atol=1e-4)
    assert np.abs(product(9, 4) - product(9, 5)).max() > 1e-3


def test_rotary_keeps_lengths_and_leaves_position_zero_alone():
    x = jnp.asarray(RNG.normal(size=(2, 5, 3, 8)), jnp.float32)
    turned = rotary(x, jnp.broadcast_to(jnp.arange(5), (2, 5)))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="even dim; got 5"):
        sinusoidal(jnp.arange(3)[None], 5)
