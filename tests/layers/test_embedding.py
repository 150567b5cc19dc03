"""The embedding and its tied head against their formulas in float64, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers.embedding import Embedding, embed_attend, embed_lookup


def draw(vocab, dim, shape, dtype=jnp.float32):
    rng = np.random.default_rng(vocab + dim)
    table = jnp.asarray(rng.normal(size=(vocab, dim)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, vocab, shape), jnp.int32)
    return table, tokens, jnp.asarray(rng.normal(size=(*shape, dim)), dtype)


@pytest.mark.parametrize(("vocab", "dim", "shape"), [(1, 1, (1,)), (5, 3, ()), (7, 5, (2, 33)), (300, 8, (2, 3, 4))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lookup_and_its_gradient(vocab, dim, shape, dtype):
    table, tokens, dy = draw(vocab, dim, shape, dtype)
    y, pullback = jax.vjp(lambda table: embed_lookup(table, tokens, dtype=dtype), table)
    assert y.dtype == dtype
    np.testing.assert_array_equal(np.asarray(y), np.asarray(table)[np.asarray(tokens)].astype(dtype))
    expected = np.zeros((vocab, dim))
    np.add.at(expected, np.asarray(tokens), np.asarray(dy, np.float64))
    (dtable,) = pullback(dy)
    assert dtable.dtype == jnp.float32
    np.testing.assert_allclose(dtable, expected, rtol=1e-5, atol=1e-5)


def test_lookup_adds_a_frequent_token_in_the_tables_type():
    table, tokens, dy = jnp.zeros((2, 1)), jnp.zeros((4096,), jnp.int32), jnp.ones((4096, 1), jnp.bfloat16)
    (dtable,) = jax.vjp(lambda table: embed_lookup(table, tokens, dtype=jnp.bfloat16), table)[1](dy)
    # In bfloat16 the sum would stop at 256.
    np.testing.assert_array_equal(dtable, [[4096.0], [0.0]])


def test_a_token_outside_the_table_is_nan():
    table, _, _ = draw(4, 3, (1,))
    y = embed_lookup(table, jnp.asarray([3, 4], jnp.int32))
    assert bool(jnp.isfinite(y[0]).all())
    assert bool(jnp.isnan(y[1]).all())


@pytest.mark.parametrize(("vocab", "dim", "shape"), [(1, 1, (1,)), (5, 3, ()), (7, 5, (2, 33)), (300, 8, (2, 3, 4))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attend_and_its_gradients(vocab, dim, shape, dtype):
    table, _, x = draw(vocab, dim, shape, dtype)
    dlogits = jnp.asarray(np.random.default_rng(0).normal(size=(*shape, vocab)), jnp.float32)
    logits, pullback = jax.vjp(lambda x, table: embed_attend(x, table, dtype=dtype), x, table)
    dx, dtable = pullback(dlogits)
    assert logits.dtype == dtable.dtype == jnp.float32
    assert dx.dtype == dtype
    wide_x, wide_table, wide_d = (np.asarray(a, np.float64) for a in (x, table, dlogits))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    flat_d, flat_x = wide_d.reshape(-1, vocab), wide_x.reshape(-1, dim)
    for actual, expected in ((logits, wide_x @ wide_table.T), (dx, wide_d @ wide_table), (dtable, flat_d.T @ flat_x)):
        size = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance * size)


def test_attend_keeps_float32_logits_from_bfloat16():
    x, table = jnp.ones((1, 1024), jnp.bfloat16), jnp.ones((1, 1024), jnp.float32).at[0, 0].set(2.0)
    # 1025 is no bfloat16 number.
    np.testing.assert_array_equal(embed_attend(x, table, dtype=jnp.bfloat16), [[1025.0]])


def test_module_ties_both_uses():
    embed = Embedding(11, 6, init=nnx.initializers.normal(1.0), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert embed.table.get_metadata("out_sharding") == ("vocab", "embed")
    assert embed.table[...].dtype == jnp.float32
    tokens = draw(11, 6, (2, 3))[1]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        graphdef, params = nnx.split(embed)

        def score(params):
            embed = nnx.merge(graphdef, params)
            hidden = embed(tokens)
            assert hidden.dtype == jnp.bfloat16
            assert hidden.shape == (2, 3, 6)
            return embed.attend(hidden).sum()

        gradient = jax.grad(score)(params)
    assert gradient["table"][...].shape == (11, 6)
    assert bool(jnp.isfinite(gradient["table"][...]).all())
