"""Sparsemax is a projection, 1.5-entmax solves its problem, and both differentiate as written."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from transformer.alignment.sparse_softmax import NORMALIZERS, entmax15, sparse_attention, sparsemax
from transformer.attention.dispatch import attend
from transformer.attention.spec.mask import AttentionMask

SPARSE = {"sparsemax": jax.jit(sparsemax), "entmax15": jax.jit(entmax15)}
SCORES = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=9)


def bisected(name, z):
    """The map by bisection of its threshold, in float64."""
    z = np.asarray(z, np.float64) / (2 if name == "entmax15" else 1)
    power = 2 if name == "entmax15" else 1
    low, high = z.max() - 1, z.max()
    for _ in range(80):
        middle = (low + high) / 2
        if (np.maximum(z - middle, 0) ** power).sum() > 1:
            low = middle
        else:
            high = middle
    return np.maximum(z - low, 0) ** power


@pytest.mark.parametrize("name", SPARSE)
@given(scores=SCORES)
@settings(max_examples=40, deadline=None)
def test_values_are_those_of_bisection(name, scores):
    scores = np.asarray(scores, np.float32)
    padded = jnp.asarray(np.pad(scores, (0, 9 - len(scores))))
    p = np.asarray(SPARSE[name](padded, jnp.arange(9) < len(scores)))
    np.testing.assert_allclose(p[: len(scores)], bisected(name, scores), atol=1e-5)
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    assert (p >= 0).all() and not p[len(scores) :].any()


@given(scores=SCORES, other=st.lists(st.floats(0, 1, width=32), min_size=9, max_size=9))
@settings(max_examples=40, deadline=None)
def test_sparsemax_is_the_nearest_point_of_the_simplex(scores, other):
    z = np.pad(np.asarray(scores, np.float32), (0, 9 - len(scores)))
    other = np.asarray(other) + 1e-6
    other = other / other.sum()
    p = np.asarray(SPARSE["sparsemax"](jnp.asarray(z)), np.float64)
    # A projection onto a convex set: no point of the set lies on the scores' side of p.
    assert np.dot(z - p, other - p) < 1e-4


@given(scores=SCORES, order=st.permutations(range(9)), shift=st.floats(-5, 5, width=32))
@settings(max_examples=30, deadline=None)
def test_permuted_and_shifted_scores(scores, order, shift):
    z = jnp.asarray(np.pad(np.asarray(scores, np.float32), (0, 9 - len(scores))))
    for normalize in SPARSE.values():
        np.testing.assert_allclose(
            normalize(z[jnp.asarray(order)] + shift), normalize(z)[jnp.asarray(order)], atol=1e-5
        )


@pytest.mark.parametrize("name", SPARSE)
def test_gradients(name):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        z = jnp.asarray(rng.normal(size=(3, 4, 7)))
        allowed = jnp.asarray(rng.random((3, 1, 7)) > 0.3)
        check_grads(lambda z: SPARSE[name](jnp.asarray(z)), (z,), order=1)
        check_grads(lambda z: SPARSE[name](jnp.asarray(z), allowed), (z,), order=1)


@pytest.mark.parametrize("name", SPARSE)
def test_jacobian_is_symmetric_and_its_rows_sum_to_zero(name):
    jacobian = jax.jacrev(SPARSE[name])(jnp.array([0.3, 1.0, -0.2, 0.9, -4.0]))
    np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-6)
    np.testing.assert_allclose(jacobian.sum(0), 0, atol=1e-6)
    assert not np.asarray(jacobian[4]).any()


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_row_that_allows_nothing_gives_zeros_and_no_nan(name):
    allowed = jnp.array([[True, False, True], [False, False, False]])
    z = jnp.array([[1.0, 1e9, 0.5], [1.0, 2.0, 3.0]])
    value, gradient = jax.jit(jax.value_and_grad(lambda z: jnp.sum(NORMALIZERS[name](z, allowed) ** 2)))(z)
    assert np.isfinite(value)
    assert not np.asarray(NORMALIZERS[name](z, allowed)[1]).any()
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~np.asarray(allowed)].any()


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e30])
def test_extreme_scores(name, scale):
    p = np.asarray(SPARSE[name](jnp.array([1.0, 2.0, 2.0, -3.0]) * scale))
    np.testing.assert_allclose(p, [0, 0.5, 0.5, 0] if scale > 1 else [0.25] * 4, atol=1e-5)


def test_results_are_in_float32_or_wider():
    assert sparsemax(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert entmax15(jnp.ones(3, jnp.float64)).dtype == jnp.float64


def inputs(num_kv_heads=2):
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 4, 8), *[(2, 5, num_kv_heads, 8)] * 2)
    )


@pytest.mark.parametrize("name", NORMALIZERS)
def test_attention_by_loops(name):
    q, k, v = inputs()
    mask = AttentionMask.causal(1)
    out, weights = sparse_attention(q, k, v, mask, normalizer=name)
    for b, t, n in np.ndindex(2, 3, 4):
        scores = np.asarray(k, np.float64)[b, : t + 2, n // 2] @ np.asarray(q, np.float64)[b, t, n] / np.sqrt(8)
        p = np.exp(scores) / np.exp(scores).sum() if name == "softmax" else bisected(name, scores)
        np.testing.assert_allclose(weights[b, n, t], np.pad(p, (0, 5 - t - 2)), atol=1e-6)
        np.testing.assert_allclose(out[b, t, n], p @ np.asarray(v)[b, : t + 2, n // 2], atol=1e-5)


def test_attention_by_softmax_is_the_reference():
    q, k, v = inputs()
    got = sparse_attention(q, k, v, AttentionMask.causal(2), normalizer="softmax")[0]
    np.testing.assert_allclose(got, attend(q, k, v, AttentionMask.causal(2), backend="reference")[0], atol=1e-6)


def test_inputs_that_do_not_fit():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="normalizer='entmax' does not exist"):
        sparse_attention(q, k, v, normalizer="entmax")
    with pytest.raises(ValueError, match="q has 3 heads, not a multiple of k's 2"):
        sparse_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match=r"v is float32 \(2, 4, 2, 8\)"):
        inspect.unwrap(sparse_attention)(q, k, v[:, 1:])
    with pytest.raises(ValueError, match=r"scores is int32"):
        inspect.unwrap(sparsemax)(jnp.arange(3))
