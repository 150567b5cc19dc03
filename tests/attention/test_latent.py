"""Multi-head latent attention: the paper's equations, one result in both forms, and a small cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.attention.latent import LatentAttention
from transformer.attention.mask import AttentionMask
from transformer.layers.position import RotaryScaling, rotary, token_positions

B, T, D, N, H, P, C, R = 2, 9, 32, 4, 6, 4, 5, 8
INIT = nnx.initializers.normal(0.4)
CAUSAL = AttentionMask.causal()
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


def make(**options):
    options = {"query_latent_dim": 10, "latent_dim": R, "head_dim": H, "rotary_dim": P, "value_dim": C, **options}
    attention = LatentAttention(D, N, kernel_init=INIT, out_init=INIT, rngs=nnx.Rngs(0), **options)
    for norm in (attention.norm, attention.query_norm):
        if norm is not None:
            norm.scale[...] = 1 + 0.1 * jnp.arange(norm.scale.shape[0], dtype=jnp.float32)
    return attention


@pytest.mark.parametrize("query_latent_dim", [None, 10])
def test_it_is_the_papers(query_latent_dim):
    attention = make(query_latent_dim=query_latent_dim)
    positions = token_positions(B, T)
    queried = X if query_latent_dim is None else attention.query_norm(X @ attention.query_down.kernel[...])
    down = X @ attention.down.kernel[...]
    latent = attention.norm(down[..., :R])
    shared = rotary(down[..., None, R:], positions)[:, :, 0]
    out = np.zeros((B, T, N, C), np.float32)
    for head in range(N):
        q = queried @ attention.query.kernel[...][:, head]
        turned = rotary(q[:, :, None, H:], positions)[:, :, 0]
        k, v = latent @ attention.key_up.kernel[...][:, head], latent @ attention.value_up.kernel[...][:, head]
        logits = jnp.einsum("BTH,BSH->BTS", q[..., :H], k) + jnp.einsum("BTP,BSP->BTS", turned, shared)
        logits = jnp.where(np.tril(np.ones((T, T), bool)), logits / np.sqrt(H + P), -jnp.inf)
        out[:, :, head] = jax.nn.softmax(logits, axis=-1) @ v
    expected = np.einsum("BTNC,NCD->BTD", out, attention.out.kernel[...])
    np.testing.assert_allclose(attention(X, CAUSAL)[0], expected, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_the_absorbed_form_computes_the_same(backend):
    attention = make(backend=backend)
    graphdef, params = nnx.split(attention)

    def value_and_gradient(absorb):
        def loss(params):
            return jnp.square(nnx.merge(graphdef, params)(X, CAUSAL, absorb=absorb)[0]).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    expected, got = value_and_gradient(False), value_and_gradient(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    for gradient in jax.tree.leaves(expected[1]):
        assert float(jnp.abs(gradient).max()) > 1e-4
    weights = [attention(X, CAUSAL, absorb=absorb, return_weights=(2, 0))[2] for absorb in (False, True)]
    assert weights[0].shape == (B, 2, T, T)
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-5)


def layer_cache(attention, max_length=16):
    return jax.tree.map(lambda leaf: leaf[0], attention.make_cache(1, B, max_length))


YARN = RotaryScaling(kind="yarn", factor=4.0, original_length=8, fast_turns=4.0)


@pytest.mark.parametrize("scaling", [RotaryScaling(), YARN], ids=["none", "yarn"])
@pytest.mark.parametrize("absorb", [None, False, True])
def test_cached_equals_uncached_where_rows_differ_in_length(absorb, scaling):
    attention = make(rotary_scaling=scaling)
    expected = attention(X, CAUSAL)[0]
    _, cache, _ = attention(X[:, :5], CAUSAL, cache=layer_cache(attention), absorb=absorb)
    cache = cache.with_length(jnp.array([2, 4]))
    step = jax.jit(lambda token, cache: attention(token, CAUSAL, cache=cache, absorb=absorb)[:2])
    for _ in range(5):
        places = cache.length
        out, cache = step(X[jnp.arange(B), places][:, None], cache)
        for row in range(B):
            np.testing.assert_allclose(out[row, 0], expected[row, int(places[row])], atol=3e-5)


def test_the_cache_holds_a_latent_and_a_rotary_key_a_token():
    for dtype, size in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        cache = make(dtype=dtype).make_cache(3, B, 16)
        arrays = [leaf for leaf in jax.tree.leaves(cache) if leaf is not cache.length]
        assert sum(leaf.nbytes for leaf in arrays) == 3 * B * 16 * (R + P) * size


def test_decoding_absorbs_and_training_expands():
    attention = make(value_dim=6)
    cache = layer_cache(attention, 64)

    def run(x, **options):
        return str(jax.make_jaxpr(lambda: attention(x, CAUSAL, **options)[0])())

    assert run(X[:, :1], cache=cache) == run(X[:, :1], cache=cache, absorb=True)
    assert run(X[:, :1], cache=cache) != run(X[:, :1], cache=cache, absorb=False)
    assert run(X) == run(X, absorb=False)


def test_packed_documents_keep_their_positions():
    attention = make()
    segments = jnp.array([[1] * 4 + [2] * 5] * B)
    positions = jnp.array([[*range(4), *range(5)]] * B)
    packed = attention(X, CAUSAL & AttentionMask.segments(segments), positions_BT=positions)[0]
    for start, stop in ((0, 4), (4, 9)):
        np.testing.assert_allclose(packed[:, start:stop], attention(X[:, start:stop], CAUSAL)[0], atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("query_latent_dim", [None, 10])
def test_it_is_that_of_transformers(query_latent_dim):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = modeling.DeepseekV2Config(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=N, kv_lora_rank=R, q_lora_rank=query_latent_dim,
        qk_nope_head_dim=H, qk_rope_head_dim=P, v_head_dim=C, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    peer = modeling.DeepseekV2Attention(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    weights = {name: value.detach().numpy() for name, value in peer.state_dict().items()}
    attention = make(query_latent_dim=query_latent_dim)
    # DeepSeek rotates neighbours in pairs; here a first half goes with a second.
    halves = np.concatenate([np.arange(0, P, 2), np.arange(1, P, 2)])
    query = weights["q_b_proj.weight" if query_latent_dim else "q_proj.weight"].T.reshape(-1, N, H + P)
    down = weights["kv_a_proj_with_mqa.weight"].T
    up = weights["kv_b_proj.weight"].T.reshape(R, N, H + C)
    attention.query.kernel[...] = jnp.asarray(np.concatenate([query[..., :H], query[..., H + halves]], -1))
    attention.down.kernel[...] = jnp.asarray(np.concatenate([down[:, :R], down[:, R + halves]], -1))
    attention.norm.scale[...] = jnp.asarray(weights["kv_a_layernorm.weight"])
    attention.key_up.kernel[...], attention.value_up.kernel[...] = jnp.asarray(up[..., :H]), jnp.asarray(up[..., H:])
    attention.out.kernel[...] = jnp.asarray(weights["o_proj.weight"].T.reshape(N, C, D))
    if query_latent_dim:
        attention.query_down.kernel[...] = jnp.asarray(weights["q_a_proj.weight"].T)
        attention.query_norm.scale[...] = jnp.asarray(weights["q_a_layernorm.weight"])
    x = torch.tensor(np.asarray(X))
    turns = modeling.DeepseekV2RotaryEmbedding(config)(x, torch.arange(T)[None].expand(B, T))
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected = peer(x, attention_mask=mask, position_embeddings=turns)[0].numpy()
    np.testing.assert_allclose(attention(X, CAUSAL)[0], expected, atol=3e-5)
