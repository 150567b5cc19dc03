"""Luong's attention against loops in float64: scores, windows, predicted positions, the attentional state."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from transformer.attention.mask import AttentionMask
from transformer.attention.multiplicative import (
    SCOPES,
    SCORES,
    LuongAttention,
    attentional_state,
    dot_scores,
    local_weights,
    predicted_positions,
)

B, T, S, D, E = 2, 3, 7, 4, 5
VALID = np.arange(S) < np.array([[5], [S]])


def make(score="general", scope="global", key_dim=E, **options):
    normal = nnx.initializers.normal(0.7)
    return LuongAttention(
        D, key_dim, score=score, scope=scope, window=2, kernel_init=normal, rngs=nnx.Rngs(0), **options
    )


def call(module, *args, **kwargs):
    """The module's call as one compiled program."""
    graphdef, state = nnx.split(module)
    return jax.jit(lambda state, args, kwargs: nnx.merge(graphdef, state)(*args, **kwargs))(state, args, kwargs)


def inputs(key_dim=E, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, D), (B, S, key_dim)))


def naive(attention, query, keys, valid, lengths):
    """The equations, one query at a time, with the module's own parameters."""
    w = {
        name: None if (linear := getattr(attention, name)) is None else np.asarray(linear.kernel[...], np.float64)
        for name in ("general", "query", "key", "vector", "position", "position_vector", "combine")
    }
    query, keys = np.asarray(query, np.float64), np.asarray(keys, np.float64)
    states, weights = np.zeros((B, T, D)), np.zeros((B, T, S))
    for b, t in np.ndindex(B, T):
        h = query[b, t]
        score = {
            "dot": lambda k, h=h: h @ k,
            "general": lambda k, h=h: h @ w["general"] @ k,
            "concat": lambda k, h=h: w["vector"] @ np.tanh(
                np.concatenate([w["query"], w["key"]]).T @ np.concatenate([h, k])
            ),
        }[attention.score]  # fmt: skip
        centre = t
        if attention.scope == "local-p":
            centre = lengths[b] / (1 + np.exp(-w["position_vector"] @ np.tanh(h @ w["position"])))
        seen = [s for s in range(S) if valid[b, s] and (attention.scope == "global" or abs(s - centre) <= 2)]
        powers = {s: np.exp(score(keys[b, s])) for s in seen}
        for s in seen:
            weights[b, t, s] = powers[s] / sum(powers.values())
            if attention.scope == "local-p":
                sigma = 2 / 2
                weights[b, t, s] *= np.exp(-((s - centre) ** 2) / (2 * sigma**2))
        states[b, t] = np.tanh(np.concatenate([weights[b, t] @ keys[b], h]) @ w["combine"])
    return states, weights


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", SCORES)
def test_values_are_those_of_the_equations(score, scope):
    key_dim = D if score == "dot" else E
    attention, (query, keys) = make(score, scope, key_dim), inputs(key_dim)
    lengths = VALID.sum(1)
    got = call(attention, query, keys, AttentionMask.padding(jnp.asarray(VALID)), lengths_B=jnp.asarray(lengths))
    for array, expected in zip(got, naive(attention, query, keys, VALID, lengths), strict=True):
        np.testing.assert_allclose(array, expected, atol=3e-6)
    got = call(attention, query, keys)
    for array, expected in zip(got, naive(attention, query, keys, np.ones_like(VALID), [S] * B), strict=True):
        np.testing.assert_allclose(array, expected, atol=3e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_query_at_a_time_as_a_decoder_asks(scope):
    attention, (query, keys) = make("concat", scope), inputs()
    state, weights = call(attention, query, keys)
    for t in range(T):
        one = call(attention, query[:, t : t + 1], keys, positions_BT=jnp.full((B, 1), t))
        np.testing.assert_allclose(one[0][:, 0], state[:, t], atol=1e-6)
        np.testing.assert_allclose(one[1][:, 0], weights[:, t], atol=1e-6)


def test_gradients():
    with jax.enable_x64(True):
        query, keys = inputs(dtype=jnp.float64)
        rng = np.random.default_rng(1)
        w, vector, combine = (jnp.asarray(rng.normal(size=shape)) for shape in ((D, E), (E,), (E + D, D)))

        @jax.jit
        def run(query, keys, w, vector, combine):
            centres = predicted_positions(query @ w, vector, jnp.array([5, 7]))
            weights = local_weights(dot_scores(query @ w, keys), centres, 2, gaussian=True)
            return attentional_state(jnp.einsum("BTS,BSE->BTE", weights, keys), query, lambda x: x @ combine)

        check_grads(run, (query, keys, w, vector, combine), order=1, modes=["rev"], rtol=1e-4)


def test_the_predicted_position_is_learned():
    attention, (query, keys) = make(scope="local-p"), inputs()
    graphdef, params = nnx.split(attention)
    gradients = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(query, keys)[0]))))(params)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("scope", SCOPES)
def test_masked_keys_and_empty_rows(scope):
    attention, (query, keys) = make("general", scope), inputs()
    mask = AttentionMask.padding(jnp.asarray(VALID).at[1].set(False))

    run = jax.jit(lambda keys: attention(query, keys, mask))

    state, weights = run(keys)
    np.testing.assert_array_equal(run(keys.at[0, 5:].set(1e3))[0][0], state[0])
    assert not np.asarray(weights[1]).any()
    if scope != "local-p":
        np.testing.assert_allclose(weights[0].sum(-1), 1, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda keys: jnp.sum(run(keys)[0])))(keys)
    assert np.isfinite(gradient).all() and not np.asarray(gradient[0, 5:]).any() and not np.asarray(gradient[1]).any()


def test_the_order_of_keys_does_not_matter_globally():
    attention, (query, keys) = make("concat"), inputs()
    order = np.random.default_rng(2).permutation(S)
    np.testing.assert_allclose(call(attention, query, keys[:, order])[0], call(attention, query, keys)[0], atol=1e-6)


def test_types():
    attention, (query, keys) = make("dot", key_dim=D, dtype=jnp.bfloat16), inputs(D, jnp.bfloat16)
    state, weights = call(attention, query, keys)
    assert (state.dtype, weights.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"score": "generall"},
            "score='generall' does not exist; there are dot, general, concat. Did you mean 'general'",
        ),
        ({"scope": "local"}, "scope='local' does not exist"),
        ({"score": "dot"}, "query_dim=4 and key_dim=5; score='dot' needs them equal"),
    ],
)
def test_modules_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_inputs_that_do_not_fit():
    query, keys = inputs()
    with pytest.raises(ValueError, match="window=0; expected 1 or more"):
        LuongAttention(D, E, window=0, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="window=0; expected 1 or more"):
        local_weights(jnp.ones((B, T, S)), jnp.zeros((B, T)), 0)
    with pytest.raises(ValueError, match=r"k is float32 \(2, 7, 5\); expected floating \[B=2, S, E=4\]"):
        inspect.unwrap(dot_scores)(query, keys)
    with pytest.raises(ValueError, match=r"keys is float32 \(1, 7, 5\)"):
        inspect.unwrap(LuongAttention.__call__)(make(), query, keys[:1])
    with pytest.raises(ValueError, match=r"lengths is float32 \(2,\); expected integer \[B=2\]"):
        inspect.unwrap(LuongAttention.__call__)(make(scope="local-p"), query, keys, lengths_B=jnp.ones(B))
    with pytest.raises(ValueError, match="it has 3 heads"):
        make()(query, keys, AttentionMask.explicit(jnp.ones((1, 3, T, S), bool)))
