"""Filters keep what they say, and draws follow the distribution that is left."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.errors import ConfigError
from transformer.generation.sampling import Sampling, filter_logits, next_token, penalize_repetition

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5]]))


def kept(**options):
    return np.isfinite(filter_logits(LOGITS, Sampling(**options))).tolist()


@pytest.mark.parametrize(
    ("options", "first_row"),
    [
        ({}, [True, True, True, True]),
        ({"top_k": 2}, [True, True, False, False]),
        ({"top_k": 9}, [True, True, True, True]),
        ({"top_p": 0.7}, [True, True, False, False]),
        ({"top_p": 0.76}, [True, True, True, False]),
        ({"top_p": 1e-6}, [True, False, False, False]),
        ({"min_p": 0.4}, [True, True, False, False]),
        ({"min_p": 1.0}, [True, False, False, False]),
        ({"top_k": 3, "top_p": 0.8}, [True, True, False, False]),
    ],
)
def test_filters(options, first_row):
    assert kept(**options) == [first_row, first_row[::-1]]


def test_temperature_sharpens():
    cold = jax.nn.softmax(filter_logits(LOGITS, Sampling(temperature=0.5)), axis=-1)
    squared = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(cold[0], squared / squared.sum(), rtol=1e-5)


def test_greedy_takes_the_likeliest():
    keys = jax.random.split(jax.random.key(0), 2)
    assert next_token(LOGITS, Sampling(temperature=0.0), keys, None).tolist() == [0, 3]


def test_draws_follow_the_distribution():
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = next_token(jnp.broadcast_to(LOGITS[:1], (4000, 4)), Sampling(top_k=3), keys, None)
    counts = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(counts, np.array([0.5, 0.25, 0.15, 0]) / 0.9, atol=0.03)


def test_repetition_penalty_lowers_positive_and_negative_scores():
    logits = jnp.array([[2.0, -2.0, 1.0]])
    got = penalize_repetition(logits, jnp.array([[True, True, False]]), 2.0)
    np.testing.assert_allclose(got, [[1.0, -4.0, 1.0]])


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 2.0}, {"repetition_penalty": 0.0}]
)
def test_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampling(**options)
