"""Positions against Hugging Face's implementations in torch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers.position import (
    Alibi,
    RelativePosition,
    RotaryScaling,
    relative_buckets,
    rotary,
    rotary_frequencies,
)

pytestmark = pytest.mark.torch

SCALINGS = {
    "linear": ({"factor": 4.0}, {}),
    "yarn": ({"factor": 4.0}, {"original_max_position_embeddings": 256}),
    "yarn turns": (
        {"factor": 16.0, "slow_turns": 2.0, "fast_turns": 16.0},
        {"original_max_position_embeddings": 4096, "beta_slow": 2.0, "beta_fast": 16.0},
    ),
    "yarn factor": (
        {"factor": 2.0, "attention_factor": 0.7},
        {"original_max_position_embeddings": 4096, "attention_factor": 0.7},
    ),
    "llama3": (
        {"factor": 8.0},
        {"original_max_position_embeddings": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
}


def llama(**rope):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, num_hidden_layers=1, max_position_embeddings=1024, rope_parameters=rope
    )


def scaling_of(name, theta):
    """Our scaling, and Hugging Face's config of the same."""
    kind = name.split()[0]
    ours, theirs = SCALINGS[name]
    scaling = RotaryScaling(
        kind=kind, original_length=theirs.get("original_max_position_embeddings"), **{"factor": 1.0, **ours}
    )
    return scaling, llama(rope_type=kind, rope_theta=theta, factor=scaling.factor, **theirs)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, theta):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    scaling, config = scaling_of(name, theta)
    expected, magnitude = rope.ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu")
    np.testing.assert_allclose(rotary_frequencies(64, theta, scaling), expected.numpy(), rtol=2e-6)
    assert scaling.magnitude == pytest.approx(magnitude)


def test_ntk_is_the_dynamic_scaling_at_one_length():
    """Transformers' base at `length` is ours with a factor of 4·length/1024 - 3; NTK-aware scaling itself has one base."""
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    config = llama(rope_type="dynamic", rope_theta=10_000.0, factor=4.0)
    expected, _ = rope.ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=2048)
    scaling = RotaryScaling(kind="ntk", factor=4.0 * 2048 / 1024 - 3)
    np.testing.assert_allclose(rotary_frequencies(64, 10_000.0, scaling), expected.numpy(), rtol=2e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotation_is_that_of_llama(name):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    scaling, config = scaling_of(name, 10_000.0)
    x = np.random.default_rng(0).normal(size=(2, 7, 4, 64)).astype(np.float32)
    positions = np.random.default_rng(1).integers(0, 1024, (2, 7))
    cos, sin = modeling.LlamaRotaryEmbedding(config)(torch.tensor(x), torch.tensor(positions))
    heads_first = torch.tensor(x).transpose(1, 2)
    expected, _ = modeling.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    got = rotary(jnp.asarray(x), jnp.asarray(positions, jnp.int32), scaling=scaling)
    np.testing.assert_allclose(got, expected.transpose(1, 2).numpy(), atol=5e-4)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 20, 40, 112])
def test_alibi_slopes_are_those_of_bloom(num_heads):
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    # Bloom's bias grows with the key's position, which under softmax is the same as falling with the distance.
    theirs = bloom.build_alibi_tensor(torch.ones(1, 5, dtype=torch.int64), num_heads, torch.float32).numpy()
    np.testing.assert_allclose(Alibi(num_heads).slopes(jnp.arange(num_heads)), theirs[:, 0, 1], rtol=1e-6)
    ours = Alibi(num_heads).bias(1, 5, 4)[0]
    np.testing.assert_allclose(ours - ours[..., :1], theirs, rtol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 64), (64, 500), (32, 20), (8, 1000)])
def test_buckets_are_those_of_t5(num_buckets, max_distance, bidirectional):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-1500, 1501)
    expected = t5.T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    ).numpy()
    got = relative_buckets(distances, num_buckets, max_distance, bidirectional=bidirectional)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_biases_are_those_of_t5(is_decoder):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(d_model=16, d_kv=4, num_heads=4, num_layers=1, is_decoder=is_decoder)
    peer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    position = RelativePosition(4, bidirectional=not is_decoder, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    table = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    position.table[...] = jnp.asarray(table)
    with torch.no_grad():
        peer.relative_attention_bias.weight.copy_(torch.tensor(table))
        # The last 3 of 200 positions, as when decoding behind a cache.
        whole, last = peer.compute_bias(200, 200), peer.compute_bias(3, 200, past_seen_tokens=197)
    np.testing.assert_array_equal(position.bias(200, 200), whole.numpy())
    np.testing.assert_array_equal(position.bias(3, 200, 197), last.numpy())
