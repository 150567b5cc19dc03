"""Differential attention: the paper's equations, its cache, and the difference it shows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers.position import RotaryConfig
from transformer.mixers.context import Context
from transformer.mixers.differential import DifferentialAttention, DifferentialConfig, initial_lambda

B, T, D, N, K, H = 2, 9, 32, 4, 2, 6
INIT = nnx.initializers.normal(0.4)
CAUSAL = Context(layer=2)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


def make(dropout_rate=0.0, **options):
    config = DifferentialConfig(**{"num_heads": N, "num_kv_heads": K, "head_dim": H} | options)
    attention = DifferentialAttention(D, config, dropout_rate=dropout_rate, kernel_init=INIT, rngs=nnx.Rngs(0))
    attention.lambdas[...] = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, attention.lambdas.shape), jnp.float32)
    attention.norm.scale[...] = 1 + 0.1 * jnp.arange(2 * attention.lambdas.shape[1], dtype=jnp.float32)
    return attention


def by_hand(attention):
    """The difference of the two maps, and the output, one head after another."""
    q1, k1, q2, k2 = np.asarray(attention.lambdas[...], np.float64)
    start = 0.8 - 0.6 * np.exp(-0.3 * 2)
    lam = np.exp(q1 @ k1) - np.exp(q2 @ k2) + start
    maps, out = [], np.zeros((B, T, N, 2 * H))
    for head in range(N):
        group = head // (N // K)
        q = X @ attention.query.kernel[...][:, head]
        k, v = X @ attention.key.kernel[...][:, group], X @ attention.value.kernel[...][:, group]
        weights = []
        for half in (slice(0, H), slice(H, 2 * H)):
            logits = jnp.einsum("BTH,BSH->BTS", q[..., half], k[..., half]) / np.sqrt(H)
            weights.append(jax.nn.softmax(jnp.where(np.tril(np.ones((T, T), bool)), logits, -jnp.inf), axis=-1))
        maps.append(np.asarray(weights[0], np.float64) - lam * np.asarray(weights[1], np.float64))
        attended = maps[-1] @ np.asarray(v, np.float64)
        normed = attended / np.sqrt((attended**2).mean(-1, keepdims=True) + 1e-5)
        out[:, :, head] = (1 - start) * normed * np.asarray(attention.norm.scale[...])
    return np.stack(maps, 1), np.einsum("BTNC,NCD->BTD", out, attention.out.kernel[...])


@pytest.mark.parametrize("backend", ["auto", "reference", "blockwise"])
def test_it_is_the_papers(backend):
    attention = make(backend=backend)
    maps, expected = by_hand(attention)
    out, state, weights = attention(X, Context(layer=2, return_weights=True))
    assert state is None
    np.testing.assert_allclose(out, expected, atol=2e-4)
    np.testing.assert_allclose(weights, maps, atol=2e-5)
    np.testing.assert_allclose(weights.sum(-1), 1 - attention.value_of_lambda(2), atol=1e-5)
    assert float(weights.min()) < 0
    chosen = attention(X, Context(layer=2, return_weights=(3, 0)))[2]
    np.testing.assert_allclose(chosen, weights[:, [3, 0]], atol=1e-6)


def test_lambda_starts_small_and_grows_with_depth():
    np.testing.assert_allclose([initial_lambda(0), initial_lambda(100)], [0.2, 0.8], atol=1e-6)
    attention = DifferentialAttention(D, DifferentialConfig(num_heads=N), kernel_init=INIT, rngs=nnx.Rngs(0))
    assert attention.lambdas.shape == (4, D // (2 * N))
    assert float(attention.value_of_lambda(3)) == pytest.approx(float(initial_lambda(3)), abs=0.2)
    attention.lambdas[...] = jnp.zeros_like(attention.lambdas[...])
    assert float(attention.value_of_lambda(3)) == pytest.approx(float(initial_lambda(3)))


def test_everything_is_learned():
    graphdef, params = nnx.split(make())

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params)(X, CAUSAL)[0] - X).mean()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert float(jnp.abs(gradient).max()) > 1e-4


def test_dropout_follows_its_key():
    attention = make(dropout_rate=0.3)
    plain = attention(X, CAUSAL)[0]
    first, again, other = (attention(X, Context(layer=2, key=jax.random.key(seed)))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-3
    assert float(jnp.abs(first - plain).max()) > 1e-3


@pytest.mark.torch
def test_it_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    # DiffLlama counts the heads of both maps, those of the first before those of the second.
    config = modeling.DiffLlamaConfig(
        hidden_size=D, num_attention_heads=2 * N, num_key_value_heads=2 * K, head_dim=H, attn_implementation="eager",
        rms_norm_eps=1e-5, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = modeling.DiffLlamaAttention(config, layer_idx=2).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    weights = {name: value.detach().numpy() for name, value in peer.state_dict().items()}
    attention = make(position=RotaryConfig())

    def both_maps(name, heads):
        kernel = weights[name].T.reshape(D, 2, heads, H)
        return jnp.asarray(np.concatenate([kernel[:, 0], kernel[:, 1]], axis=-1))

    attention.query.kernel[...] = both_maps("q_proj.weight", N)
    attention.key.kernel[...] = both_maps("k_proj.weight", K)
    attention.value.kernel[...] = both_maps("v_proj.weight", K)
    attention.lambdas[...] = jnp.asarray(np.stack([weights[f"lambda_{name}"] for name in ("q1", "k1", "q2", "k2")]))
    attention.norm.scale[...] = jnp.ones(2 * H)
    attention.out.kernel[...] = jnp.asarray(weights["o_proj.weight"].T.reshape(N, 2 * H, D))
    x = torch.tensor(np.asarray(X))
    turns = modeling.DiffLlamaRotaryEmbedding(config)(x, torch.arange(T)[None].expand(B, T))
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected = peer(x, turns, attention_mask=mask)[0].numpy()
    np.testing.assert_allclose(attention(X, CAUSAL)[0], expected, atol=2e-4)
