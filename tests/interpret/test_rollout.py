"""Rollout, entropy and distance on weights whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from transformer.interpret.rollout import entropy, mean_distance, rollout


def random_weights(L=3, N=2, T=5, causal=True):
    weights = np.random.default_rng(0).random((L, N, T, T)).astype(np.float32)
    weights = np.tril(weights) if causal else weights
    return weights / weights.sum(-1, keepdims=True)


def test_rollout_is_the_product_of_mixed_layers():
    weights = random_weights()
    first, second, third = 0.5 * weights.mean(1) + 0.5 * np.eye(5)
    np.testing.assert_allclose(rollout(weights), [first, second @ first, third @ second @ first], atol=1e-6)


def test_rollout_rows_are_distributions_over_the_input():
    result = rollout(random_weights(causal=False))
    assert result.shape == (3, 5, 5)
    np.testing.assert_allclose(result.sum(-1), 1, atol=1e-6)
    assert result.dtype == np.float32


def test_rollout_of_attention_to_itself_is_the_identity():
    np.testing.assert_array_equal(rollout(np.tile(np.eye(4, dtype=np.float32), (3, 2, 1, 1)))[-1], np.eye(4))


@pytest.mark.parametrize("residual", [0.0, 1.0])
def test_the_residual_share_has_two_ends(residual):
    weights = random_weights()
    ends = {0.0: weights[2].mean(0) @ weights[1].mean(0) @ weights[0].mean(0), 1.0: np.eye(5)}
    np.testing.assert_allclose(rollout(weights, residual)[-1], ends[residual], atol=1e-6)


def test_a_query_that_sees_nothing_keeps_itself():
    weights = random_weights()
    weights[:, :, 2] = 0
    np.testing.assert_allclose(rollout(weights)[:, 2], np.tile(np.eye(5)[2], (3, 1)), atol=1e-6)


def test_entropy_in_bits():
    even = np.full((2, 3, 8, 8), 1 / 8, np.float32)
    np.testing.assert_allclose(entropy(even), np.full((2, 3), 3), atol=1e-6)
    np.testing.assert_array_equal(entropy(np.eye(8, dtype=np.float32)[None]), [0])
    half = np.array([[0.5, 0.25, 0.25], [1, 0, 0]], np.float32)
    assert entropy(half) == pytest.approx(0.75)


def test_mean_distance_in_tokens():
    to_the_first = np.zeros((1, 4, 4), np.float32)
    to_the_first[..., 0] = 1
    np.testing.assert_allclose(mean_distance(to_the_first), [(0 + 1 + 2 + 3) / 4])
    np.testing.assert_array_equal(mean_distance(np.eye(4, dtype=np.float32)[None]), [0])
    previous = np.eye(4, k=-1, dtype=np.float32)
    # The first query sees nothing and does not count.
    assert mean_distance(previous) == pytest.approx(1)


def test_nothing_seen_at_all_is_zero():
    assert entropy(np.zeros((1, 2, 3), np.float32)) == 0
    assert mean_distance(np.zeros((1, 3, 3), np.float32)) == 0
