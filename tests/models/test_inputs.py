"""What a caller may give a model: a mask and a change of scores of its own; and what is refused at its entry."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.made import made
from transformer import (
    AttentionMask,
    BertConfig,
    DifferentialConfig,
    FastWeightConfig,
    GPTConfig,
    LatentConfig,
    LinearAttentionConfig,
    LSTMNConfig,
    SoftmaxConfig,
    make_model,
)
from transformer.layers.position import AlibiConfig
from transformer.models.embed import check_tokens

B, T, V = 2, 8, 40
SIZES = {"vocab_size": V, "max_length": 16, "num_layers": 2, "embed_dim": 32}
CONFIGS = {
    "softmax": GPTConfig(**SIZES, attention=SoftmaxConfig(num_heads=4)),
    "blockwise": GPTConfig(**SIZES, attention=SoftmaxConfig(num_heads=4, num_kv_heads=2, backend="blockwise")),
    "alibi": GPTConfig(**SIZES, attention=SoftmaxConfig(num_heads=4, position=AlibiConfig())),
    "latent": GPTConfig(**SIZES, attention=LatentConfig(num_heads=4)),
    "differential": GPTConfig(**SIZES, attention=DifferentialConfig(num_heads=2)),
    "encoder": BertConfig(**SIZES, attention=SoftmaxConfig(num_heads=4)),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)


def near(score, b, h, q, k):
    """What a window of one token to the left is as a change of scores."""
    return jnp.where((q - k <= 1) & (q - k >= -1), score, jnp.full_like(score, -1e9))


@functools.cache
def model_of(config):
    return made(functools.partial(make_model, config))


def run(config, tokens=TOKENS, **options):
    """As one compiled program; `score_mod` and `mask` are part of it."""
    graphdef, params = model_of(config)
    return jax.jit(lambda params: nnx.merge(graphdef, params)(tokens, **options))(params)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_change_of_scores_may_be_a_mask(name):
    expected = run(CONFIGS[name], mask=AttentionMask.window(left=1, right=1)).logits
    np.testing.assert_allclose(run(CONFIGS[name], score_mod=near).logits, expected, atol=2e-4)
    assert np.abs(run(CONFIGS[name]).logits - expected).max() > 1e-3


@pytest.mark.parametrize("name", ["softmax", "alibi", "differential"])
def test_a_change_of_scores_counts_from_the_start_of_a_row_after_a_state(name):
    graphdef, params = model_of(CONFIGS[name])

    def fade(score, b, h, q, k):
        return score - 0.3 * (q * (h + 1) - k).astype(score.dtype)

    @jax.jit
    def in_pieces(params):
        model = nnx.merge(graphdef, params)
        first = model(TOKENS[:, :5], states=model.make_states(B, 16), score_mod=fade)
        return jnp.concatenate([first.logits, model(TOKENS[:, 5:], states=first.states, score_mod=fade).logits], 1)

    np.testing.assert_allclose(in_pieces(params), run(CONFIGS[name], score_mod=fade).logits, atol=2e-4)


@pytest.mark.parametrize("mixer", [LinearAttentionConfig(num_heads=4), FastWeightConfig(num_heads=4), LSTMNConfig()])
def test_a_mixer_that_has_no_scores_refuses_a_change_of_them(mixer):
    with pytest.raises(ValueError, match="it takes no score_mod"):
        run(GPTConfig(**SIZES, attention=mixer), score_mod=near)


@pytest.mark.parametrize("name", ["softmax", "encoder"])
def test_tokens_and_segments_that_do_not_fit(name):
    model = nnx.merge(*model_of(CONFIGS[name]))
    call = inspect.unwrap(type(model).__call__)
    with pytest.raises(ValueError, match=r"tokens: got id 40; the vocabulary has 0 to 39"):
        call(model, TOKENS.at[0, 0].set(V))
    with pytest.raises(ValueError, match=r"tokens: got id -1; the vocabulary has 0 to 39"):
        call(model, TOKENS.at[1, 2].set(-1))
    with pytest.raises(ValueError, match="segments: all are 0, which is padding; number the documents of a row from 1"):
        call(model, TOKENS, segments_BT=jnp.zeros((B, T), jnp.int32))


def test_tokens_of_one_text_need_a_batch():
    with pytest.raises(
        ValueError, match=r"tokens: got shape \(3,\); expected \[batch, tokens\], such as tokens\[None\]"
    ):
        check_tokens("tokens", jnp.array([1, 2, 3]), V)
