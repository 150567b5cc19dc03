"""Positions against their papers' formulas and properties."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.attention.dispatch import attend
from transformer.attention.spec.mask import AttentionMask
from transformer.errors import ConfigError
from transformer.layers.position import (
    Alibi,
    RelativePosition,
    RotaryScaling,
    rotary,
    rotary_frequencies,
    sinusoidal,
    token_positions,
)

RNG = np.random.default_rng(0)
B, T, N, H = 2, 9, 6, 8


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def test_sinusoidal_is_the_papers():
    got = sinusoidal(jnp.arange(7)[None], 6)[0]
    position, i = np.indices((7, 3))
    angles = position / 10000 ** (2 * i / 6)
    np.testing.assert_allclose(got[:, 0::2], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(got[:, 1::2], np.cos(angles), atol=1e-6)


def test_token_positions_start_where_each_row_does():
    np.testing.assert_array_equal(token_positions(2, 3), [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(token_positions(2, 3, jnp.array([0, 5])), [[0, 1, 2], [5, 6, 7]])


SCALINGS = {
    "none": RotaryScaling(),
    "linear": RotaryScaling(kind="linear", factor=4.0),
    "ntk": RotaryScaling(kind="ntk", factor=4.0),
    "yarn": RotaryScaling(kind="yarn", factor=4.0, original_length=64),
    "llama3": RotaryScaling(kind="llama3", factor=4.0, original_length=64),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_products_depend_on_the_distance_alone(kind):
    q, k = (jnp.asarray(RNG.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))

    def product(q_position, k_position):
        turned = [rotary(x, jnp.array([[p]]), scaling=SCALINGS[kind]) for x, p in ((q, q_position), (k, k_position))]
        return np.sum(turned[0] * turned[1], axis=-1)

    np.testing.assert_allclose(product(9, 4), product(105, 100), atol=1e-4)
    assert np.abs(product(9, 4) - product(9, 5)).max() > 1e-3


def test_rotary_keeps_lengths_and_leaves_position_zero_alone():
    x = jnp.asarray(RNG.normal(size=(2, 5, 3, 8)), jnp.float32)
    turned = rotary(x, jnp.broadcast_to(jnp.arange(5), (2, 5)))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_linear_scaling_is_interpolation():
    x = normal(1, 5, 2, 8)
    got = rotary(x, 4 * jnp.arange(5)[None], scaling=SCALINGS["linear"])
    np.testing.assert_allclose(got, rotary(x, jnp.arange(5)[None]), atol=1e-5)


def test_ntk_scaling_keeps_the_fastest_pair_and_interpolates_the_slowest():
    plain, scaled = rotary_frequencies(64), rotary_frequencies(64, scaling=SCALINGS["ntk"])
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4, rtol=1e-5)
    assert (np.diff(scaled / plain) < 0).all()


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_scaling_by_turns_keeps_fast_pairs_and_interpolates_slow_ones(kind):
    scaling = SCALINGS[kind]
    plain = rotary_frequencies(64)
    ratio = rotary_frequencies(64, scaling=scaling) / plain
    turns = scaling.original_length * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[0], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.5], 0.25, rtol=1e-6)
    assert (np.diff(ratio) < 1e-6).all()
    assert ((ratio > 0.26) & (ratio < 0.99)).any()


def test_yarn_raises_the_logits_by_its_temperature():
    x = normal(B, T, N, H)
    turned = rotary(x, token_positions(B, T), scaling=SCALINGS["yarn"])
    # Section 3.4: the square root of 1/t is 0.1 ln(s) + 1, on queries and keys alike.
    ratio = jnp.linalg.norm(turned, axis=-1) / jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(ratio, 0.1 * np.log(4) + 1, rtol=1e-5)
    fixed = RotaryScaling(kind="yarn", factor=4.0, original_length=64, attention_factor=1.0)
    turned = rotary(x, token_positions(B, T), scaling=fixed)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_a_factor_of_one_changes_nothing():
    for kind in ("linear", "ntk", "yarn", "llama3"):
        scaling = RotaryScaling(kind=kind, original_length=64)
        np.testing.assert_allclose(rotary_frequencies(16, scaling=scaling), rotary_frequencies(16), rtol=1e-6)
        assert scaling.magnitude == 1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"factor": 0.5}, "factor"),
        ({"kind": "yarn"}, "original_length"),
        ({"kind": "llama3", "original_length": 0}, "original_length"),
        ({"slow_turns": 0.0}, "slow_turns"),
        ({"fast_turns": 0.5}, "fast_turns"),
        ({"kind": "linear", "attention_factor": 1.5}, "attention_factor"),
    ],
)
def test_scalings_that_cannot_be_are_refused(given, field):
    with pytest.raises(ConfigError) as caught:
        RotaryScaling(**given)
    assert caught.value.field == field


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="even dim; got 5"):
        sinusoidal(jnp.arange(3)[None], 5)


def test_alibi_is_the_papers():
    # Section 3: for 8 heads the slopes are 1/2, 1/4, ... 1/256; for 12, those of 8 and every other one of 16.
    np.testing.assert_allclose(Alibi(8).slopes(jnp.arange(8)), 0.5 ** np.arange(1, 9), rtol=1e-6)
    twelve = np.concatenate([0.5 ** np.arange(1, 9), 0.5 ** np.array([0.5, 1.5, 2.5, 3.5])])
    np.testing.assert_allclose(Alibi(12).slopes(jnp.arange(12)), twelve, rtol=1e-6)
    bias = Alibi(8).bias(3, 3)
    assert bias.shape == (1, 8, 3, 3)
    np.testing.assert_allclose(bias[0, 0], [[0, -0.5, -1], [-0.5, 0, -0.5], [-1, -0.5, 0]], rtol=1e-6)


def relative(**changes):
    options = {"num_buckets": 8, "max_distance": 6, "bidirectional": False, "init": nnx.initializers.normal(1.0)}
    return RelativePosition(N, rngs=nnx.Rngs(0), **(options | changes))


BIASES = {
    "alibi": lambda: Alibi(N),
    "relative": relative,
    "bidirectional": lambda: relative(bidirectional=True),
}


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("offset", [0, 3, "rows"])
@pytest.mark.parametrize("kind", BIASES)
def test_score_mod_is_the_bias(kind, offset, backend):
    offset = jnp.array([2, 5]) if offset == "rows" else offset
    position = BIASES[kind]()
    q, k, v = normal(B, T, N, H), normal(B, T + 5, 2, H), normal(B, T + 5, 2, H)
    bias = position.bias(T, T + 5, offset)
    mask = AttentionMask.causal(offset)
    expected = attend(q, k, v, mask, bias, backend="reference")[0]
    got = attend(q, k, v, mask, score_mod=position.score_mod(offset), backend=backend)[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert float(jnp.abs(attend(q, k, v, mask)[0] - got).max()) > 1e-2


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_the_learned_table_gets_the_gradient_of_its_bias(backend):
    q, k, v = (normal(B, T, N, H) for _ in range(3))
    graphdef, params = nnx.split(relative())

    def gradient(use_bias):
        def loss(params):
            position = nnx.merge(graphdef, params)
            how = {"bias_BNTS": position.bias(T, T)} if use_bias else {"score_mod": position.score_mod()}
            mask = AttentionMask.causal()
            return jnp.square(attend(q, k, v, mask, backend="reference" if use_bias else backend, **how)[0]).sum()

        return jax.jit(jax.grad(loss))(params)["table"][...]

    expected = gradient(True)
    assert float(jnp.abs(expected).max()) > 1e-2
    np.testing.assert_allclose(gradient(False), expected, atol=2e-4)


def test_relative_positions_beyond_the_longest_share_a_number():
    position = relative()
    bias = position.bias(1, 40, 39)[0, :, 0]  # the last of 40 positions
    np.testing.assert_array_equal(bias[:, 39 - 6], bias[:, 0])
    assert float(jnp.abs(bias[:, 39] - bias[:, 38]).min()) > 0
    # Keys behind the query count as distance 0, unless they are told apart.
    ahead = position.bias(1, 5)[0, :, 0]
    np.testing.assert_array_equal(ahead, jnp.broadcast_to(ahead[:, :1], ahead.shape))
    assert float(jnp.abs(relative(bidirectional=True).bias(1, 5)[0, :, 0, 1:] - ahead[:, :1]).min()) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_buckets": 7}, "num_buckets=7; expected a multiple of 2"),
        ({"num_buckets": 6, "bidirectional": True}, "num_buckets=6; expected a multiple of 4"),
        ({"max_distance": 4}, "max_distance=4; expected above 4"),
    ],
)
def test_buckets_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        relative(**given)
