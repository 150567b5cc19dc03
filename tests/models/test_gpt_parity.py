"""GPT against Hugging Face's GPT-2 in torch, on a small random model."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig

pytestmark = pytest.mark.torch


def test_logits_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    L, D, N, V, P = 3, 32, 4, 50, 20
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=L, n_embd=D, n_head=N, vocab_size=V, n_positions=P)
    ).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {name: value.detach().numpy() for name, value in peer.state_dict().items()}
    model = GPT(
        GPTConfig(vocab_size=V, max_length=P, num_layers=L, embed_dim=D, attention=SoftmaxConfig(num_heads=N)),
        rngs=nnx.Rngs(0),
    )

    def layers(name):
        return np.stack([state[f"transformer.h.{layer}.{name}"] for layer in range(L)])

    blocks = model.layers.blocks
    model.embed.table[...] = jnp.asarray(state["transformer.wte.weight"])
    model.positions.table[...] = jnp.asarray(state["transformer.wpe.weight"])
    for norm, name in ((blocks.attention_norm, "ln_1"), (blocks.feed_forward_norm, "ln_2")):
        norm.scale[...], norm.bias[...] = jnp.asarray(layers(f"{name}.weight")), jnp.asarray(layers(f"{name}.bias"))
    model.layers.final_norm.scale[...] = jnp.asarray(state["transformer.ln_f.weight"])
    model.layers.final_norm.bias[...] = jnp.asarray(state["transformer.ln_f.bias"])
    kernels = np.split(layers("attn.c_attn.weight"), 3, axis=-1)
    biases = np.split(layers("attn.c_attn.bias"), 3, axis=-1)
    attention = blocks.attention
    for linear, kernel, bias in zip((attention.query, attention.key, attention.value), kernels, biases, strict=True):
        linear.kernel[...] = jnp.asarray(kernel.reshape(L, D, N, D // N))
        linear.bias[...] = jnp.asarray(bias.reshape(L, N, D // N))
    attention.out.kernel[...] = jnp.asarray(layers("attn.c_proj.weight").reshape(L, N, D // N, D))
    attention.out.bias[...] = jnp.asarray(layers("attn.c_proj.bias"))
    for linear, name in ((blocks.feed_forward.up, "c_fc"), (blocks.feed_forward.down, "c_proj")):
        linear.kernel[...] = jnp.asarray(layers(f"mlp.{name}.weight"))
        linear.bias[...] = jnp.asarray(layers(f"mlp.{name}.bias"))

    tokens = np.random.default_rng(0).integers(0, V, (2, 15))
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(jnp.asarray(tokens, jnp.int32)).logits, expected, rtol=1e-4, atol=2e-5)
