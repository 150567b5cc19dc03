"""Corruption: the rates, lengths and shares are those of the papers, and nothing of the text is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.examples.corrupt import (
    UL2_DENOISERS,
    choose_runs,
    cut_spans,
    lengths_filling,
    ngram_lengths,
    number_runs,
    random_partition,
    replace_tokens,
    span_lengths,
    span_mask,
)
from train.data.examples.draws import Draws, draw_key

END = 0
SENTINELS = 1000 + np.arange(400)


def restored(source: np.ndarray, target: np.ndarray) -> list[int]:
    """The text that a source and its target were made from: each sentinel replaced by what follows it in the target."""
    assert source[-1] == target[-1] == END
    spans: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token >= 1000:
            spans[last := token] = []
        else:
            spans[last].append(token)
    text: list[int] = []
    for token in source[:-1].tolist():
        text += spans.pop(token) if token >= 1000 else [token]
    assert not spans
    return text


@pytest.mark.parametrize(
    ("density", "mean"), [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 64.0), (0.15, 64.0), (0.5, 1.0)]
)
def test_sources_of_every_length_are_filled_and_come_back(density: float, mean: float) -> None:
    random = np.random.default_rng(0)
    for source_length in [*range(3, 70), 128, 511]:
        lengths = lengths_filling(source_length, density, mean)
        assert lengths.source == source_length
        assert span_lengths(lengths.tokens + 1, density, mean).source > source_length
        tokens = random.integers(1, 1000, (3, lengths.tokens))
        mask = span_mask(lengths, random.random((3, lengths.tokens - 2)))
        assert np.all(mask.sum(axis=1) == lengths.noise)
        source, target = cut_spans(tokens, mask, SENTINELS[: lengths.spans], END)
        assert source.shape == (3, source_length)
        assert target.shape == (3, lengths.target)
        for row in range(3):
            assert restored(source[row], target[row]) == tokens[row].tolist()
            np.testing.assert_array_equal(source[row][source[row] >= 1000], SENTINELS[: lengths.spans])
            np.testing.assert_array_equal(target[row][target[row] >= 1000], SENTINELS[: lengths.spans])


def test_the_lengths_are_those_of_t5() -> None:
    """512 tokens of source: 568 raw tokens and 114 of target, as the code released with T5 computes."""
    lengths = lengths_filling(512, 0.15, 3.0)
    assert (lengths.tokens, lengths.source, lengths.target, lengths.spans) == (568, 512, 114, 28)


def test_spans_have_the_mean_length_and_lie_anywhere() -> None:
    lengths = span_lengths(100, 0.15, 3.0)
    mask = span_mask(lengths, np.random.default_rng(1).random((20_000, 98)))
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    assert lengths.spans == 5
    assert np.all(starts.sum(axis=1) == 5)
    assert mask.mean() == pytest.approx(0.15)
    assert not mask[:, 0].any()
    middle = mask[:, 20:80].mean(axis=0)
    assert np.all(np.abs(middle - middle.mean()) < 0.02)


def test_partitions_are_all_equally_likely() -> None:
    parts = random_partition(np.random.default_rng(2).random((60_000, 5)), 3)
    assert np.all(parts.sum(axis=1) == 6) and parts.min() == 1
    kinds, counts = np.unique(parts, axis=0, return_counts=True)
    assert len(kinds) == 10  # 5 gaps, 2 of them cut
    np.testing.assert_allclose(counts, 6000, rtol=0.06)


def test_a_continuation_is_one_span_at_the_end() -> None:
    lengths = UL2_DENOISERS[2].lengths(40)
    assert (lengths.noise, lengths.spans) == (10, 1)
    mask = np.arange(40)[None] >= 30
    source, target = cut_spans(np.arange(1, 41)[None], mask, SENTINELS[:1], END)
    assert source[0].tolist() == [*range(1, 31), 1000, END]
    assert target[0].tolist() == [1000, *range(31, 41), END]


def chosen_of(run: np.ndarray, rate: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return choose_runs(run, rate, random.random(run.shape), random.random(len(run)))


def runs_of(maskable: np.ndarray, ngram: int = 1, joined: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    lengths = ngram_lengths(np.random.default_rng(seed).random(maskable.shape), ngram)
    return number_runs(maskable, np.zeros_like(maskable) if joined is None else joined, lengths)


@pytest.mark.parametrize("ngram", [1, 3, 10])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_the_mask_rate_is_exact_on_average(ngram: int, rate: float) -> None:
    random = np.random.default_rng(3)
    maskable = random.random((20_000, 50)) < 0.9
    chosen = chosen_of(runs_of(maskable, ngram), rate)
    assert not chosen[~maskable].any()
    assert chosen.sum() / maskable.sum() == pytest.approx(rate, rel=0.01)
    if ngram == 1:  # the number in a row differs from the rate's by less than one token
        assert np.all(np.abs(chosen.sum(axis=1) - rate * maskable.sum(axis=1)) < 1)


def test_ngrams_have_the_lengths_of_spanbert() -> None:
    lengths = ngram_lengths(np.random.default_rng(4).random(100_000), 10)
    assert (lengths.min(), lengths.max()) == (1, 10)
    assert lengths.mean() == pytest.approx(3.8, abs=0.03)
    run = runs_of(np.ones((200, 400), bool), 10)
    sizes = np.concatenate([np.bincount(row)[:-1] for row in run])  # the last is cut by the end of the row
    assert sizes.mean() == pytest.approx(3.8, abs=0.1)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), ngram=st.integers(1, 4))
def test_words_are_chosen_whole(seed: int, ngram: int) -> None:
    random = np.random.default_rng(seed)
    maskable, joined = random.random((8, 30)) < 0.9, random.random((8, 30)) < 0.5
    joined[:, 0] = False
    chosen = chosen_of(runs_of(maskable, ngram, joined, seed), 0.3, seed)
    inside = joined[:, 1:] & maskable[:, 1:] & maskable[:, :-1]
    np.testing.assert_array_equal(chosen[:, 1:][inside], chosen[:, :-1][inside])


def test_of_the_chosen_80_are_masked_10_random_10_left() -> None:
    random = np.random.default_rng(5)
    tokens = np.full((1000, 100), 7)
    chosen = random.random(tokens.shape) < 0.15
    ordinary = np.arange(10, 30)
    seen = replace_tokens(
        tokens, chosen, random.random(tokens.shape), random.random(tokens.shape),
        mask=1, ordinary_V=ordinary, mask_share=0.8, random_share=0.1,
    )  # fmt: skip
    assert np.all(seen[~chosen] == 7)
    assert np.mean(seen[chosen] == 1) == pytest.approx(0.8, abs=0.01)
    assert np.mean(seen[chosen] == 7) == pytest.approx(0.1, abs=0.01)
    random_ones = seen[chosen & (seen != 1) & (seen != 7)]
    assert set(random_ones.tolist()) == set(ordinary.tolist())


def test_draws_belong_to_seed_split_and_number() -> None:
    numbers = np.array([5, 6, 1 << 40])
    key = draw_key(3, "train")
    drawn = Draws(key, numbers).uniform(4)
    again = Draws(key, numbers)
    np.testing.assert_array_equal(np.hstack([again.uniform(1), again.uniform(3)]), drawn)
    np.testing.assert_array_equal(Draws(key, numbers).rows(np.array([2, 0])).uniform(4), drawn[[2, 0]])
    keys = (draw_key(4, "train"), draw_key(3, "validation"))
    others = [Draws(keys[0], numbers), Draws(keys[1], numbers), Draws(key, numbers + 1)]
    assert len({drawn.tobytes(), *(other.uniform(4).tobytes() for other in others)}) == 4
