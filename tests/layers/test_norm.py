"""Norms against their formulas in float64, values and every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers.norm import LayerNorm, RMSNorm, layer_norm, rms_norm

SHAPES = [(1, 1), (5,), (7, 3), (2, 3, 5), (2, 1, 4, 33), (3, 257, 8)]


def plain_layer_norm(x, scale, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    leading = (1,) * (x.ndim - 1)
    return y * scale.reshape(*leading, -1) + (0 if bias is None else bias.reshape(*leading, -1))


def plain_rms_norm(x, scale, epsilon):
    y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return y * scale.reshape(*(1,) * (x.ndim - 1), -1)


def wide_reference(plain, dy, *args):
    """Value and gradients of `plain` in float64."""
    with jax.enable_x64(True):
        wide = [None if a is None else jnp.asarray(np.asarray(a, np.float64)) for a in args]
        y, pullback = jax.vjp(plain, *wide)
        gradients = pullback(jnp.asarray(np.asarray(dy, np.float64)))
        return [None if a is None else np.asarray(a) for a in (y, *gradients)]


def draw(shape, dtype):
    rng = np.random.default_rng(sum(shape))
    # A mean far from zero is where a careless variance loses its digits.
    x = jnp.asarray(rng.normal(3.0, 2.0, shape), dtype)
    scale = jnp.asarray(rng.normal(1.0, 0.3, shape[-1]), jnp.float32)
    bias = jnp.asarray(rng.normal(0.0, 0.3, shape[-1]), jnp.float32)
    return x, scale, bias, jnp.asarray(rng.normal(size=shape), dtype)


def check(actual, expected, dtype):
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            size = max(1.0, float(np.abs(e).max()))
            np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_norm_and_its_gradients(shape, dtype, use_bias):
    x, scale, bias, dy = draw(shape, dtype)
    bias = bias if use_bias else None
    y, pullback = jax.vjp(lambda *args: layer_norm(*args, epsilon=1e-3), x, scale, bias)
    gradients = pullback(dy)
    assert y.dtype == gradients[0].dtype == dtype
    assert gradients[1].dtype == jnp.float32
    check((y, *gradients), wide_reference(lambda *a: plain_layer_norm(*a, 1e-3), dy, x, scale, bias), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_and_its_gradients(shape, dtype):
    x, scale, _, dy = draw(shape, dtype)
    y, pullback = jax.vjp(lambda *args: rms_norm(*args, epsilon=1e-3), x, scale)
    gradients = pullback(dy)
    assert y.dtype == gradients[0].dtype == dtype
    assert gradients[1].dtype == jnp.float32
    check((y, *gradients), wide_reference(lambda *a: plain_rms_norm(*a, 1e-3), dy, x, scale), dtype)


def test_a_constant_row_is_finite():
    x = jnp.full((2, 8), 1000.0)
    scale = jnp.ones(8)
    y, pullback = jax.vjp(lambda x: layer_norm(x, scale, epsilon=1e-5), x)
    np.testing.assert_array_equal(y, jnp.zeros_like(x))
    assert bool(jnp.isfinite(pullback(jnp.ones_like(x))[0]).all())


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
        y = layer_norm(x, jnp.ones(5), jnp.zeros(5), epsilon=1e-5)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, plain_layer_norm(x, jnp.ones(5), None, 1e-5), rtol=1e-14, atol=1e-14)


def test_under_vmap_scan_and_remat():
    x, scale, bias, _ = draw((4, 3, 5), jnp.float32)

    def norm(x):
        return layer_norm(x, scale, bias, epsilon=1e-5)

    def loss(function):
        return jax.grad(lambda x: jnp.sum(jnp.sin(function(x))))(x)

    expected = loss(norm)
    for function in (
        jax.vmap(norm),
        jax.checkpoint(norm),
        lambda x: jax.lax.scan(lambda _, row: (None, norm(row)), None, x)[1],
    ):
        np.testing.assert_allclose(loss(function), expected, rtol=1e-5, atol=1e-5)


def test_strict_promotion():
    x, scale, bias, dy = draw((2, 3, 5), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.vjp(lambda *args: layer_norm(*args, epsilon=1e-5), x, scale, bias)[1](dy)
        jax.vjp(lambda *args: rms_norm(*args, epsilon=1e-5), x, scale)[1](dy)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda rngs: LayerNorm(6, rngs=rngs), {"scale", "bias"}),
        (lambda rngs: LayerNorm(6, use_bias=False, rngs=rngs), {"scale"}),
        (lambda rngs: RMSNorm(6, rngs=rngs), {"scale"}),
    ],
)
def test_module(make, names):
    norm = make(nnx.Rngs(0))
    params = nnx.state(norm, nnx.Param)
    assert set(params) == names
    assert all(p.get_metadata("out_sharding") == ("embed",) for p in params.values())
    x = draw((2, 3, 6), jnp.bfloat16)[0]
    assert norm(x).dtype == jnp.bfloat16
    plain = (
        plain_rms_norm(x, jnp.ones(6, x.dtype), 1e-6)
        if isinstance(norm, RMSNorm)
        else plain_layer_norm(x, jnp.ones(6, x.dtype), None, 1e-5)
    )
    np.testing.assert_allclose(np.asarray(norm(x), np.float32), np.asarray(plain, np.float32), rtol=2e-2, atol=2e-2)
