"""Interventions on a model whose parts are known: its weights were set by hand."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.interpret.by_hand import D, V, induction_model
from transformer.errors import UserError
from transformer.interpret.interventions import (
    Subject,
    ablate,
    attribute,
    head_importance,
    head_statistics,
    induction_scores,
    logit_lens,
    next_token_inputs,
    patch,
)

pytestmark = pytest.mark.usefixtures("one_device")
A, B, C, X, E = 5, 9, 2, 17, 30
# The last token of each text stood at position 1; what followed it there comes next.
CLEAN, CORRUPTED = [0, A, B, C, E, A], [0, A, X, C, E, A]
ANSWER_LOGIT = np.sqrt(D / 4)
"""The final stream holds four ones: token, token before, position and prediction."""


@functools.cache
def subject():
    return Subject(induction_model())


def test_it_copies():
    scores, _ = subject().scores(next_token_inputs([CLEAN]))
    assert scores[0].argmax() == B and scores[0, B] == pytest.approx(ANSWER_LOGIT, rel=1e-4)
    assert np.abs(np.delete(scores[0], B)).max() < 1e-3


@pytest.mark.parametrize("head", [(0, 0), (1, 0)])
def test_without_a_head_of_the_circuit_nothing_is_copied(head):
    found = ablate(subject(), next_token_inputs([CLEAN]), [head])
    change = found.change_BC[0]
    if head == (1, 0):
        # No one is left in the prediction, so the logit falls by all of it.
        assert change[B] == pytest.approx(-ANSWER_LOGIT, rel=1e-4) and np.abs(np.delete(change, B)).max() < 1e-3
    else:
        # Without the tokens before, the second head looks everywhere alike: at one token in six.
        assert found.ablated_scores_BC[0, B] < 0.3 * ANSWER_LOGIT
    assert found.heads == (("attention", *head),)
    assert found.loss_change is not None


def test_heads_that_write_nothing_change_nothing():
    for how in ("zero", "mean"):
        assert np.abs(ablate(subject(), next_token_inputs([CLEAN]), [(0, 1), (1, 1)], how).change_BC).max() < 1e-5


def test_a_mean_is_over_all_tokens_of_all_texts():
    texts = next_token_inputs([CLEAN, [0, A, B, A]])
    heads_BTNH = np.asarray(subject().kept(texts, ["layers.1.attention.heads"])["layers.1.attention.heads"])
    valid = np.asarray(texts.segments_BT) != 0
    mean_H = heads_BTNH[:, :, 0][valid].mean(0)
    found = ablate(subject(), texts, [(1, 0)], "mean")
    # The head writes its features, scaled, into the prediction, next to three ones.
    written_V = mean_H
    expected = written_V[B] * np.sqrt(D / (3 + (written_V**2).sum()))
    np.testing.assert_allclose(found.ablated_scores_BC[:, B], expected, rtol=1e-4)


def test_importance_names_the_circuit():
    found = head_importance(subject(), next_token_inputs([CLEAN]), answer=B, instead=X)
    table = found.tables["attention"]
    assert table.shape == (2, 2)
    assert table[1, 0] == pytest.approx(ANSWER_LOGIT, rel=1e-3)
    assert [head for head, _ in found.ranked()[:2]] == [("attention", 1, 0), ("attention", 0, 0)]
    assert np.abs(table[:, 1]).max() < 1e-3
    # By the loss, a single ablation of the same head says the same.
    rise = head_importance(subject(), next_token_inputs([CLEAN])).tables["attention"][1, 0]
    assert rise == pytest.approx(ablate(subject(), next_token_inputs([CLEAN]), [(1, 0)]).loss_change, abs=1e-4)


def test_patching_finds_the_position_that_differs_and_the_head_that_reads_it():
    found = patch(subject(), next_token_inputs([CLEAN]), next_token_inputs([CORRUPTED]))
    assert (found.answer, found.instead) == (B, X)
    assert found.clean == pytest.approx(-found.corrupted, rel=1e-4)
    expected = np.zeros((3, 6))
    # The word that differs stands at position 2 until the second layer takes it to the last one.
    expected[0, 2] = expected[1, 2] = expected[2, 5] = 1
    np.testing.assert_allclose(found.stream[""], expected, atol=1e-3)
    np.testing.assert_allclose(found.heads["attention"], [[0, 0], [1, 0]], atol=1e-3)
    np.testing.assert_allclose(found.outputs["attention.out"], [[0] * 6, [0, 0, 0, 0, 0, 1]], atol=1e-3)
    np.testing.assert_allclose(found.outputs["mlp.out"], np.zeros((2, 6)), atol=1e-5)


def test_attribution_gives_all_to_the_head_that_writes():
    found = attribute(subject(), next_token_inputs([CLEAN]), answer=B, instead=X)
    np.testing.assert_allclose(found.heads["attention"], [[0, 0], [ANSWER_LOGIT, 0]], atol=1e-3)
    assert found.total == pytest.approx(found.difference, abs=1e-5)
    assert found.embedding == pytest.approx(0, abs=1e-4) and np.abs(found.mlps).max() == 0 == found.biases


def test_the_lens_sees_the_answer_after_the_second_layer():
    found = logit_lens(subject(), next_token_inputs([CLEAN]), top=3, answer=B)
    last = found.target_probability_LT[:, -1]
    assert found.tokens_LTK.shape == (3, 6, 3) and found.tokens_LTK[2, -1, 0] == B
    np.testing.assert_allclose(last[:2], 1 / V, rtol=1e-4)
    odds = np.exp(ANSWER_LOGIT)
    assert last[2] == pytest.approx(odds / (odds + V - 1), rel=1e-3)
    assert found.target_rank_LT[2, -1] == 1
    # At other positions the target is the next token of the text.
    np.testing.assert_array_equal(found.targets_T[:-1], CLEAN[1:])


def test_statistics_and_induction_scores_name_the_heads():
    texts = next_token_inputs([CLEAN, [0, 7, 8]])
    found = head_statistics(subject(), texts)["attention"]
    np.testing.assert_allclose(found.previous[0], [1, _uniform_previous((6, 3))], atol=1e-3)
    assert found.entropy[0, 0] == pytest.approx(0, abs=1e-3)
    # All queries but the first of each text look one token back.
    assert found.distance[0, 0] == pytest.approx(7 / 9, abs=1e-3)
    np.testing.assert_allclose(found.first[0, 0], 2 / 7, atol=1e-3)
    scores = induction_scores(subject(), length=8)
    assert scores[1, 0] > 0.6 > 0.3 > np.delete(scores.ravel(), 2).max()


def _uniform_previous(lengths):
    """The mean weight of the token before, if all tokens up to the query weigh the same."""
    shares = [1 / (query + 1) for length in lengths for query in range(1, length)]
    return np.mean(shares)


def test_memory_stays_bounded_by_fewer_rows_and_layers():
    texts = next_token_inputs([CLEAN, [0, 7, 8], [0, 1, 2, 3]])
    whole = head_statistics(subject(), texts)["attention"]
    # One row of one layer needs 4 arrays of 2 x 6 x 6 numbers.
    few = head_statistics(subject(), texts, max_bytes=4 * 4 * 2 * 36)["attention"]
    for name in ("entropy", "previous", "first", "distance"):
        np.testing.assert_allclose(getattr(few, name), getattr(whole, name), atol=1e-5)
    with pytest.raises(UserError, match=r"texts: the weights of one layer on 6 tokens need 1\.1 KiB, above the limit"):
        head_statistics(subject(), texts, max_bytes=100)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda inputs: ablate(subject(), inputs, [(2, 0)]), r"heads: got layer 2; allowed: 0 to 1"),
        (lambda inputs: ablate(subject(), inputs, [(1, 2)]), r"heads: got head 2 of layer 1; allowed: 0 to 1"),
        (lambda inputs: ablate(subject(), inputs, [(1,)]), r"heads: got \(1,\); allowed: \(layer, head\)"),
        (lambda inputs: ablate(subject(), inputs, []), r"heads: got none"),
        (lambda inputs: ablate(subject(), inputs, [(0, 0)], "noise"), r"how: got 'noise'; allowed: 'zero', 'mean'"),
        (lambda inputs: patch(subject(), inputs, next_token_inputs([[0, A]])), "corrupted: it has 2 tokens and the clean text 6"),
        (lambda inputs: patch(subject(), inputs, inputs), "corrupted: it gives the two answers the same logit difference"),
        (lambda inputs: attribute(subject(), inputs, answer=3, instead=3), "instead: it is the answer itself"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_in_one_line(act, message):
    with pytest.raises(UserError, match=message) as refused:
        act(next_token_inputs([CLEAN]))
    assert "\n" not in str(refused.value)
