"""The hand-written backward passes are the automatic ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers.feed_forward import ACTIVATIONS, FeedForward, gelu_tanh
from transformer.layers.linear import Linear, dense

RNG = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_dense_and_its_gradient(leading, with_bias):
    x, kernel, bias = draw(*leading, 4), draw(4, 6), draw(6) if with_bias else None

    def plain(x, kernel, bias):
        return jnp.sum(jnp.sin(x @ kernel + (0 if bias is None else bias)))

    def ours(x, kernel, bias):
        return jnp.sum(jnp.sin(dense(x, kernel, bias)))

    arguments = (0, 1, 2) if with_bias else (0, 1)
    expected = jax.value_and_grad(plain, arguments)(x, kernel, bias)
    got = jax.value_and_grad(ours, arguments)(x, kernel, bias)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def test_dense_keeps_the_types_of_its_arguments():
    x, kernel, bias = draw(3, 4, dtype=jnp.bfloat16), draw(4, 6, dtype=jnp.bfloat16), draw(6, dtype=jnp.bfloat16)
    gradients = jax.grad(lambda *a: jnp.sum(dense(*a)), (0, 1, 2))(x, kernel, bias)
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype(jnp.bfloat16)}


def test_linear_contracts_and_makes_several_dims():
    normal = nnx.initializers.normal(1.0)
    into = Linear((4,), (2, 3), axes=("embed", "heads", "head_dim"), kernel_init=normal, rngs=nnx.Rngs(0))
    out = Linear((2, 3), (4,), axes=("heads", "head_dim", "embed"), kernel_init=normal, rngs=nnx.Rngs(1))
    x = draw(5, 7, 4)
    heads = into(x)
    np.testing.assert_allclose(heads, jnp.einsum("btd,dnh->btnh", x, into.kernel[...]), atol=1e-5)
    np.testing.assert_allclose(out(heads), jnp.einsum("btnh,nhd->btd", heads, out.kernel[...]), rtol=1e-4, atol=1e-4)
    assert into.bias.get_metadata("out_sharding") == ("heads", "head_dim")


def test_gelu_is_jaxs():
    x = draw(50) * 4
    for f, g in (
        (gelu_tanh, jax.nn.gelu),
        (jax.grad(lambda x: gelu_tanh(x).sum()), jax.grad(lambda x: jax.nn.gelu(x).sum())),
    ):
        np.testing.assert_allclose(f(x), g(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward(activation):
    normal = nnx.initializers.normal(1.0)
    layer = FeedForward(4, 6, activation=activation, kernel_init=normal, out_init=normal, rngs=nnx.Rngs(0))
    x = draw(2, 3, 4)
    function, gated = ACTIVATIONS[activation]
    up = layer.up(x)
    hidden = function(layer.gate(x)) * up if gated else function(up)
    np.testing.assert_allclose(layer(x), layer.down(hidden), rtol=1e-5)
    assert (layer.gate is None) != gated


@pytest.mark.parametrize(("wide", "narrow"), [(128, 32), (32, 128)])
def test_dense_in_bfloat16_narrows_and_widens(wide, narrow):
    x, kernel = draw(2, 8, wide, dtype=jnp.bfloat16), draw(wide, narrow, dtype=jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda x, kernel: dense(x, kernel, None).astype(jnp.float32).sum(), 1))(x, kernel)
    expected = np.asarray(x, np.float32).sum((0, 1))[:, None] * np.ones((1, narrow))
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=1e-2)
