"""Generation equals repeated full forward passes, and depends on the prompt and the seed alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.made import made
from transformer.errors import UserError
from transformer.generation.beam import BeamSearch
from transformer.generation.generate import Generator
from transformer.generation.sampling import Sampling
from transformer.layers.mixture_of_experts import ExpertsConfig, without_limit
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


EXPERTS = dataclasses.replace(
    CONFIG, mlp=ExpertsConfig(num_experts=4, experts_per_token=2, capacity_factor=0.25, dim=48)
)


@pytest.fixture(scope="module")
def mixture():
    """A mixture of experts that have too little room for all, whose choices are far from even."""
    graphdef, params = made(lambda rngs: GPT(EXPERTS, rngs=rngs), std=0.4)
    return nnx.merge(graphdef, params)


@pytest.mark.parametrize("how", ["greedy", "drawn", "searched"])
def test_neighbours_take_no_room_from_a_row(mixture, how):
    """Of any length, and of which some have long ended."""
    params = nnx.state(mixture, nnx.Param)
    rng = np.random.default_rng(0)
    neighbours = [rng.integers(0, 32, length).tolist() for length in (1, 40, 70)]
    prompt = rng.integers(0, 32, 24).tolist()
    first = run(Generator(EXPERTS), mixture, [prompt], sampling=GREEDY, max_tokens=9)
    # The end of text is what a neighbour writes early.
    end = int(run(Generator(EXPERTS), mixture, neighbours[1:2], sampling=GREEDY, max_tokens=1)[0, 0])
    writer = Generator(EXPERTS, end_of_text=end)

    def written(prompts):
        if how == "searched":
            found = writer.search(params, prompts, max_tokens=9, search=BeamSearch(beams=3, num_best=2))[0]
            return [hypothesis.tokens for hypothesis in found]
        sampling = GREEDY if how == "greedy" else Sampling()
        return run(writer, mixture, prompts, sampling=sampling, max_tokens=9)[0].tolist()

    alone = written([prompt])
    for count in range(1, 4):
        together = written([prompt, *neighbours[:count]])
        length = len(together) if how != "searched" else None
        assert together == alone[:length], count
    assert first.shape == (1, 9)


def test_a_mixture_reads_prompts_as_it_reads_single_tokens(mixture):
    """With a cache and without one, as any other model."""
    free = nnx.merge(*nnx.split(mixture))
    without_limit(free)
    got = run(Generator(EXPERTS), mixture, sampling=GREEDY)
    forward = nnx.jit(lambda model, tokens: model(tokens).logits)
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        text = list(prompt)
        for token in tokens:
            padded = jnp.array([text + [0] * (20 - len(text))])
            assert int(jnp.argmax(forward(free, padded)[0, len(text) - 1])) == token
            text.append(int(token))
