"""LongRoPE: two sets of factors, one for texts of up to the original length and one for longer ones, also while decoding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.changed import changed
from tests.made import made
from transformer.errors import ConfigError
from transformer.generation.decoding import cache_length
from transformer.generation.generate import Generator
from transformer.generation.sampling import Sampling
from transformer.layers.position import RotaryConfig, RotaryScaling, rotary, rotary_frequencies
from transformer.mixers.differential import DifferentialConfig
from transformer.mixers.latent import LatentConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig

BOUNDARY = 40
SCALING = RotaryScaling(
    kind="longrope", factor=4.0, original_length=BOUNDARY, short_factors=(1.0, 1.2), long_factors=(2.0, 9.0)
)
POSITION = RotaryConfig(theta=20.0, scaling=SCALING)
MODEL = GPTConfig(
    vocab_size=29, max_length=160, num_layers=2, embed_dim=8, attention=SoftmaxConfig(num_heads=2, position=POSITION)
)


def test_frequencies_and_magnitude():
    plain = rotary_frequencies(4, 20.0)
    for length, factors in ((None, (1.0, 1.2)), (BOUNDARY, (1.0, 1.2)), (BOUNDARY + 1, (2.0, 9.0))):
        got = rotary_frequencies(4, 20.0, SCALING, length=length)
        np.testing.assert_allclose(got, plain / np.asarray(factors), rtol=1e-6)
    assert SCALING.magnitude == pytest.approx(np.sqrt(1 + np.log(4) / np.log(BOUNDARY)))
    assert dataclasses.replace(SCALING, factor=1.0).magnitude == 1
    assert dataclasses.replace(SCALING, attention_factor=1.5).magnitude == 1.5
    with pytest.raises(ValueError, match="longrope: 2 factors for 4 pairs of features"):
        rotary_frequencies(8, 20.0, SCALING)


@pytest.mark.torch
@pytest.mark.parametrize("length", [None, 255, 256, 257, 1024])
def test_frequencies_are_those_of_transformers(length):
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    rng = np.random.default_rng(0)
    short, long = (rng.uniform(1, 8, 32).tolist() for _ in range(2))
    config = transformers.Phi3Config(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=1024, original_max_position_embeddings=256,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long},
    )  # fmt: skip
    expected, magnitude = rope.ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
    scaling = RotaryScaling(
        kind="longrope", factor=4.0, original_length=256, short_factors=tuple(short), long_factors=tuple(long)
    )
    np.testing.assert_allclose(rotary_frequencies(64, 1e4, scaling, length=length), expected.numpy(), rtol=2e-6)
    assert scaling.magnitude == pytest.approx(magnitude)


def test_each_row_has_the_factors_of_its_last_position():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2, 4)), jnp.float32)
    positions = jnp.asarray([[0, 1, 2, 39], [0, 1, 2, 40], [0, 1, 0, 1]])
    options = {"theta": 20.0, "scaling": SCALING}
    got = jax.jit(lambda x, positions: rotary(x, positions, **options))(x, positions)
    for row, length in enumerate((40, 41, 2)):
        alone = rotary(x[row : row + 1], positions[row : row + 1], **options, length=length)
        np.testing.assert_allclose(got[row : row + 1], alone, atol=1e-5)
    assert float(jnp.abs(got[0, :3] - rotary(x, positions, **options, length=41)[0, :3]).max()) > 0.1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"original_length": None}, "original_length"),
        ({"original_length": 1}, "original_length"),
        ({"short_factors": ()}, "short_factors"),
        ({"long_factors": (1.0, 0.0)}, "long_factors"),
        ({"long_factors": (1.0, 2.0, 3.0)}, "long_factors"),
        ({"attention_factor": 0.0}, "attention_factor"),
        ({"kind": "yarn"}, "short_factors"),
    ],
)
def test_what_is_refused(given, field):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(SCALING, **given)
    assert caught.value.field == field


def test_factors_that_do_not_fit_a_model():
    with pytest.raises(ConfigError, match="it has 2 longrope factors for 4 pairs of features; allowed: one each"):
        changed(MODEL, embed_dim=16)
    other = dataclasses.replace(POSITION, scaling=dataclasses.replace(SCALING, original_length=50))
    with pytest.raises(ConfigError, match="longrope; allowed: equal original_length in all of them"):
        changed(MODEL, pattern=(MODEL.attention, dataclasses.replace(MODEL.attention, position=other)))
    assert (
        MODEL.position_boundary == BOUNDARY
        and changed(MODEL, attention={"position": RotaryConfig()}).position_boundary is None
    )
    # A window's cache does not know how long its text may become.
    assert dataclasses.replace(MODEL.attention, window=4).window_size is None


def test_the_caches_of_a_text_are_on_one_side():
    for boundary in (40, 512, 700):
        for total in (boundary - 3, boundary, boundary + 1, 4 * boundary):
            for filled in range(1, total + 1, 7):
                room = cache_length(filled, total, 8192, boundary)
                assert room >= filled and (room > boundary) == (total > boundary)
    assert cache_length(10, 200, 8192) == cache_length(10, 200, 8192, 1000)


def uncached(params, config, prompt, count):
    """Greedy tokens, each by a call over the whole text, padded to the length that it will have."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens).logits)
    tokens = np.zeros((1, len(prompt) + count), np.int32)
    tokens[0, : len(prompt)] = prompt
    for place in range(len(prompt), tokens.shape[1]):
        tokens[0, place] = int(run(params, jnp.asarray(tokens))[0, place - 1].argmax())
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("attention", "start", "count"),
    [
        (MODEL.attention, 30, 10),
        (MODEL.attention, 30, 11),
        (MODEL.attention, 45, 6),
        (dataclasses.replace(MODEL.attention, window=6), 36, 8),
        (LatentConfig(num_heads=2, rotary_dim=4, theta=20.0, scaling=SCALING), 36, 8),
        (DifferentialConfig(num_heads=1, head_dim=4, position=POSITION), 36, 8),
    ],
    ids=["up to the boundary", "one beyond it", "from beyond it", "a window", "latent", "differential"],
)
def test_a_text_is_decoded_with_the_factors_of_its_whole_length(attention, start, count):
    config = dataclasses.replace(MODEL, attention=attention)
    params = made(lambda rngs: GPT(config, rngs=rngs), std=0.5)[1]
    prompt = np.random.default_rng(start).integers(0, 29, start).tolist()
    expected = uncached(params, config, prompt, count)
    greedy = Sampling(temperature=0.0)
    (got,) = Generator(config).generate(params, [prompt], max_tokens=count, sampling=greedy)
    assert got[0].tolist() == expected
