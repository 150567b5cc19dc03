"""Multi-head attention's own parts: the temperature of a head, biases by distance, and attention over another sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.attention.mask import AttentionMask
from transformer.attention.multi_head import MultiHeadAttention
from transformer.decode.cache import KVCache
from transformer.layers.position import Alibi, RotaryScaling

B, T, S, D, M, N, K, H = 2, 7, 11, 16, 24, 4, 2, 6
INIT = nnx.initializers.normal(0.5)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, MEMORY = normal(0, B, T, D), normal(1, B, S, M)


def make(**options):
    return MultiHeadAttention(
        D, N, num_kv_heads=K, head_dim=H, kernel_init=INIT, out_init=INIT, rngs=nnx.Rngs(0), **options
    )


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
    got = attention(X, AttentionMask.causal())[0]
    np.testing.assert_allclose(got, by_hand(attention, X, X, causal), atol=1e-4)
    gradient = nnx.grad(lambda attention: jnp.square(attention(X)[0]).sum())(attention)
    assert float(jnp.abs(gradient.scale[...]).min()) > 1e-4


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_looks_at_the_memory(qk_norm):
    attention = make(memory_dim=M, qk_norm=qk_norm, learned_temperature=True)
    attention.scale[...] = jnp.array([0.1, 1.0, 2.0, 5.0])
    out, cache, weights = attention(X, memory=MEMORY, return_weights=True)
    assert cache is None
    assert weights.shape == (B, N, T, S)
    np.testing.assert_allclose(out, by_hand(attention, X, MEMORY), atol=1e-4)


def test_a_memory_is_remembered_once_for_all_tokens():
    attention = make(memory_dim=M)
    valid = jnp.arange(S) < jnp.array([[S], [6]])
    mask = AttentionMask.padding(valid)
    expected = attention(X, mask, memory=MEMORY)[0]
    kept = attention.remember(MEMORY)
    assert isinstance(kept, KVCache)
    np.testing.assert_array_equal(kept.length, [S, S])
    for t in range(T):
        got = attention(X[:, t : t + 1], mask, memory=kept)[0]
        np.testing.assert_allclose(got[:, 0], expected[:, t], atol=1e-5)
    # What is masked has no influence.
    other = attention(X, mask, memory=jnp.where(valid[..., None], MEMORY, 7.0))[0]
    np.testing.assert_allclose(other, expected, atol=1e-5)


def test_joined_projections_compute_the_same():
    attention = make(learned_temperature=True, qk_norm=True, rotary_period=100.0)
    np.testing.assert_allclose(attention.joined()(X)[0], attention(X)[0], atol=1e-5)
    cross = make(memory_dim=M)
    np.testing.assert_array_equal(cross.joined()(X, memory=MEMORY)[0], cross(X, memory=MEMORY)[0])


POSITIONS = {
    "rotary": {"rotary_period": 100.0},
    "yarn": {
        "rotary_period": 100.0,
        "rotary_scaling": RotaryScaling(kind="yarn", factor=4.0, original_length=8, fast_turns=4.0),
    },
    "alibi": {},
}


@pytest.mark.parametrize("position", POSITIONS)
def test_cached_equals_uncached_where_rows_differ_in_length(position):
    attention = make(**POSITIONS[position])
    bias = Alibi(N).score_mod if position == "alibi" else lambda offset: None
    mask, x = AttentionMask.causal(), normal(2, B, 12, D)
    expected = [attention(x, mask, score_mod=bias(0))[0]] * 2
    lengths = jnp.array([3, 5])
    cache = jax.tree.map(lambda leaf: leaf[0], KVCache.empty(1, B, 16, K, H, jnp.float32))
    _, cache, _ = attention(x[:, :6], mask, cache=cache, score_mod=bias(cache.length))
    cache = cache.with_length(lengths)
    step = jax.jit(lambda token, cache: attention(token, mask, cache=cache, score_mod=bias(cache.length))[:2])
    for _ in range(4):
        places = cache.length
        out, cache = step(x[jnp.arange(B), places][:, None], cache)
        for row in range(B):
            np.testing.assert_allclose(out[row, 0], expected[row][row, int(places[row])], atol=2e-5)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"memory": MEMORY}, "this is self-attention; expected no memory"),
        ({"memory_dim": M}, {}, "this is cross-attention; expected a memory and no cache"),
        (
            {"memory_dim": M},
            {"memory": MEMORY, "cache": KVCache.empty(1, B, 8, K, H, jnp.float32)},
            "expected a memory and no cache",
        ),
    ],
)
def test_a_memory_belongs_to_cross_attention(options, call, message):
    with pytest.raises(ValueError, match=message):
        make(**options)(X, **call)


def test_cross_attention_takes_no_rotary_positions():
    with pytest.raises(ValueError, match="memory_dim and rotary_period are both set"):
        make(memory_dim=M, rotary_period=100.0)


def test_a_memory_is_learned_from():
    attention = make(memory_dim=M)
    gradient = jax.grad(lambda memory: jnp.square(attention(X, memory=memory)[0]).sum())(MEMORY)
    assert float(jnp.abs(gradient).min()) > 0
