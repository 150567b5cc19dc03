"""Linear attention against loops in float64, in all its forms; and what feature maps promise."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from transformer.attention.linear.feature_maps import (
    FEATURE_MAPS,
    dpfp,
    elu_plus_one,
    feature_dim,
    feature_map_of,
    orthogonal_projection,
    positive_random_features,
    unit_length,
    unit_sum,
)
from transformer.attention.linear.linear_attention import linear_attention

B, T, N, K, H, V = 2, 11, 4, 2, 3, 5
DOCUMENTS = np.array([[1] * 3 + [2] * 6 + [0] * 2, [4] * 5 + [0] * 1 + [5] * 5])
VALID = np.random.default_rng(5).random((B, T)) > 0.3
CHUNKS = (None, 4, 1)
CONDITIONS = {
    "plain": {},
    "padding and documents": {"valid_BS": VALID, "segments_BT": DOCUMENTS},
}


run = jax.jit(linear_attention, static_argnames=("causal", "feature_map", "chunk"))


def inputs(dtype=jnp.float32, num_keys=T):
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, num_keys, K, H), (B, num_keys, K, V))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def naive(q, k, v, causal, valid_BS=None, segments_BT=None):
    """The equation, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))  # noqa: E731
    out = np.zeros((B, q.shape[1], N, V))
    for b, t, n in np.ndindex(*out.shape[:3]):
        numerator, denominator = np.zeros(V), 0.0
        for s in range(t + 1 if causal else k.shape[1]):
            same = segments_BT is None or (segments_BT[b, s] == segments_BT[b, t] != 0)
            if same and (valid_BS is None or valid_BS[b, s]):
                weight = phi(q[b, t, n]) @ phi(k[b, s, n // (N // K)])
                numerator += weight * v[b, s, n // (N // K)]
                denominator += weight
        out[b, t, n] = numerator / (denominator + 1e-6)
    return out


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("causal", [True, False])
def test_values_are_those_of_the_equation(causal, chunk, condition):
    arrays = inputs()
    arguments = {name: jnp.asarray(x) for name, x in CONDITIONS[condition].items()}
    out, state = run(*arrays, causal=causal, chunk=chunk, **arguments)
    np.testing.assert_allclose(out, naive(*arrays, causal, **CONDITIONS[condition]), atol=1e-5)
    assert (state is not None) == causal


@pytest.mark.parametrize("chunk", CHUNKS)
def test_cross_attention(chunk):
    arrays = inputs(num_keys=7)
    np.testing.assert_allclose(run(*arrays, causal=False, chunk=chunk)[0], naive(*arrays, False), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients(causal):
    with jax.enable_x64(True):
        arrays = inputs(jnp.float64)
        arguments = {name: jnp.asarray(x) for name, x in CONDITIONS["padding and documents"].items()}

        @functools.partial(jax.jit, static_argnums=0)
        def attend(chunk, *arrays):
            return run(*arrays, causal=causal, chunk=chunk, **arguments)[0]

        check_grads(lambda *x: attend(4, *map(jnp.asarray, x)), arrays, order=1, modes=["rev"], rtol=1e-4)
        grad = jax.jit(jax.grad(lambda chunk, *x: jnp.sum(jnp.sin(attend(chunk, *x))), (1, 2, 3)), static_argnums=0)
        for chunk in (None, 1):
            for got, wanted in zip(grad(chunk, *arrays), grad(4, *arrays), strict=True):
                np.testing.assert_allclose(got, wanted, atol=1e-10)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_masked_key_has_no_influence_and_an_empty_row_is_zero(causal, chunk):
    q, k, v = inputs()
    valid = jnp.asarray(VALID).at[1].set(False)

    def attend(k, v):
        return run(q, k, v, causal=causal, chunk=chunk, valid_BS=valid)[0]

    hidden = ~valid[..., None, None]
    np.testing.assert_array_equal(attend(jnp.where(hidden, 3.0, k), jnp.where(hidden, -9.0, v)), attend(k, v))
    assert not np.asarray(attend(k, v)[1]).any()
    for gradient in jax.jit(jax.grad(lambda k, v: jnp.sum(jnp.sin(attend(k, v))), (0, 1)))(k, v):
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[~np.asarray(valid)].any()


def test_weights_sum_to_one_and_the_order_of_keys_does_not_matter():
    q, k, v = inputs()
    attend = functools.partial(run, causal=False)
    np.testing.assert_allclose(attend(q, k, jnp.ones_like(v))[0], 1, atol=1e-5)
    order = np.random.default_rng(3).permutation(T)
    np.testing.assert_allclose(attend(q, k[:, order], v[:, order])[0], attend(q, k, v)[0], atol=1e-5)


def test_causal_prefix_is_stable_and_the_state_goes_on():
    q, k, v = inputs()
    out, last = run(q, k, v)
    first, state = run(q[:, :6], k[:, :6], v[:, :6], chunk=4)
    np.testing.assert_allclose(first, out[:, :6], atol=1e-6)
    second, state = run(q[:, 6:], k[:, 6:], v[:, 6:], chunk=4, state_BKMV=state)
    np.testing.assert_allclose(second, out[:, 6:], atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_types():
    out, state = run(*inputs(jnp.bfloat16))
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: ((q, k[:, 1:], v[:, 1:]), {}), "when causal or with segments, T and S are equal"),
        (
            lambda q, k, v: ((q, k, v[:, 1:]), {}),
            r"v is float32 \(2, 10, 2, 5\); expected floating \[B=2, S=11, K=2, V\]",
        ),
        (lambda q, k, v: ((q, k, v), {"feature_map": "softmax"}), "name='softmax' does not exist"),
        (lambda q, k, v: ((q, k, v), {"chunk": -1}), "chunk=-1"),
        (lambda q, k, v: ((q, k, v), {"valid_BS": jnp.ones((B, T))}), "valid is float32"),
        (lambda q, k, v: ((q[:, :, :3], k, v), {"causal": False}), "q has 3 heads"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    arrays, options = change(*inputs())
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(linear_attention)(*arrays, **options)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_maps_keep_type_and_leading_dims(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
    features = FEATURE_MAPS[name](x)
    assert features.shape == (2, 5, feature_dim(FEATURE_MAPS[name], 4))
    assert features.dtype == x.dtype
    np.testing.assert_allclose(features[1, 2], FEATURE_MAPS[name](x[1, 2]), atol=1e-6)
    if name != "identity":
        assert (features >= 0).all()


def test_maps_by_their_definitions():
    x = jnp.array([0.5, -2.0, 1.0])
    np.testing.assert_allclose(elu_plus_one(x), [1.5, np.exp(-2), 2], rtol=1e-6)
    r = [0.5, 0, 1, 0, 2, 0]
    expected = [r[i] * r[(i - j) % 6] for j in (1, 2) for i in range(6)]
    np.testing.assert_allclose(dpfp(x, nu=2), expected, atol=1e-6)
    assert feature_map_of(elu_plus_one) is feature_map_of("elu")
    np.testing.assert_allclose(jnp.linalg.norm(unit_length(x)), 1, atol=1e-5)
    np.testing.assert_allclose(unit_sum(jnp.abs(x)), [1 / 7, 4 / 7, 2 / 7], atol=1e-5)


def test_dpfp_makes_more_orthogonal_features_than_dims():
    """All 2 H patterns of one neighbouring pair."""
    x = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    gram = dpfp(x) @ dpfp(x).T
    np.testing.assert_allclose(gram, np.eye(4), atol=1e-6)


def test_random_features_estimate_the_softmax_kernel():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(6, 8)) / 2, jnp.float32) for _ in range(2))
    phi = functools.partial(positive_random_features, num_features=5_000)
    np.testing.assert_allclose(phi(q) @ phi(k).T, jnp.exp(q @ k.T / np.sqrt(8)), rtol=0.1)


def test_random_projection_is_orthogonal_within_its_blocks():
    w = orthogonal_projection(10, 4, 3)
    for block in (w[:4], w[4:8], w[8:]):
        gram = block @ block.T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)
    assert not np.allclose(w, orthogonal_projection(10, 4, 4))
    many = orthogonal_projection(4000, 4, 0)
    np.testing.assert_allclose(many.T @ many / 4000, np.eye(4), atol=0.1)


def test_invalid_feature_map_sizes_are_refused():
    with pytest.raises(ValueError, match="nu=6; for x of shape .* from 1 to 5"):
        dpfp(jnp.ones(3), nu=6)
    with pytest.raises(ValueError, match="num_features=0; expected 1 or more"):
        positive_random_features(jnp.ones(3), num_features=0)
