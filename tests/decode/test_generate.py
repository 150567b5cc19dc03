"""Generation equals repeated full forward passes, and depends on the prompt and the seed alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.decode.generate import Generator
from transformer.decode.sampling import Sampling
from transformer.errors import UserError
from transformer.layers.position import RotaryConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(
    vocab_size=32, max_length=96, num_layers=2, embed_dim=32,
    attention=SoftmaxConfig(num_heads=4, num_kv_heads=2, position=RotaryConfig()),
    norm="rms_norm",
)  # fmt: skip
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    model = GPT(CONFIG, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    nnx.update(model, jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params))
    return model


@pytest.fixture(scope="module")
def generator():
    return Generator(CONFIG)


def run(generator, model, prompts=PROMPTS, max_tokens=9, **options):
    chunks = generator.generate(nnx.state(model, nnx.Param), prompts, max_tokens=max_tokens, **options)
    return np.concatenate(list(chunks), axis=1)


def test_greedy_equals_the_full_forward_pass(model, generator):
    got = run(generator, model, sampling=GREEDY)
    forward = nnx.jit(lambda model, tokens: model(tokens).logits)
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        text = list(prompt)
        for token in tokens:
            padded = jnp.array([text + [0] * (20 - len(text))])
            assert int(jnp.argmax(forward(model, padded)[0, len(text) - 1])) == token
            text.append(int(token))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5, top_p=0.9, repetition_penalty=1.5)], ids=str)
def test_chunks_and_neighbours_change_nothing(model, generator, sampling):
    whole = run(generator, model, sampling=sampling, seed=3)
    np.testing.assert_array_equal(run(generator, model, sampling=sampling, seed=3, chunk=4), whole)
    alone = run(generator, model, PROMPTS[:1], sampling=sampling, seed=3)
    np.testing.assert_array_equal(alone[0], whole[0])
    assert (run(generator, model, sampling=sampling, seed=4) != whole).any()


def test_repetition_penalty_forbids_what_was_seen(model, generator):
    tokens = run(generator, model, max_tokens=12, sampling=Sampling(temperature=0.0, repetition_penalty=1e6))
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        assert len({*prompt, *row.tolist()}) == len(prompt) + 12


def test_stops_at_the_end_of_text(model, generator):
    first = run(generator, model, sampling=GREEDY)
    end = int(first[0, 3])
    stopping = Generator(CONFIG, end_of_text=end)
    got = run(stopping, model, PROMPTS[:1], max_tokens=60, sampling=GREEDY, chunk=5)
    assert got.shape[1] <= 10
    where = got[0].tolist().index(end)
    assert (got[0, where:] == end).all()
    np.testing.assert_array_equal(got[0, :where], first[0, :where])


def test_a_context_can_be_filled_to_the_last_token(model, generator):
    assert run(generator, model, [[1] * 90], max_tokens=6, sampling=GREEDY).shape == (1, 6)


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "message"),
    [
        ([[]], 3, "empty"),
        ([[1, 99]], 3, "token id 99"),
        ([[1] * 90], 7, "at most 6"),
    ],
)
def test_what_cannot_be_written(model, generator, prompts, max_tokens, message):
    with pytest.raises(UserError, match=message):
        run(generator, model, prompts, max_tokens)


def test_learned_positions_generate_too():
    config = dataclasses.replace(CONFIG, attention=SoftmaxConfig(num_heads=4), norm="layer_norm", max_length=16)
    model = GPT(config, rngs=nnx.Rngs(0))
    assert run(Generator(config), model, [[1, 2]], max_tokens=14).shape == (1, 14)
