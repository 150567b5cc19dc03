"""What a step of decoding reads: weights in the type it computes in, caches that grow, and few programs for all lengths."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from tests.made import made
from transformer.attention.spec.mask import AttentionMask
from transformer.generation.beam import BeamSearch
from transformer.generation.decoding import SHORT_CACHE, cache_length, for_decoding, padded_length, with_room
from transformer.generation.generate import Generator
from transformer.generation.sampling import Sampling
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.layers.position import AlibiConfig, RotaryConfig
from transformer.mixers.latent import LatentConfig
from transformer.mixers.lstmn import LSTMNConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.mixers.state import KVCache, WindowCache
from transformer.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=64, max_length=96, num_layers=1, embed_dim=32, attention=SoftmaxConfig(num_heads=2))
GREEDY = Sampling(temperature=0.0)


def model_of(config):
    return nnx.merge(*made(lambda rngs: GPT(config, rngs=rngs), std=0.3))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": False},
        {"mlp": ExpertsConfig(num_experts=2)},
        {"attention": LatentConfig(num_heads=2, latent_dim=16)},
        {"attention": LSTMNConfig(hidden_dim=16)},
    ],
    ids=["tied", "untied", "experts", "latent", "lstmn"],
)
def test_weights_are_cast_once_and_give_the_same_scores(change):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", **change)
    model = model_of(config)
    apart, ready = model.unstacked(), for_decoding(model)
    tokens = jnp.arange(6)[None]

    @nnx.jit
    def scores(model):
        states = model.make_states(1, 8)
        first = model(tokens, states=states)
        return first.logits, model(tokens[:, -1:], states=first.states).logits

    # Equal bits: what is cast was read in no other way.
    jax.tree.map(np.testing.assert_array_equal, scores(ready), scores(apart))
    large = {array.dtype.name for array in jax.tree.leaves(nnx.state(ready, nnx.Param)) if array.size >= 32 * 64}
    assert large == ({"bfloat16", "float32"} if isinstance(config.attention, LSTMNConfig) else {"bfloat16"})
    # The given model keeps its own.
    assert {array.dtype.name for array in jax.tree.leaves(nnx.state(model, nnx.Param))} == {"float32"}


def test_a_step_casts_no_weight():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", num_layers=2)
    graphdef, params = nnx.split(for_decoding(model_of(config)))

    def step(params, token):
        model = nnx.merge(graphdef, params)
        return model(token, states=model.make_states(1, 32)).logits

    program = jax.make_jaxpr(step)(params, jnp.zeros((1, 1), jnp.int32))
    weights = {array.shape for array in jax.tree.leaves(params) if array.size >= 32 * 32}
    cast = {
        one.outvars[0].aval.shape for one in equations(program.jaxpr) if one.primitive.name == "convert_element_type"
    }
    assert cast and not cast & weights


def equations(jaxpr):
    for one in jaxpr.eqns:
        yield one
        for inner in jaxprs_in_params(one.params):
            yield from equations(inner)


def check_greedy(model, prompts, found, length):
    """Each token is the most likely one after all before it, in one forward pass."""
    texts = [[*prompt, *row.tolist()] for prompt, row in zip(prompts, found, strict=True)]
    padded = jnp.array([text + [0] * (length - len(text)) for text in texts])
    choices = np.asarray(nnx.jit(lambda model, tokens: model(tokens).logits)(model, padded)).argmax(-1)
    for prompt, tokens, row in zip(prompts, found, choices, strict=True):
        np.testing.assert_array_equal(row[len(prompt) - 1 :][: len(tokens)], tokens)


@pytest.mark.parametrize("chunk", [None, 100])
def test_a_cache_grows_with_what_it_holds(chunk):
    config = dataclasses.replace(CONFIG, max_length=640, attention=SoftmaxConfig(num_heads=2, num_kv_heads=1))
    model = model_of(config)
    prompts = [np.random.default_rng(0).integers(0, 64, size).tolist() for size in (SHORT_CACHE - 10, 7)]
    params = nnx.state(model, nnx.Param)
    assert cache_length(SHORT_CACHE - 10, SHORT_CACHE + 20, 640) == 640 > SHORT_CACHE
    found = np.concatenate(
        list(Generator(config).generate(params, prompts, max_tokens=30, sampling=GREEDY, chunk=chunk)), axis=1
    )
    check_greedy(model, prompts, found, 640)


LOCAL = SoftmaxConfig(num_heads=2, num_kv_heads=1, window=7, position=RotaryConfig())
WINDOWS = dataclasses.replace(
    CONFIG, num_layers=2, pattern=(LOCAL, dataclasses.replace(LOCAL, window=None)), attention=LOCAL
)


@pytest.fixture(scope="module")
def windows():
    return model_of(WINDOWS)


def test_a_window_keeps_what_it_sees(windows):
    params, generator = nnx.state(windows, nnx.Param), Generator(WINDOWS)
    # Shorter than the window and longer, and past several turns of its slots.
    prompts = [[5], list(range(7)), list(range(20, 51))]
    (found,) = generator.generate(params, prompts, max_tokens=30, sampling=GREEDY)
    check_greedy(windows, prompts, found, 61)
    tokens_BT, lengths_B = generator._padded(prompts, 64)
    states = generator._prefill(
        params, tokens_BT, lengths_B, jax.random.key(0), max_length=64, sampling=GREEDY
    ).states  # fmt: skip
    assert [type(state) for state in states] == [WindowCache, KVCache]
    assert [state.v.shape[-2] for state in states] == [8, 64]


def test_beams_share_a_windows_slots(windows):
    params = nnx.state(windows, nnx.Param)
    prompt = list(range(20, 32))
    (found,) = Generator(WINDOWS, end_of_text=3).search(
        params, [prompt], max_tokens=20, search=BeamSearch(beams=4, num_best=4)
    )
    assert len(found) == 4
    for one in found:
        text = jnp.array([[*prompt, *one.tokens, 3]])
        log_probs = jax.nn.log_softmax(windows(text[:, :-1]).logits)[0]
        expected = jnp.take_along_axis(log_probs, text[0, 1:, None], axis=-1)[len(prompt) - 1 :].sum()
        np.testing.assert_allclose(one.log_probability, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "shrinks"),
    [
        ({}, True),
        ({"sinks": 2}, False),
        ({"position": AlibiConfig()}, False),
        ({"window": 40}, False),
    ],
    ids=["plain", "sinks", "alibi", "long"],
)
def test_what_needs_more_than_the_newest_positions_keeps_all(change, shrinks):
    mixer = dataclasses.replace(LOCAL, **change)
    (state,) = with_room([KVCache.empty(1, 32, 1, 4, jnp.float32)], [mixer], 32)
    assert isinstance(state, WindowCache) == shrinks


def test_a_windows_cache_refuses_what_it_cannot_serve(windows):
    ready = for_decoding(windows)
    states = with_room(windows.make_states(1, 32), WINDOWS.mixers(), 32)
    for tokens, options in [([[1, 2]], {}), ([[1]], {"mask": AttentionMask.window(left=3)})]:
        with pytest.raises(ValueError, match="a window's cache takes"):
            ready(jnp.array(tokens), states=states, **options)


def test_a_few_programs_serve_all_lengths():
    model = model_of(CONFIG)
    generator, params = Generator(CONFIG), nnx.state(model, nnx.Param)
    for length, max_tokens in [(1, 31), (7, 12), (20, 3), (31, 1)]:
        list(generator.generate(params, [[1] * length], max_tokens=max_tokens, sampling=GREEDY))
    assert generator._prefill._cache_size() == generator._decode._cache_size() == 1
    sizes = {padded_length(length) for length in range(1, 8193)}
    assert len(sizes) == 17 and max(sizes) == 8192
    assert all(padded_length(length) < 1.5 * length for length in range(33, 8193))
