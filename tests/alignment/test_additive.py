"""Additive attention against loops in float64, and the conventions of single-head attention."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from transformer.alignment.additive import additive_attention, additive_scores
from transformer.attention.common import check_name, check_shapes, context, headless_mask, softmax
from transformer.attention.spec.mask import AttentionMask

B, T, S, A, V = 2, 3, 5, 4, 6


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, A), (B, S, A), (B, S, V), (A,)))


def naive(q, k, values, vector, allowed):
    """The equations, one number at a time."""
    out, weights = np.zeros((B, T, V)), np.zeros((B, T, S))
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(S) if allowed[b, t, s]]
            powers = {s: np.exp(np.dot(vector, np.tanh(q[b, t] + k[b, s]))) for s in seen}
            for s in seen:
                weights[b, t, s] = powers[s] / sum(powers.values())
                out[b, t] += weights[b, t, s] * values[b, s]
    return out, weights


def masks():
    allowed = np.random.default_rng(1).random((B, T, S)) > 0.4
    allowed[0, 1] = False
    return allowed, AttentionMask.explicit(jnp.asarray(allowed)[:, None])


def test_values_are_those_of_the_equations():
    arrays, (allowed, mask) = inputs(), masks()
    exact = [np.asarray(x, np.float64) for x in arrays]
    for got, wanted in (
        (additive_attention(*arrays), naive(*exact, np.ones((B, T, S), bool))),
        (additive_attention(*arrays, mask), naive(*exact, allowed)),
    ):
        np.testing.assert_allclose(got[0], wanted[0], atol=1e-6)
        np.testing.assert_allclose(got[1], wanted[1], atol=1e-6)


def test_gradients():
    with jax.enable_x64(True):
        mask = masks()[1]
        arrays = inputs(jnp.float64)
        run = jax.jit(lambda *x: additive_attention(*x, mask))
        check_grads(run, arrays, order=1, modes=["rev"])


def test_rows_sum_to_one_unless_they_are_empty():
    allowed, mask = masks()
    weights = additive_attention(*inputs(), mask)[1]
    np.testing.assert_allclose(weights.sum(-1), allowed.any(-1), atol=1e-6)
    assert not np.asarray(weights)[~allowed].any()


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan():
    mask = AttentionMask.padding(jnp.zeros((B, S), bool))
    loss = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(additive_attention(*x, mask)[0]), (0, 1, 2, 3)))
    value, gradients = loss(*inputs())
    assert value == 0
    assert not any(np.asarray(gradient).any() for gradient in gradients)


def test_a_masked_key_has_no_influence():
    q, k, values, vector = inputs()
    mask = AttentionMask.padding(jnp.arange(S) < jnp.array([[3], [S]]))
    expected = additive_attention(q, k, values, vector, mask)[0]
    changed = additive_attention(q, k.at[0, 3:].set(9.0), values.at[0, 3:].set(1e4), vector, mask)[0]
    np.testing.assert_array_equal(changed, expected)
    gradients = jax.grad(lambda k, v: jnp.sum(jnp.sin(additive_attention(q, k, v, vector, mask)[0])), (0, 1))(k, values)
    assert not any(np.asarray(gradient[0, 3:]).any() for gradient in gradients)


def test_the_order_of_keys_does_not_matter():
    q, k, values, vector = inputs()
    order = np.random.default_rng(2).permutation(S)
    out, weights = additive_attention(q, k, values, vector)
    permuted, permuted_weights = additive_attention(q, k[:, order], values[:, order], vector)
    np.testing.assert_allclose(permuted, out, atol=1e-6)
    np.testing.assert_allclose(permuted_weights, weights[..., order], atol=1e-6)


def test_types():
    q, k, values, vector = inputs(jnp.bfloat16)
    out, weights = additive_attention(q, k, values, vector)
    assert (out.dtype, weights.dtype) == (jnp.bfloat16, jnp.float32)
    with jax.enable_x64(True):
        out, weights = additive_attention(*inputs(jnp.float64))
        assert (out.dtype, weights.dtype) == (jnp.float64, jnp.float64)


def test_softmax_and_context_alone():
    scores = jnp.asarray(np.random.default_rng(4).normal(size=(B, T, S)), jnp.bfloat16)
    weights = softmax(scores, jnp.ones((1, 1, S), bool))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, jax.nn.softmax(scores.astype(jnp.float32)), atol=1e-6)
    np.testing.assert_allclose(context(weights, jnp.ones((B, S, V))), 1, atol=1e-6)


def test_a_mask_with_heads_is_refused():
    mask = AttentionMask.explicit(jnp.ones((1, 4, T, S), bool))
    with pytest.raises(ValueError, match="it has 4 heads"):
        headless_mask(mask, B, T, S)
    with pytest.raises(ValueError, match="made for"):
        additive_attention(*inputs(), AttentionMask.padding(jnp.ones((B, S + 1), bool)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, u: (q[0], k, v, u), r"q is float32 \(3, 4\); expected floating \[B, T, A\]"),
        (lambda q, k, v, u: (q, k[..., 1:], v, u), r"k is float32 \(2, 5, 3\); expected floating \[B=2, S, A=4\]"),
        (lambda q, k, v, u: (q, k, v[:, 1:], u), r"values is .* expected floating \[B=2, S=5, V\]"),
        (lambda q, k, v, u: (q, k, v, u[1:]), r"vector is float32 \(3,\)"),
        (lambda q, k, v, u: (q.astype(jnp.int32), k, v, u), r"q is int32"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(additive_attention)(*change(*inputs()))
    if "values" not in message:
        q, k, _, u = change(*inputs())
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(additive_scores)(q, k, u)


def test_checks():
    check_shapes("f", x=(None, "B T"), y=(jnp.zeros((2, 2), bool), "B T", jnp.bool_))
    with pytest.raises(ValueError, match=r"f: y is float32 .*; expected bool \[B, T\]"):
        check_shapes("f", y=(jnp.zeros((2, 2)), "B T", jnp.bool_))
    with pytest.raises(ValueError, match=r"f: kind='dott' does not exist; there are dot, general. Did you mean 'dot'"):
        check_name("f", "kind", "dott", {"dot": 1, "general": 2})
