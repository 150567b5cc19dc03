"""Words from tokens, alignments from weights, and their error rate, on examples worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from transformer.interpret.alignment import (
    alignment_error_rate,
    alignment_matrix,
    argmax_alignment,
    best_head,
    head_error_rates,
    merge_subwords,
    parse_alignment,
    word_spans,
)


def words(pieces, **options):
    return ["".join(pieces[start:stop]) for start, stop in word_spans(pieces, **options)]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["The", " hou", "se", "."], ["The", " house."]),
        (["The", "Ġhou", "se", "Ċ", "A", "Ġcat"], ["The", "Ġhouse", "ĊA", "Ġcat"]),
        (["▁Das", "▁", "Haus", "chen"], ["▁Das", "▁Hauschen"]),
        (["a", "Ġ", "Ġ", "b", "c"], ["a", "ĠĠbc"]),
        (["hou", "##se", "cat", "##s"], ["hou##se", "cat##s"]),
        (["line\n", "next"], ["line\n", "next"]),
        (["", "a", "", " b"], ["a", " b"]),
        ([], []),
    ],
)
def test_words_start_at_spaces_or_where_no_piece_goes_on(pieces, expected):
    assert words(pieces) == expected


def test_special_tokens_are_words_of_their_own():
    pieces = ["<s>", "Das", "Ġist", "</s>", "</s>"]
    assert words(pieces, special={"<s>", "</s>"}) == ["<s>", "Das", "Ġist", "</s>", "</s>"]


def random_weights(*dims, seed=0):
    weights = np.random.default_rng(seed).random(dims)
    return weights / weights.sum(-1, keepdims=True)


def test_subwords_are_averaged_over_targets_and_summed_over_sources():
    weights = np.array([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])
    merged = merge_subwords(weights, [(0, 2), (2, 3)], [(0, 1), (1, 3)])
    np.testing.assert_allclose(merged, [[0.3, 0.7], [0.0, 1.0]])


def test_merged_rows_are_still_distributions():
    weights = random_weights(2, 3, 7, 9).astype(np.float32)
    merged = merge_subwords(weights, [(0, 1), (1, 5), (5, 7)], [(0, 4), (4, 5), (5, 9)])
    assert merged.shape == (2, 3, 3, 3)
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("span", [(2, 2), (0, 4), (-1, 2)])
def test_spans_that_are_no_words_are_refused(span):
    with pytest.raises(ValueError, match="source span"):
        merge_subwords(random_weights(2, 3), [(0, 2)], [span])


def test_the_matrix_is_the_mean_over_what_is_chosen():
    weights = random_weights(3, 2, 4, 5, 6)
    np.testing.assert_allclose(alignment_matrix(weights), weights.mean((0, 2)))
    chosen = alignment_matrix(weights, layers=[2], heads=[1, 3])
    np.testing.assert_allclose(chosen, (weights[2, :, 1] + weights[2, :, 3]) / 2)
    for options in ({"layers": [3]}, {"heads": []}):
        with pytest.raises(ValueError, match="expected some of"):
            alignment_matrix(weights, **options)


def test_the_greatest_weight_aligns_and_an_empty_row_does_not():
    weights = np.array([[0.2, 0.8], [0.0, 0.0], [0.5, 0.5]])
    assert argmax_alignment(weights) == {(1, 0), (0, 2)}
    assert argmax_alignment(weights, least=0.6) == {(1, 0)}
    assert argmax_alignment(weights[:, :0]) == set()


def test_pairs_are_read_as_sure_and_possible():
    assert parse_alignment("0-0 1?2 3-1\n") == ({(0, 0), (3, 1)}, {(0, 0), (1, 2), (3, 1)})
    with pytest.raises(ValueError, match="'1:2'"):
        parse_alignment("0-0 1:2")


def test_error_rate_of_a_worked_example():
    sure, possible = {(0, 0), (1, 1)}, {(0, 0), (1, 1), (2, 1)}
    # A = 3 pairs, of which 1 is sure and 2 are possible.
    predicted = {(0, 0), (2, 1), (2, 2)}
    assert alignment_error_rate([predicted], [sure], [possible]) == pytest.approx(1 - (1 + 2) / (3 + 2))
    # Sentences are counted together, not averaged; sure pairs count as possible unasked.
    both = alignment_error_rate([predicted, sure], [sure, sure], [possible, set()])
    assert both == pytest.approx(1 - (3 + 4) / (5 + 4))


def test_error_rate_is_zero_for_sure_and_possible_pairs_and_one_if_all_are_wrong():
    sure, possible = {(0, 0)}, {(1, 1), (2, 2)}
    assert alignment_error_rate([sure | {(1, 1)}], [sure], [possible]) == 0
    assert alignment_error_rate([{(5, 5)}], [sure], [possible]) == 1
    assert alignment_error_rate([{(0, 0), (3, 3)}], [sure]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no pair"):
        alignment_error_rate([set()], [set()])
    with pytest.raises(ValueError, match="zip"):
        alignment_error_rate([sure], [sure, sure])


def test_the_best_head_is_found():
    truth = [{(2, 0), (0, 1), (1, 2)}, {(1, 0), (0, 1)}]
    sentences = []
    for index, pairs in enumerate(truth):
        size = len(pairs)
        weights = random_weights(2, 3, size, size, seed=index) * 0.1
        for source, target in pairs:
            weights[1, 2, target, source] = 1
        sentences.append(weights)
    rates = head_error_rates(sentences, truth)
    assert rates.shape == (2, 3)
    assert rates[1, 2] == 0
    assert best_head(sentences, truth) == (1, 2, 0.0)
    with pytest.raises(ValueError, match="no sentence"):
        best_head([], [])
