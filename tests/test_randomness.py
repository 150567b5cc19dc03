"""Dropout drops what it says, by bits that look random and are the same on every layout; each row of a batch has its own key."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.attention.test_ring import mesh_of
from transformer.attention.dispatch import attend
from transformer.attention.spec.mask import AttentionMask
from transformer.randomness import dropout, dropout_mask, fold_in, gumbel, row_keys, seeds_of, split
from transformer.sharding import constrain


def kept(key, shape=(64, 16, 32), rate=0.5):
    return np.asarray(dropout(jnp.ones(shape), rate, key)) > 0


def correlation(one, other):
    one, other = (x.astype(np.float64).ravel() - x.mean() for x in (one, other))
    return float((one * other).mean() / (one.std() * other.std()))


def test_what_is_dropped():
    x = jnp.ones((100, 100))
    dropped = dropout(x, 0.25, jax.random.key(0))
    np.testing.assert_allclose(np.unique(dropped), [0, 4 / 3], rtol=1e-6)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_every_element_row_and_key_is_dropped_at_the_rate(rate):
    """Within five standard deviations of a binomial count, in every direction."""
    masks = np.stack([kept(key, rate=rate) for key in jax.random.split(jax.random.key(0), 8)])
    for axes in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        counted = np.prod([masks.shape[axis] for axis in axes])
        error = np.abs(masks.mean(axes) - (1 - rate)).max()
        assert error < 5 * np.sqrt(rate * (1 - rate) / counted)


def test_neighbours_are_independent():
    first, second = (kept(key, (256, 64, 32)) for key in jax.random.split(jax.random.key(0)))
    pairs = {"keys": (first, second), "rows": (first[1:], first[:-1]), "places": (first[:, 1:], first[:, :-1])}
    pairs |= {"features": (first[..., 1:], first[..., :-1]), "distant": (first[..., 16:], first[..., :16])}
    for name, (one, other) in pairs.items():
        assert abs(correlation(one, other)) < 5 / np.sqrt(one.size), name
    # No bit of the hash is a bit of another one.
    counter = jnp.arange(1 << 16, dtype=jnp.uint32)
    eighths = [
        np.asarray(dropout_mask(seeds_of(jax.random.key(5), 1), rate, counter)[0][0]) for rate in (0.125, 0.25, 0.5)
    ]
    assert [mask.mean() for mask in eighths] == pytest.approx([0.875, 0.75, 0.5], abs=0.01)


def test_rows_of_the_plane_of_attention_differ():
    seeds = seeds_of(jax.random.key(0), 2)
    heads, queries, keys = (
        jnp.arange(n).reshape(shape) for n, shape in ((4, (4, 1, 1)), (32, (1, 32, 1)), (64, (1, 1, 64)))
    )
    mask = np.asarray(dropout_mask(seeds, 0.5, heads, queries, keys)[0])
    assert mask.shape == (2, 4, 32, 64)
    assert len({row.tobytes() for row in mask.reshape(-1, 64)}) == 2 * 4 * 32
    assert abs(mask.mean() - 0.5) < 0.02


def test_a_row_depends_on_its_own_key_alone():
    keys = row_keys(jax.random.key(1), 8)
    x = jnp.ones((8, 4, 16))
    whole = dropout(x, 0.5, keys)
    for rows in (slice(0, 4), slice(4, 8), slice(7, 8)):
        np.testing.assert_array_equal(dropout(x[rows], 0.5, keys[rows]), whole[rows])
        np.testing.assert_array_equal(gumbel(keys[rows], x[rows]), gumbel(keys, x)[rows])
    # One key for all rows is the same as its keys.
    np.testing.assert_array_equal(dropout(x, 0.5, jax.random.key(1)), whole)
    np.testing.assert_array_equal(
        jax.random.key_data(row_keys(jax.random.key(1), 4, start=4)), jax.random.key_data(keys[4:])
    )


def test_keys_are_split_row_by_row():
    keys = row_keys(jax.random.key(1), 3)
    parts, folded = split(keys, 5), fold_in(keys, 7)
    assert parts.shape == (5, 3) and split(keys[0], 5).shape == (5,)
    for row in range(3):
        np.testing.assert_array_equal(
            jax.random.key_data(parts[:, row]), jax.random.key_data(jax.random.split(keys[row], 5))
        )
        assert (jax.random.key_data(folded[row]) == jax.random.key_data(jax.random.fold_in(keys[row], 7))).all()


def test_examples_of_several_rows():
    keys = row_keys(jax.random.key(1), 3)
    several = jax.random.key_data(row_keys(keys, 6))
    assert len(np.unique(several, axis=0)) == 6
    np.testing.assert_array_equal(several[2:4], jax.random.key_data(row_keys(keys[1:2], 2)))
    with pytest.raises(ValueError, match="key: 3 keys for a batch of 4 rows"):
        row_keys(keys, 4)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_any_kind_of_key(kind):
    key = jax.random.key(0, impl=kind)
    assert seeds_of(key, 4).shape == (4, 2)
    assert len(np.unique(np.asarray(seeds_of(key, 4)))) == 8


def test_a_key_of_the_older_kind_is_the_same_key():
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    for function in (lambda key: row_keys(key, 4), lambda key: split(key, 2), lambda key: fold_in(key, 5)):
        np.testing.assert_array_equal(*(jax.random.key_data(function(key)) for key in (old, new)))


def test_the_gradient_drops_the_same():
    x, key = jnp.linspace(1, 2, 60).reshape(3, 20), jax.random.key(2)
    run = functools.partial(dropout, rate=0.3, key=key)
    out, pull = jax.vjp(run, x)
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0] * x, out, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(run, (x,), (jnp.ones_like(x),))[1] * x, out, rtol=1e-6)


def test_the_mask_is_not_kept_for_the_backward_pass():
    def loss(x, key):
        return jnp.sum(dropout(x * x, 0.5, key))

    _, pull = jax.vjp(loss, jnp.ones((4, 8)), jax.random.key(0))
    assert not [leaf for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.bool_]


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "sequence": 4}, {"sequence": 2, "tensor": 4}], ids=str)
def test_bits_are_those_of_one_device(axes):
    x = jnp.ones((8, 16, 32))

    def run(x):
        return dropout(constrain(x, "batch", "seq", "embed"), 0.5, jax.random.key(0))

    with mesh_of(**axes):
        got = jax.jit(run)(x)
    np.testing.assert_array_equal(got, run(x))


@pytest.mark.parametrize("backend", ["blockwise", "ring", "ulysses"])
def test_attention_drops_the_same_by_every_backend(backend):
    """Whatever its blocks are, and however heads, rows and positions are divided."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 32, 4, 8)), jnp.float32) for _ in range(3))

    def run(backend):
        options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(3), "backend": backend}
        return jax.jit(lambda *x: attend(*x, AttentionMask.causal(), **options)[0])(q, k, v)

    expected = run("reference")
    with mesh_of(data=2, sequence=2, tensor=2):
        np.testing.assert_allclose(run(backend), expected, atol=1e-5)
