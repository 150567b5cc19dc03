"""Beam search against brute force and greedy decoding, and what a translation depends on."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.made import made
from transformer.alignment.fast_memory import FastMemoryConfig
from transformer.alignment.scored import AdditiveConfig, HardConfig
from transformer.errors import ConfigError, UserError
from transformer.generation.beam import MIN_COVERED, BeamSearch, beam_search, sample_translations
from transformer.generation.generate import Generator
from transformer.generation.sampling import Sampling
from transformer.generation.translator import Translator
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.layers.position import RelativeConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.encoder_decoder import EncoderDecoder, T5Config
from transformer.models.gpt import GPT, GPTConfig
from transformer.models.recurrent import RecurrentConfig, RecurrentTranslator

START, END = 0, 1
CONFIG = RecurrentConfig(
    source_vocab_size=11, vocab_size=12, embed_dim=8, hidden_dim=16, encoder_dim=8, init_std=0.9,
    attention=AdditiveConfig(dim=8),
    max_length=40,
)  # fmt: skip
SOURCES = [[3, 4, 5], [6, 7, 8, 9, 10, 2, 3, 4, 5, 6, 7, 8, 9, 10, 2, 3, 4], [2], [9, 9, 4, 4]]


def setting(config, **options):
    def make(rngs):
        return RecurrentTranslator(config, rngs=rngs)

    params = nnx.state(make(nnx.Rngs(5)), nnx.Param)
    return Translator(make, start_token=START, end_of_text=END, **options), params


@pytest.fixture(scope="module")
def translator():
    return setting(CONFIG)


def plain(hypotheses):
    return [[hypothesis.tokens for hypothesis in row] for row in hypotheses]


def forced(config, params, source, tokens):
    """Log-probabilities [T, V] and weights [T, S] of a translation and its end, by teacher forcing."""
    graphdef = nnx.split(RecurrentTranslator(config, rngs=nnx.Rngs(0)))[0]
    run = jax.jit(lambda source, target: nnx.merge(graphdef, params)(source, target, return_weights=True))
    out = run(jnp.array([source]), jnp.array([[START, *tokens]]))
    weights = None if out.weights is None else np.asarray(out.weights[0, 0, 0])
    return np.asarray(jax.nn.log_softmax(out.logits[0])), weights


def test_one_beam_is_greedy(translator):
    translate, params = translator
    got = translate.translate(params, SOURCES, max_tokens=9, search=BeamSearch(beams=1))
    drawn = translate.translate(params, SOURCES, max_tokens=9, sampling=Sampling(temperature=0.0))
    assert plain(got) == plain(drawn)
    for source, (hypothesis,) in zip(SOURCES, got, strict=True):
        log_probs, _ = forced(CONFIG, params, source, hypothesis.tokens)
        choices = log_probs.argmax(-1).tolist()
        assert choices[:-1] == hypothesis.tokens
        assert len(hypothesis.tokens) == 9 or choices[-1] == END
        written = [*hypothesis.tokens, END]
        total = log_probs[np.arange(len(written)), written].sum()
        assert hypothesis.log_probability == pytest.approx(total, abs=1e-4)
        assert hypothesis.score == pytest.approx(total / ((5 + len(written)) / 6) ** 0.6, abs=1e-4)


TINY = dataclasses.replace(CONFIG, vocab_size=5)


def every_translation(params, source, longest, alpha, beta, fewest=0):
    """Score and tokens of all translations of tokens 0, 2 and 3 (4 is padding of the vocabulary), the best first."""
    found = []
    graphdef = nnx.split(RecurrentTranslator(TINY, rngs=nnx.Rngs(0)))[0]
    run = jax.jit(lambda source, target: nnx.merge(graphdef, params)(source, target, return_weights=True))
    for length in range(fewest, longest + 1):
        tokens = [list(choice) for choice in itertools.product([0, 2, 3], repeat=length)]
        inputs = jnp.array([[START, *row] for row in tokens])
        out = run(jnp.array([source] * len(tokens)), inputs)
        log_probs = np.asarray(jax.nn.log_softmax(out.logits[..., :4]))
        for row, choice in enumerate(tokens):
            total = log_probs[row, np.arange(length + 1), [*choice, END]].sum()
            coverage = np.log(np.clip(np.asarray(out.weights)[0, row, 0].sum(0), MIN_COVERED, 1)).sum()
            found.append((total / ((6 + length) / 6) ** alpha + beta * coverage, choice, total))
    return sorted(found, key=lambda one: -one[0])


@pytest.mark.parametrize(("alpha", "beta", "fewest"), [(0.0, 0.0, 0), (0.6, 0.0, 2), (1.5, 0.4, 0)])
def test_a_beam_that_is_wide_enough_finds_the_best_translations(alpha, beta, fewest):
    translate, params = setting(TINY, num_tokens=4)
    search = BeamSearch(
        beams=128, length_penalty=alpha, coverage_penalty=beta, num_best=5, min_tokens=fewest,
    )  # fmt: skip
    sources = SOURCES[::2]
    for source, got in zip(sources, translate.translate(params, sources, max_tokens=4, search=search), strict=True):
        expected = every_translation(params, source, 4, alpha, beta, fewest)[:5]
        assert [one.tokens for one in got] == [tokens for _, tokens, _ in expected]
        np.testing.assert_allclose([one.score for one in got], [score for score, _, _ in expected], atol=1e-4)
        np.testing.assert_allclose([one.log_probability for one in got], [total for *_, total in expected], atol=1e-4)


def test_fewer_continuations_than_beams_are_all_that_is_found():
    translate, params = setting(TINY, num_tokens=4)
    search = BeamSearch(beams=50, num_best=50)
    for got in translate.translate(params, SOURCES, max_tokens=2, search=search):
        assert sorted(one.tokens for one in got) == sorted(
            list(choice) for length in range(3) for choice in itertools.product([0, 2, 3], repeat=length)
        )
        assert all(math.isfinite(one.score) for one in got)
        assert sum(math.exp(one.log_probability) for one in got) < 1


HOW = {
    "narrow": {"search": BeamSearch(beams=3, num_best=2)},
    "covering": {"search": BeamSearch(beams=3, coverage_penalty=0.3, min_tokens=2)},
    "drawn": {"sampling": Sampling(top_k=6), "seed": 3},
}


@pytest.mark.parametrize("how", HOW)
def test_a_translation_does_not_depend_on_the_others(translator, how):
    translate, params = translator
    together = translate.translate(params, SOURCES, max_tokens=9, **HOW[how])
    alone = [translate.translate(params, [source], max_tokens=9, **HOW[how])[0] for source in SOURCES]
    if how == "drawn":
        # What is drawn follows the seed and the number of the source.
        assert plain(together)[0] == plain(alone)[0]
        assert plain(together) == plain(translate.translate(params, SOURCES, max_tokens=9, **HOW[how]))
        few, _ = setting(CONFIG, batch_size=2)
        assert plain(few.translate(params, SOURCES, max_tokens=9, **HOW[how])) == plain(together)
        other = translate.translate(params, SOURCES, max_tokens=9, **{**HOW[how], "seed": 4})
        assert plain(other) != plain(together)
        return
    assert plain(together) == plain(alone)
    few, _ = setting(CONFIG, batch_size=3)
    assert plain(few.translate(params, SOURCES, max_tokens=9, **HOW[how])) == plain(together)


def test_wider_beams_return_sorted_and_no_worse(translator):
    translate, params = translator
    narrow = translate.translate(params, SOURCES, max_tokens=9, search=BeamSearch(beams=1, length_penalty=0.0))
    wide = translate.translate(
        params, SOURCES, max_tokens=9, search=BeamSearch(beams=64, num_best=8, length_penalty=0.0)
    )
    for first, best in zip(narrow, wide, strict=True):
        scores = [one.score for one in best]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(one.tokens) for one in best}) == len(best) == 8
        assert scores[0] >= first[0].score - 1e-5


@pytest.mark.parametrize("num_best", [1, 2, 3])
def test_stopping_early_changes_nothing(translator, num_best):
    translate, params = translator
    # With as many wanted as there are beams, a row goes on until all of its beams have ended.
    search = BeamSearch(beams=3, num_best=num_best, length_penalty=1.2)
    full = dataclasses.replace(search, num_best=3)
    stopped, whole = (translate.translate(params, SOURCES, max_tokens=12, search=how) for how in (search, full))
    assert plain(stopped) == [row[:num_best] for row in plain(whole)]


def test_a_row_stops_when_nothing_can_change():
    steps = []

    def step(token, state):
        jax.debug.callback(lambda: steps.append(1))
        return jnp.tile(jnp.log(jnp.array([0.05, 0.9, 0.05])), (token.shape[0], 1)), state, None

    start, limit = jnp.zeros(2, jnp.int32), jnp.full(2, 30, jnp.int32)
    found = beam_search(
        step, jnp.zeros(8), start, limit, search=BeamSearch(length_penalty=0.0), width=32, end_of_text=END
    )
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert np.asarray(found.length_BQ).tolist() == [[0], [0]]
    np.testing.assert_allclose(found.log_probability_BQ, math.log(0.9), rtol=1e-5)
    assert len(steps) == 1


def test_limits_and_the_vocabulary_are_kept():
    few, params = setting(CONFIG, num_tokens=6)
    for how in ({"search": BeamSearch(beams=4, num_best=4, min_tokens=3)}, {"sampling": Sampling()}):
        got = few.translate(params, SOURCES, max_tokens=5, **how)
        for one in itertools.chain(*got):
            assert len(one.tokens) <= 5
            assert END not in one.tokens
            assert max(one.tokens, default=0) < 6
            if "search" in how:
                assert len(one.tokens) >= 3
    ratio = few.translate(params, SOURCES, max_ratio=0.1, search=BeamSearch(min_tokens=40))
    assert [len(row[0].tokens) for row in ratio] == [9, 10, 9, 9]
    least = few.translate(params, SOURCES, max_ratio=0.1, max_tokens=4, search=BeamSearch(min_tokens=40))
    assert [len(row[0].tokens) for row in least] == [4] * 4
    # The model's context bounds what has no other limit.
    unbounded = few.translate(params, SOURCES[1:2], search=BeamSearch(min_tokens=400))
    assert [len(row[0].tokens) for row in unbounded] == [39]


def test_coverage_prefers_a_translation_of_every_source_token(translator):
    translate, params = translator

    def uncovered(search):
        total = 0.0
        for source, (best, *_) in zip(
            SOURCES, translate.translate(params, SOURCES, max_tokens=9, search=search), strict=True
        ):
            _, weights = forced(CONFIG, params, source, best.tokens)
            total -= np.log(np.clip(weights.sum(0), MIN_COVERED, 1)).sum()
        return total

    plain_search = BeamSearch(beams=32, length_penalty=0.0)
    assert uncovered(dataclasses.replace(plain_search, coverage_penalty=20.0)) < uncovered(plain_search)


def test_coverage_of_hard_attention_is_finite():
    config = dataclasses.replace(CONFIG, attention=HardConfig(dim=8))
    translate, params = setting(config)
    for row in translate.translate(params, SOURCES, max_tokens=4, search=BeamSearch(coverage_penalty=0.2, num_best=4)):
        assert all(math.isfinite(one.score) for one in row)
        assert row


def test_samples_follow_the_models_distribution():
    probabilities = np.array([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.25, 0.5, 0.25]], np.float32)

    def step(token, state):
        return jnp.log(jnp.asarray(probabilities))[token], state + 1, None

    rows = 4000
    keys = jax.random.split(jax.random.key(0), rows)
    start, limit = jnp.full(rows, 2, jnp.int32), jnp.full(rows, 2, jnp.int32)
    found = sample_translations(
        step, jnp.zeros(rows), start, limit, keys, sampling=Sampling(), width=4, end_of_text=END
    )
    tokens, lengths = np.asarray(found.tokens_BQn[:, 0]), np.asarray(found.length_BQ[:, 0])
    for length, share in ((0, 0.5), (1, 0.25 * 0.2 + 0.25 * 0.5), (2, 0.25 * 0.8 + 0.25 * 0.5)):
        assert (lengths == length).mean() == pytest.approx(share, abs=0.03)
    both = (lengths == 2) & (tokens[:, 0] == 2) & (tokens[:, 1] == 0)
    assert both.mean() == pytest.approx(0.25 * 0.25, abs=0.02)
    np.testing.assert_allclose(found.log_probability_BQ[both, 0], math.log(0.25 * 0.25), rtol=1e-5)


def test_a_repetition_penalty_forbids_what_was_written(translator):
    translate, params = translator
    sampling = Sampling(temperature=0.0, repetition_penalty=1e6)
    for (one,) in translate.translate(params, SOURCES, max_tokens=8, sampling=sampling):
        assert len(set(one.tokens)) == len(one.tokens)


def test_a_decoder_only_model_can_be_searched():
    config = GPTConfig(vocab_size=5, max_length=16, num_layers=2, embed_dim=16, attention=SoftmaxConfig(num_heads=2))
    model = GPT(config, rngs=nnx.Rngs(3))
    nnx.update(model, jax.tree.map(lambda p: p * 8, nnx.state(model, nnx.Param)))
    params = nnx.state(model, nnx.Param)
    prompts, longest = [[2, 3, 0, 2], [3, 3]], 3
    generator = Generator(config, end_of_text=END, num_tokens=4)
    found = generator.search(params, prompts, max_tokens=longest, search=BeamSearch(beams=64, num_best=2))
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens).logits[..., :4]))
    for row, prompt in enumerate(prompts):
        best = (-math.inf, [])
        for length in range(longest + 1):
            choices = [list(choice) for choice in itertools.product([0, 2, 3], repeat=length)]
            log_probs = np.asarray(forward(jnp.array([prompt + choice for choice in choices])))[:, len(prompt) - 1 :]
            for index, choice in enumerate(choices):
                total = log_probs[index, np.arange(length + 1), [*choice, END]].sum()
                best = max(best, (total / ((6 + length) / 6) ** 0.6, choice))
        assert found[row][0].tokens == best[1]
        assert found[row][0].score == pytest.approx(best[0], abs=1e-4)
        assert found[row][1].score <= found[row][0].score
    (alone,) = generator.search(params, prompts[1:], max_tokens=longest, search=BeamSearch(beams=64, num_best=2))
    assert [h.tokens for h in alone] == [h.tokens for h in found[1]]
    with pytest.raises(UserError, match="needs an end of text"):
        Generator(config).search(params, prompts, max_tokens=1)
    with pytest.raises(UserError, match="exceed the model's context of 16"):
        generator.search(params, prompts, max_tokens=14)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([[1], []], {}, "source 2 is empty"),
        ([[1, 11]], {}, "token id 11 is outside the model's vocabulary of 11"),
        ([[1, -2]], {}, "token id -2"),
        ([[1] * 41], {}, "41 tokens exceed the model's context of 40"),
        ([[1]], {"max_tokens": 40}, "writes at most 39"),
        ([[1]], {"max_tokens": 0}, "max_tokens: got 0"),
        ([[1]], {"max_ratio": 0.0}, "max_ratio: got 0.0"),
        ([[1]], {"search": BeamSearch(), "sampling": Sampling()}, "give one of them"),
    ],
)
def test_what_cannot_be_translated_is_refused(translator, sources, options, message):
    translate, params = translator
    with pytest.raises(UserError, match=message):
        translate.translate(params, sources, **options)


@pytest.mark.parametrize(
    "how", [{"search": BeamSearch(beams=2)}, {"sampling": Sampling(), "seed": 3}], ids=["search", "sampling"]
)
def test_sources_of_a_mixture_of_experts_take_no_room_from_each_other(how):
    config = T5Config(
        vocab_size=32, max_length=64, num_layers=2, embed_dim=16,
        attention=SoftmaxConfig(num_heads=2, head_dim=8, bias=False, scale=1.0, position=RelativeConfig()),
        mlp=ExpertsConfig(num_experts=4, experts_per_token=2, capacity_factor=0.25, dim=32, activation="geglu"),
    )  # fmt: skip
    params = made(lambda rngs: EncoderDecoder(config, rngs=rngs), std=0.4)[1]
    translate = Translator(lambda rngs: EncoderDecoder(config, rngs=rngs), start_token=0, end_of_text=1)
    rng = np.random.default_rng(1)
    # Sampling goes by a source's number, so the order stays.
    sources = [rng.integers(2, 32, length).tolist() for length in (15, 40, 17)]
    together = plain(translate.translate(params, sources, max_tokens=12, **how))
    assert plain(translate.translate(params, sources[:1], max_tokens=12, **how))[0] == together[0]
    assert plain(translate.translate(params, sources[:2], max_tokens=12, **how)) == together[:2]


def test_coverage_without_weights_is_refused():
    translate, params = setting(dataclasses.replace(CONFIG, attention=FastMemoryConfig(kind="delta", dim=8)))
    with pytest.raises(UserError, match="coverage_penalty"):
        translate.translate(params, SOURCES, search=BeamSearch(coverage_penalty=0.1))


def test_no_sources_give_no_translations(translator):
    translate, params = translator
    assert translate.translate(params, []) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"beams": 0}, "beams"),
        ({"length_penalty": -0.1}, "length_penalty"),
        ({"coverage_penalty": -1.0}, "coverage_penalty"),
        ({"beams": 2, "num_best": 3}, "num_best"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
)
def test_searches_that_cannot_be_are_refused(changes, field):
    with pytest.raises(ConfigError) as caught:
        BeamSearch(**changes)
    assert caught.value.field == field


def test_an_end_that_is_never_written_is_refused():
    with pytest.raises(ValueError, match="end_of_text=9"):
        Translator(lambda rngs: RecurrentTranslator(CONFIG, rngs=rngs), start_token=0, end_of_text=9, num_tokens=4)
