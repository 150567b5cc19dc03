"""Multi-head latent attention: the paper's equations, one result in both forms, and a small cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers.position import rotary, token_positions
from transformer.mixers.context import CAUSAL, Context
from transformer.mixers.latent import LatentAttention, LatentConfig

B, T, D, N, H, P, C, R = 2, 9, 32, 4, 6, 4, 5, 8
INIT = nnx.initializers.normal(0.4)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


def make(dtype=jnp.float32, **options):
    sizes = {"query_latent_dim": 10, "latent_dim": R, "head_dim": H, "rotary_dim": P, "value_dim": C}
    config = LatentConfig(num_heads=N, **sizes | options)
    attention = LatentAttention(D, config, kernel_init=INIT, dtype=dtype, rngs=nnx.Rngs(0))
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
    weights = [attention(X, Context(return_weights=(2, 0)), absorb=absorb)[2] for absorb in (False, True)]
    assert weights[0].shape == (B, 2, T, T)
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-5)


def test_the_cache_holds_a_latent_and_a_rotary_key_a_token():
    for dtype, size in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        state = make(dtype=dtype).make_state(B, 16)
        assert state.latents.nbytes == B * 16 * (R + P) * size


def test_decoding_absorbs_and_training_expands():
    attention = make(value_dim=6)
    state = attention.make_state(B, 64)

    def run(x, state=None, **options):
        return str(jax.make_jaxpr(lambda state: attention(x, Context(state=state), **options)[0])(state))

    assert run(X[:, :1], state) == run(X[:, :1], state, absorb=True)
    assert run(X[:, :1], state) != run(X[:, :1], state, absorb=False)
    assert run(X) == run(X, absorb=False)


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
