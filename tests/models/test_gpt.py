"""GPT's properties, in GPT-2's shape and in the modern one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.errors import ConfigError
from transformer.models.gpt import GPT, GPTConfig, count_parameters, flops_per_token

B, T, V = 2, 12, 40
CLASSIC = GPTConfig(vocab_size=V, max_length=16, num_layers=3, embed_dim=32, num_heads=4)
MODERN = dataclasses.replace(
    CLASSIC, num_kv_heads=2, norm="rms_norm", position="rotary", activation="swiglu", use_bias=False, qk_norm=True,
    tie_embeddings=False, logit_soft_cap=30.0, attention_soft_cap=50.0,
)  # fmt: skip
SHAPES = {"classic": CLASSIC, "modern": MODERN}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)


@functools.cache
def make(config):
    """A model with weights large enough that every part of it matters."""
    model = GPT(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape, p.dtype), params)
    return graphdef, params


def run(config, tokens=TOKENS, *, like=None, **options):
    params = make(like or config)[1]
    graphdef = make(config)[0]
    return nnx.merge(graphdef, params)(tokens, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_float32_and_finite(shape):
    logits = run(SHAPES[shape]).logits
    assert logits.shape == (B, T, V)
    assert logits.dtype == jnp.float32
    assert bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_future_has_no_influence(shape):
    changed = TOKENS.at[:, 7:].set(0)
    before, after = run(SHAPES[shape]).logits, run(SHAPES[shape], changed).logits
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert float(jnp.abs(before[:, 7:] - after[:, 7:]).max()) > 1e-3


def loss_and_gradient(config, like, key=None):
    graphdef, params = make(config)[0], make(like)[1]

    @jax.jit
    def both(params):
        def loss(params):
            return jnp.mean(jnp.square(nnx.merge(graphdef, params)(TOKENS, key=key).logits))

        return jax.value_and_grad(loss)(params)

    return both(params)


@pytest.mark.parametrize(
    "changes", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}, {"remat": "light"}], ids=str
)
def test_scan_loop_and_remat_compute_the_same(changes):
    config = dataclasses.replace(MODERN, dropout=0.1)
    key = jax.random.key(5)
    expected = loss_and_gradient(config, config, key)
    got = loss_and_gradient(dataclasses.replace(config, **changes), config, key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), got, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 3])
def test_cached_equals_uncached(shape, window):
    config = dataclasses.replace(SHAPES[shape], window=window)
    model = nnx.merge(*make(config))
    expected = model(TOKENS).logits
    cache = model.make_cache(B, 16)
    first = model(TOKENS[:, :5], cache=cache)
    logits, cache = [first.logits], first.cache
    for t in range(5, T):
        out = model(TOKENS[:, t : t + 1], cache=cache)
        logits.append(out.logits)
        cache = out.cache
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_equals_alone(shape):
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    positions = jnp.array([[*range(5), *range(7)], [*range(9), 0, 0, 0]])
    packed = run(SHAPES[shape], segments_BT=segments, positions_BT=positions).logits
    for row, start, stop in ((0, 0, 5), (0, 5, 12), (1, 0, 9)):
        alone = run(SHAPES[shape], TOKENS[row : row + 1, start:stop]).logits[0]
        np.testing.assert_allclose(packed[row, start:stop], alone, atol=2e-5)


def test_weights_are_distributions_and_leave_the_output_alone():
    plain, looked_at = run(MODERN), run(MODERN, return_weights=True)
    np.testing.assert_array_equal(plain.logits, looked_at.logits)
    weights = looked_at.weights
    assert weights.shape == (3, B, 4, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not np.triu(np.asarray(weights), 1).any()


@pytest.mark.parametrize("position", ["sinusoidal", "none", "learned", "rotary"])
def test_positions_tell_order_apart(position):
    config = dataclasses.replace(CLASSIC, position=position)
    pair = jnp.array([[3, 5, 7], [5, 3, 7]])
    logits = run(config, pair).logits[:, -1]
    same = bool(jnp.allclose(logits[0], logits[1], atol=1e-5))
    # Without positions the last token sees a set; a second layer could tell more, since causal prefixes differ.
    assert not same


def test_bfloat16_computes_close_to_float32():
    expected = run(MODERN).logits
    got = run(dataclasses.replace(MODERN, dtype="bfloat16"), like=MODERN).logits
    assert float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 0.03


def test_dropout_needs_a_key_and_follows_it():
    config = dataclasses.replace(CLASSIC, dropout=0.2)
    plain = run(config).logits
    np.testing.assert_array_equal(plain, run(config).logits)
    first, again, other = (run(config, key=jax.random.key(seed)).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-3
    assert float(jnp.abs(first - plain).max()) > 1e-3


def test_residual_projections_start_smaller_with_depth():
    config = GPTConfig(vocab_size=V, max_length=16, num_layers=8, embed_dim=64, num_heads=4)
    blocks = GPT(config, rngs=nnx.Rngs(0)).blocks
    assert float(blocks.attention.query.kernel[...].std()) == pytest.approx(0.02, rel=0.05)
    assert float(blocks.attention.out.kernel[...].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(blocks.feed_forward.down.kernel[...].std()) == pytest.approx(0.02 / 4, rel=0.05)


def test_gpt2_has_124_million_parameters():
    assert count_parameters(GPTConfig()) == 124_439_808


def test_flops_are_counted_from_the_shapes():
    c = MODERN
    kernels = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * c.dim_of_mlp
    attention = 4 * 32 * (T + 1) / 2
    assert flops_per_token(c, T) == c.num_layers * (2 * kernels + attention) + 2 * 32 * V
    # A window of 3 sees 1, 2, 3, then 4 keys.
    windowed = flops_per_token(dataclasses.replace(c, window=3), T)
    assert flops_per_token(c, T) - windowed == pytest.approx(3 * 4 * 32 * ((T + 1) / 2 - (1 + 2 + 3 + 4 * 9) / 12))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"position": "rotary", "head_dim": 7}, "head_dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_layers": 0}, "num_layers"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, field):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CLASSIC, **changes)
    assert caught.value.field == field
