"""Beam search against brute force and greedy decoding, and what a translation depends on."""

from __future__ import annotations

import dataclasses
import functools
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
from transformer.models.recurrent import RecurrentTranslator
from transformer.models.recurrent_config import RecurrentConfig

START, END = 0, 1
CONFIG = RecurrentConfig(
    source_vocab_size=11, vocab_size=12, embed_dim=8, hidden_dim=16, encoder_dim=8,
    attention=AdditiveConfig(dim=8),
    max_length=40,
)  # fmt: skip
SOURCES = [[3, 4, 5], [6, 7, 8, 9, 10, 2, 3, 4, 5, 6, 7, 8, 9, 10, 2, 3, 4], [2], [9, 9, 4, 4]]


def maker(config):
    return lambda rngs: RecurrentTranslator(config, rngs=rngs)


@functools.cache
def model_of(config):
    return made(maker(config), std=1.2, seed=7)


def setting(config, **options):
    return Translator(maker(config), start_token=START, end_of_text=END, **options), model_of(config)[1]


@pytest.fixture(scope="module")
def translator():
    return setting(CONFIG)


@pytest.fixture(scope="module")
def greedy(translator):
    translate, params = translator
    return translate.translate(params, SOURCES, max_tokens=9, search=BeamSearch(beams=1))


def plain(hypotheses):
    return [[hypothesis.tokens for hypothesis in row] for row in hypotheses]


@functools.cache
def forward(config):
    graphdef, params = model_of(config)

    @jax.jit
    def run(sources, segments, targets):
        return nnx.merge(graphdef, params)(sources, targets, source_segments_BS=segments, return_weights=True)

    return run


def forced(config, sources, targets, longest, num_tokens=None):
    """Log-probabilities [B, T, V] and weights [B, T, S] of translations and their ends, by teacher forcing."""
    width = max(map(len, sources))
    segments = np.array([[1] * len(source) + [0] * (width - len(source)) for source in sources], np.int32)
    sources = np.array([source + [0] * (width - len(source)) for source in sources], np.int32)
    # What comes after the end has no influence.
    targets = np.array([[START, *tokens] + [0] * (longest - len(tokens)) for tokens in targets], np.int32)
    out = forward(config)(sources, segments, targets)
    return np.asarray(jax.nn.log_softmax(out.logits[..., :num_tokens])), np.asarray(out.weights[0, :, 0])


def test_one_beam_is_greedy(translator, greedy):
    translate, params = translator
    drawn = translate.translate(params, SOURCES, max_tokens=9, sampling=Sampling(temperature=0.0))
    assert plain(greedy) == plain(drawn)
    found, _ = forced(CONFIG, SOURCES, [hypothesis.tokens for (hypothesis,) in greedy], 9)
    for log_probs, (hypothesis,) in zip(found, greedy, strict=True):
        written = [*hypothesis.tokens, END]
        choices = log_probs.argmax(-1).tolist()[: len(written)]
        assert choices[:-1] == hypothesis.tokens
        assert len(hypothesis.tokens) == 9 or choices[-1] == END
        total = log_probs[np.arange(len(written)), written].sum()
        assert hypothesis.log_probability == pytest.approx(total, abs=1e-4)
        assert hypothesis.score == pytest.approx(total / ((5 + len(written)) / 6) ** 0.6, abs=1e-4)


TINY = dataclasses.replace(CONFIG, vocab_size=5)


@functools.cache
def every_sum(longest):
    """What scores are made of, for all translations of tokens 0, 2 and 3 (4 is padding of the vocabulary)."""
    choices = [list(c) for length in range(longest + 1) for c in itertools.product([0, 2, 3], repeat=length)]
    pairs = list(itertools.product(SOURCES[::2], choices))
    log_probs, weights = forced(TINY, *zip(*pairs, strict=True), longest, num_tokens=4)
    found = []
    for row, (source, choice) in enumerate(pairs):
        steps = len(choice) + 1
        total = log_probs[row, np.arange(steps), [*choice, END]].sum()
        seen = weights[row, :steps, : len(source)].sum(0)
        found.append((choice, total, np.log(np.clip(seen, MIN_COVERED, 1)).sum()))
    return found[: len(choices)], found[len(choices) :]


def every_translation(longest, alpha, beta, fewest=0):
    """Score, tokens and sum of all translations of each source, the best first."""
    for found in every_sum(longest):
        scored = [
            (total / ((6 + len(choice)) / 6) ** alpha + beta * coverage, choice, total)
            for choice, total, coverage in found
            if len(choice) >= fewest
        ]
        yield sorted(scored, key=lambda one: -one[0])


@pytest.mark.parametrize(("alpha", "beta", "fewest"), [(0.0, 0.0, 0), (0.6, 0.0, 2), (1.5, 0.4, 0)])
def test_a_beam_that_is_wide_enough_finds_the_best_translations(alpha, beta, fewest):
    translate, params = setting(TINY, num_tokens=4)
    search = BeamSearch(
        beams=128, length_penalty=alpha, coverage_penalty=beta, num_best=5, min_tokens=fewest,
    )  # fmt: skip
    found = translate.translate(params, SOURCES[::2], max_tokens=4, search=search)
    for got, every in zip(found, every_translation(4, alpha, beta, fewest), strict=True):
        expected = every[:5]
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
    few, _ = setting(CONFIG, batch_size=2 if how == "drawn" else 3)

    def by_few(sources, **options):
        return plain(few.translate(params, sources, max_tokens=9, **HOW[how] | options))

    if how == "drawn":
        # What is drawn follows the seed and the number of the source.
        assert by_few(SOURCES[:1]) == plain(together)[:1]
        assert plain(together) == plain(translate.translate(params, SOURCES, max_tokens=9, **HOW[how]))
        assert by_few(SOURCES) == plain(together)
        assert by_few(SOURCES, seed=4) != plain(together)
        return
    # In a program of the same width, and in a narrower one.
    alone = SOURCES if how == "narrow" else SOURCES[2:]
    assert [by_few([source])[0] for source in alone] == plain(together)[-len(alone) :]
    if how == "narrow":
        assert by_few(SOURCES) == plain(together)


def test_wider_beams_return_sorted_and_no_worse(translator, greedy):
    translate, params = translator
    wide = translate.translate(
        params, SOURCES, max_tokens=9, search=BeamSearch(beams=64, num_best=8, length_penalty=0.0)
    )
    for (first,), best in zip(greedy, wide, strict=True):
        scores = [one.score for one in best]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(one.tokens) for one in best}) == len(best) == 8
        # Without a penalty the score is the logarithm of the probability.
        assert scores[0] >= first.log_probability - 1e-5


@pytest.mark.parametrize("num_best", [1, 2])
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
        found = translate.translate(params, SOURCES, max_tokens=9, search=search)
        texts = [best.tokens for best, *_ in found]
        _, weights = forced(CONFIG, SOURCES, texts, 9)
        return -sum(
            np.log(np.clip(of_one[: len(text) + 1, : len(source)].sum(0), MIN_COVERED, 1)).sum()
            for of_one, text, source in zip(weights, texts, SOURCES, strict=True)
        )

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
    graphdef, params = made(lambda rngs: GPT(config, rngs=rngs), std=0.3)
    prompts, longest = [[2, 3, 0, 2], [3, 3]], 3
    generator = Generator(config, end_of_text=END, num_tokens=4)
    found = generator.search(params, prompts, max_tokens=longest, search=BeamSearch(beams=64, num_best=2))
    choices = [list(c) for length in range(longest + 1) for c in itertools.product([0, 2, 3], repeat=length)]
    texts = [prompt + choice for prompt in prompts for choice in choices]
    padded = np.array([text + [0] * (4 + longest - len(text)) for text in texts], np.int32)
    forward = jax.jit(lambda params, tokens: jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens).logits[..., :4]))
    log_probs = np.asarray(forward(params, padded)).reshape(len(prompts), len(choices), -1, 4)
    for row, prompt in enumerate(prompts):
        best = (-math.inf, [])
        for index, choice in enumerate(choices):
            places = len(prompt) - 1 + np.arange(len(choice) + 1)
            total = log_probs[row, index, places, [*choice, END]].sum()
            best = max(best, (total / ((6 + len(choice)) / 6) ** 0.6, choice))
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
        vocab_size=32, max_length=64, num_layers=1, embed_dim=16,
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
        Translator(maker(CONFIG), start_token=0, end_of_text=9, num_tokens=4)


def test_a_hypothesis_ends_with_any_of_several_end_tokens():
    # Tokens 2 and 3 both end a text: that is one way to end it, with the probability of the likelier token.
    logits = jnp.log(jnp.array([0.12, 0.18, 0.4, 0.3]))

    def step(token_R, state):
        return jnp.broadcast_to(logits, (*token_R.shape, 4)), state, None

    start, limit = jnp.zeros(1, jnp.int32), jnp.full(1, 3, jnp.int32)
    search = BeamSearch(beams=3, num_best=3, length_penalty=0.0)
    found = beam_search(step, jnp.zeros(3), start, limit, search=search, width=4, end_of_text=(3, 2))
    assert found.length_BQ[0, 0] == 0 and math.isclose(float(found.score_BQ[0, 0]), math.log(0.4), rel_tol=1e-5)
    texts = [tuple(row[:length].tolist()) for row, length in zip(found.tokens_BQn[0], found.length_BQ[0], strict=True)]
    assert texts == [(), (1,), (0,)]
    keys = jax.random.split(jax.random.key(0), 64)
    start, limit = jnp.zeros(64, jnp.int32), jnp.full(64, 4, jnp.int32)
    options = {"sampling": Sampling(), "width": 4}
    sampled = sample_translations(step, jnp.zeros(64), start, limit, keys, end_of_text=(3, 2), **options)
    for row, length in zip(sampled.tokens_BQn[:, 0].tolist(), sampled.length_BQ[:, 0].tolist(), strict=True):
        assert set(row[:length]) <= {0, 1} and (length == 4 or row[length] in (2, 3))
