"""Generation equals repeated full forward passes, and depends on the prompt and the seed alone."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.made import made
from transformer.errors import UserError
from transformer.generation.beam import BeamSearch
from transformer.generation.generate import Generator, until_end
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
    return nnx.merge(*made(lambda rngs: GPT(CONFIG, rngs=rngs), std=0.3))


@pytest.fixture(scope="module")
def generator():
    return Generator(CONFIG)


def run(generator, model, prompts=PROMPTS, max_tokens=9, **options):
    chunks = generator.generate(nnx.state(model, nnx.Param), prompts, max_tokens=max_tokens, **options)
    return np.concatenate(list(chunks), axis=1)


def check_greedy(model, written):
    """Each token is the most likely one after all before it, in one forward pass: what comes after has no influence."""
    texts = [[*prompt, *tokens.tolist()] for prompt, tokens in zip(PROMPTS, written, strict=True)]
    padded = jnp.array([text + [0] * (20 - len(text)) for text in texts])
    choices = np.asarray(nnx.jit(lambda model, tokens: model(tokens).logits)(model, padded)).argmax(-1)
    for prompt, tokens, row in zip(PROMPTS, written, choices, strict=True):
        np.testing.assert_array_equal(row[len(prompt) - 1 :][: len(tokens)], tokens)


def test_greedy_equals_the_full_forward_pass(model, generator):
    check_greedy(model, run(generator, model, sampling=GREEDY))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5, top_p=0.9, repetition_penalty=1.5)], ids=str)
def test_chunks_and_neighbours_change_nothing(model, generator, sampling):
    whole = run(generator, model, sampling=sampling, seed=3)
    if sampling != Sampling():
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


def test_stops_at_any_of_several_end_tokens(model, generator):
    first = run(generator, model, sampling=GREEDY)
    end = int(first[0, 3])
    unused = next(token for token in range(CONFIG.vocab_size) if token not in first)
    stopping = Generator(CONFIG, end_of_text=(unused, end))
    got = run(stopping, model, PROMPTS[:1], max_tokens=60, sampling=GREEDY, chunk=5)
    where = first[0].tolist().index(end)
    assert got[0, where] == end and (got[0, where + 1 :] == unused).all()
    assert until_end([got], (unused, end)) == [first[0, :where].tolist()]


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
    model = nnx.merge(*made(lambda rngs: GPT(config, rngs=rngs)))
    assert run(Generator(config), model, [[1, 2]], max_tokens=14).shape == (1, 14)


EXPERTS = dataclasses.replace(
    CONFIG, num_layers=1, mlp=ExpertsConfig(num_experts=4, experts_per_token=2, capacity_factor=0.25, dim=48)
)


@pytest.fixture(scope="module")
def mixture():
    """A mixture of experts that have too little room for all, whose choices are far from even."""
    graphdef, params = made(lambda rngs: GPT(EXPERTS, rngs=rngs), std=0.4)
    return nnx.merge(graphdef, params)


RNG = np.random.default_rng(0)
NEIGHBOURS = [PROMPTS[2], *(RNG.integers(0, 32, length).tolist() for length in (40, 70))]
PROMPT = RNG.integers(0, 32, 24).tolist()


@pytest.fixture(scope="module")
def written_by_experts(mixture):
    return run(Generator(EXPERTS), mixture, sampling=GREEDY)


@pytest.fixture(scope="module")
def writer(written_by_experts):
    """Of texts that end by what a neighbour writes first."""
    return Generator(EXPERTS, end_of_text=int(written_by_experts[2, 0]))


@pytest.mark.parametrize(("how", "counts"), [("greedy", (1, 3)), ("drawn", (3,)), ("searched", (3,))])
def test_neighbours_take_no_room_from_a_row(mixture, writer, how, counts):
    """Of any length, and of which some have long ended."""
    params = nnx.state(mixture, nnx.Param)

    def written(prompts):
        if how == "searched":
            found = writer.search(params, prompts, max_tokens=9, search=BeamSearch(beams=3, num_best=2))[0]
            return [hypothesis.tokens for hypothesis in found]
        sampling = GREEDY if how == "greedy" else Sampling()
        return run(writer, mixture, prompts, sampling=sampling, max_tokens=9)[0].tolist()

    alone = written([PROMPT])
    for count in counts:
        together = written([PROMPT, *NEIGHBOURS[:count]])
        length = len(together) if how != "searched" else None
        assert together == alone[:length], count


def test_a_mixture_reads_prompts_as_it_reads_single_tokens(mixture, written_by_experts):
    """With a cache and without one, as any other model."""
    free = nnx.merge(*nnx.split(mixture))
    without_limit(free)
    check_greedy(free, written_by_experts)
