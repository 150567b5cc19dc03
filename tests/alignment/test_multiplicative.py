"""Luong's attention, by its functions and its alignments, against loops in float64: scores, windows, predicted positions."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from transformer.alignment.multiplicative import attentional_state, dot_scores, local_weights, predicted_positions
from transformer.alignment.registry import make_alignment
from transformer.alignment.scored import AdditiveConfig, LocalConfig, MultiplicativeConfig
from transformer.attention.spec.mask import AttentionMask

B, T, S, D, E, A = 2, 3, 7, 4, 5, 6
VALID = np.arange(S) < np.array([[5], [S]])
KINDS = {
    "dot": MultiplicativeConfig(kind="dot"),
    "general": MultiplicativeConfig(kind="general"),
    "concat": AdditiveConfig(kind="concat", dim=A),
    "local_m": LocalConfig(kind="local_m", window=2),
    "local_p": LocalConfig(kind="local_p", window=2, dim=A),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def key_dim(kind):
    return D if kind == "dot" else E


@functools.cache
def alignment(kind, dtype=jnp.float32):
    init = nnx.initializers.normal(0.7)
    return make_alignment(KINDS[kind], D, key_dim(kind), kernel_init=init, dtype=dtype, rngs=nnx.Rngs(0))


def inputs(kind, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, D), (B, S, key_dim(kind))))


def attend(kind, query, states, valid, dtype=jnp.float32):
    """Contexts and weights of all queries, [B, T, E] and [B, T, S]."""
    graphdef, params = nnx.split(alignment(kind, dtype))

    @jax.jit
    def run(params, query, states, valid):
        module = nnx.merge(graphdef, params)
        source = module.prepare(states, valid, states[:, 0])
        steps = [jnp.full(B, step, jnp.int32) for step in range(T)]
        found = [module(query[:, t], source, step, return_weights=True) for t, step in enumerate(steps)]
        return tuple(jnp.stack(each, axis=1) for each in zip(*found, strict=True))

    return run(params, query, states, jnp.asarray(valid))


def naive(kind, query, keys, valid):
    """The equations, one query at a time, with the alignment's own parameters."""
    w = {
        name: np.asarray(linear.kernel[...], np.float64)
        for name in ("query", "key", "vector", "position", "position_vector")
        if (linear := getattr(alignment(kind), name, None)) is not None
    }
    query, keys = np.asarray(query, np.float64), np.asarray(keys, np.float64)
    contexts, weights = np.zeros((B, T, keys.shape[-1])), np.zeros((B, T, S))
    for b, t in np.ndindex(B, T):
        h = query[b, t]
        if kind == "dot":
            scores = keys[b] @ h
        elif kind == "concat":
            joined = np.concatenate([np.broadcast_to(h, (S, D)), keys[b]], axis=-1)
            scores = np.tanh(joined @ np.concatenate([w["query"], w["key"]])) @ w["vector"]
        else:
            scores = keys[b] @ (h @ w["query"])
        centre = t
        if kind == "local_p":
            centre = valid[b].sum() / (1 + np.exp(-w["position_vector"] @ np.tanh(h @ w["position"])))
        seen = [s for s in range(S) if valid[b, s] and (not kind.startswith("local") or abs(s - centre) <= 2)]
        powers = {s: np.exp(scores[s]) for s in seen}
        for s in seen:
            weights[b, t, s] = powers[s] / sum(powers.values())
            if kind == "local_p":
                sigma = 2 / 2
                weights[b, t, s] *= np.exp(-((s - centre) ** 2) / (2 * sigma**2))
        contexts[b, t] = weights[b, t] @ keys[b]
    return contexts, weights


@EVERY
@pytest.mark.parametrize("valid", [VALID, np.ones_like(VALID)], ids=["padded", "whole"])
def test_values_are_those_of_the_equations(kind, valid):
    query, keys = inputs(kind)
    for array, expected in zip(attend(kind, query, keys, valid), naive(kind, query, keys, valid), strict=True):
        np.testing.assert_allclose(array, expected, atol=3e-6)


def test_gradients():
    with jax.enable_x64(True):
        query, keys = inputs("general", jnp.float64)
        rng = np.random.default_rng(1)
        w, vector, combine = (jnp.asarray(rng.normal(size=shape)) for shape in ((D, E), (E,), (E + D, D)))

        @jax.jit
        def run(query, keys, w, vector, combine):
            centres = predicted_positions(query @ w, vector, jnp.array([5, 7]))
            weights = local_weights(dot_scores(query @ w, keys), centres, 2, gaussian=True)
            return attentional_state(jnp.einsum("BTS,BSE->BTE", weights, keys), query, lambda x: x @ combine)

        check_grads(run, (query, keys, w, vector, combine), order=1, modes=["rev"], rtol=1e-4)


@EVERY
def test_every_parameter_is_learned(kind):
    graphdef, params = nnx.split(alignment(kind))
    query, keys = inputs(kind)

    @jax.jit
    @jax.grad
    def gradient(params):
        module = nnx.merge(graphdef, params)
        source = module.prepare(keys, jnp.asarray(VALID), keys[:, 0])
        return jnp.sum(jnp.sin(module(query[:, 1], source, jnp.ones(B, jnp.int32))[0]))

    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(params)))


@EVERY
def test_a_source_of_padding_alone_gives_zeros_and_no_nan(kind):
    (query, keys), nothing = inputs(kind), np.zeros_like(VALID)
    contexts, weights = attend(kind, query, keys, nothing)
    assert not np.asarray(contexts).any() and not np.asarray(weights).any()
    gradient = jax.grad(lambda keys: jnp.sum(attend(kind, query, keys, nothing)[0]))(keys)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["dot", "general", "concat"])
def test_the_order_of_keys_does_not_matter_globally(kind):
    query, keys = inputs(kind)
    order, whole = np.random.default_rng(2).permutation(S), np.ones_like(VALID)
    expected = attend(kind, query, keys, whole)[0]
    np.testing.assert_allclose(attend(kind, query, keys[:, order], whole)[0], expected, atol=1e-6)


def test_types():
    contexts, weights = attend("dot", *inputs("dot", jnp.bfloat16), VALID, dtype=jnp.bfloat16)
    assert (contexts.dtype, weights.dtype) == (jnp.bfloat16, jnp.float32)


def test_inputs_that_do_not_fit():
    query, keys = inputs("general")
    with pytest.raises(ValueError, match="window=0; expected 1 or more"):
        local_weights(jnp.ones((B, T, S)), jnp.zeros((B, T)), 0)
    with pytest.raises(ValueError, match=r"k is float32 \(2, 7, 5\); expected floating \[B=2, S, E=4\]"):
        inspect.unwrap(dot_scores)(query, keys)
    mask = AttentionMask.explicit(jnp.ones((1, 3, T, S), bool))
    with pytest.raises(ValueError, match="it has 3 heads"):
        local_weights(jnp.ones((B, T, S)), jnp.zeros((B, T)), 2, mask)
