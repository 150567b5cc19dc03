"""Multi-head attention's own parts: the temperature of a head, biases by distance, and attention over another sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.changed import built
from transformer.errors import ConfigError
from transformer.layers.position import RotaryConfig
from transformer.mixers.context import CAUSAL, NO_CONTEXT, Context
from transformer.mixers.softmax import MultiHeadAttention, SoftmaxConfig
from transformer.mixers.state import KVCache

B, T, S, D, M, N, K, H = 2, 7, 11, 16, 24, 4, 2, 6
INIT = nnx.initializers.normal(0.5)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, MEMORY = normal(0, B, T, D), normal(1, B, S, M)


def make(memory_dim=None, **options):
    config = SoftmaxConfig(num_heads=N, num_kv_heads=K, head_dim=H, **options)
    return MultiHeadAttention(D, config, memory_dim=memory_dim, kernel_init=INIT, rngs=nnx.Rngs(0))


def by_hand(attention, x, memory, mask=None):
    """Attention from the module's own kernels, one head after another."""
    out = np.zeros((B, x.shape[1], N, H), np.float32)
    for head in range(N):
        q, k, v = (
            jnp.einsum("BTD,DH->BTH", rows, linear.kernel[...][:, index]) + linear.bias[...][index]
            for linear, rows, index in (
                (attention.query, x, head),
                (attention.key, memory, head // (N // K)),
                (attention.value, memory, head // (N // K)),
            )
        )
        if attention.query_norm is not None:
            q, k = attention.query_norm(q), attention.key_norm(k)
        scale = 1 if attention.scale is None else attention.scale[...][head]
        logits = scale * jnp.einsum("BTH,BSH->BTS", q, k) / np.sqrt(H)
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        out[:, :, head] = jnp.einsum("BTS,BSH->BTH", jax.nn.softmax(logits, axis=-1), v)
    return attention.out(jnp.asarray(out))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_temperature_multiplies_the_logits_of_its_head(qk_norm):
    attention = make(learned_temperature=True, qk_norm=qk_norm)
    causal = np.tril(np.ones((T, T), bool))
    np.testing.assert_allclose(attention(X)[0], make(qk_norm=qk_norm)(X)[0], atol=1e-6)
    attention.scale[...] = jnp.array([0.1, 1.0, 2.0, 5.0])
    got = attention(X, CAUSAL)[0]
    np.testing.assert_allclose(got, by_hand(attention, X, X, causal), atol=1e-4)
    gradient = nnx.grad(lambda attention: jnp.square(attention(X)[0]).sum())(attention)
    assert float(jnp.abs(gradient.scale[...]).min()) > 1e-4


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_looks_at_the_memory(qk_norm):
    attention = make(memory_dim=M, qk_norm=qk_norm, learned_temperature=True)
    attention.scale[...] = jnp.array([0.1, 1.0, 2.0, 5.0])
    out, state, weights = attention(X, Context(memory=MEMORY, return_weights=True))
    assert state is None
    assert weights.shape == (B, N, T, S)
    np.testing.assert_allclose(out, by_hand(attention, X, MEMORY), atol=1e-4)


def test_a_memory_is_remembered_once_for_all_tokens():
    attention = make(memory_dim=M)
    valid = jnp.arange(S) < jnp.array([[S], [6]])
    segments = valid.astype(jnp.int32)
    expected = attention(X, Context(memory=MEMORY, memory_segments_BM=segments))[0]
    kept = attention.remember(MEMORY)
    assert isinstance(kept, KVCache)
    np.testing.assert_array_equal(kept.length, [S, S])
    for t in range(T):
        got = attention(X[:, t : t + 1], Context(memory=kept, memory_segments_BM=segments))[0]
        np.testing.assert_allclose(got[:, 0], expected[:, t], atol=1e-5)
    # What is masked has no influence.
    other = jnp.where(valid[..., None], MEMORY, 7.0)
    np.testing.assert_allclose(attention(X, Context(memory=other, memory_segments_BM=segments))[0], expected, atol=1e-5)


def test_joined_projections_compute_the_same():
    attention = make(learned_temperature=True, qk_norm=True, position=RotaryConfig(theta=100.0))
    np.testing.assert_allclose(attention.joined()(X)[0], attention(X)[0], atol=1e-5)
    cross, context = make(memory_dim=M), Context(memory=MEMORY)
    np.testing.assert_array_equal(cross.joined()(X, context)[0], cross(X, context)[0])


def test_cross_attention_needs_a_memory():
    with pytest.raises(ValueError, match="this is cross-attention, and the context has no memory"):
        make(memory_dim=M)(X, NO_CONTEXT)


def test_a_number_of_heads_is_enough():
    attention = MultiHeadAttention(16, 4, rngs=nnx.Rngs(0))
    assert attention(X)[0].shape == X.shape and attention.sizes == (4, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads: got 0; allowed: 1 or more"),
        ({"num_kv_heads": 3}, r"num_kv_heads: got 3; allowed: a divisor of num_heads \(4\)"),
        ({"window": 0}, "window: got 0; allowed: 1 or more, or null"),
        ({"sinks": 2}, "sinks: got 2; sinks need a window"),
        ({"soft_cap": -1.0}, "soft_cap: got -1.0; allowed: above 0, or null"),
        ({"backend": "flash"}, "backend: got 'flash'; allowed: 'auto'"),
        ({"position": "rotary"}, "position: got 'rotary'"),
        ({"qk_norm": 1}, "qk_norm: got 1; allowed: true or false"),
    ],
)
def test_a_config_that_exists_is_valid(options, message):
    with pytest.raises(ConfigError, match=message):
        built(SoftmaxConfig, **{"num_heads": 4} | options)


def test_a_memory_is_learned_from():
    attention = make(memory_dim=M)
    gradient = jax.grad(lambda memory: jnp.square(attention(X, Context(memory=memory))[0]).sum())(MEMORY)
    assert float(jnp.abs(gradient).min()) > 0
