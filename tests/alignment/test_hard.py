"""Hard attention: one-hot weights, straight-through gradients, and REINFORCE against an enumeration."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.alignment.hard import (
    argmax_weights,
    gumbel_weights,
    reinforce_loss,
    sample_weights,
    temperature_at,
)
from transformer.attention.common import softmax
from transformer.randomness import gumbel

B, T, S = 2, 3, 4
ALLOWED = np.array([[[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], [[1, 1, 1, 1]] * 3], bool)


def scores(dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, S)), dtype)


def test_argmax_takes_the_greatest_score_that_is_allowed():
    weights = np.asarray(argmax_weights(scores(), jnp.asarray(ALLOWED)))
    expected = np.zeros((B, T, S))
    for b, t in np.ndindex(B, T):
        seen = [s for s in range(S) if ALLOWED[b, t, s]]
        if seen:
            expected[b, t, max(seen, key=lambda s: scores()[b, t, s])] = 1
    np.testing.assert_array_equal(weights, expected)
    assert not np.asarray(jax.grad(lambda x: jnp.sum(argmax_weights(x) ** 2))(scores())).any()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_straight_through_is_hard_forwards_and_the_softmax_backwards(temperature):
    key, allowed = jax.random.key(1), jnp.asarray(ALLOWED)
    noise = gumbel(key, scores())
    direction = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, S)), jnp.float32)

    def hard(x):
        return jnp.sum(direction * gumbel_weights(x, allowed, key=key, temperature=temperature))

    def soft(x):
        return jnp.sum(direction * softmax((x + noise) / temperature, allowed))

    np.testing.assert_allclose(jax.jit(jax.grad(hard))(scores()), jax.jit(jax.grad(soft))(scores()), atol=1e-6)
    weights = np.asarray(gumbel_weights(scores(), allowed, key=key, temperature=temperature))
    assert set(np.unique(weights)) == {0, 1}
    np.testing.assert_array_equal(weights.sum(-1), ALLOWED.any(-1))
    assert not weights[~ALLOWED].any()


@pytest.mark.parametrize("draw", [gumbel_weights, lambda *x, key: sample_weights(*x, key=key).weights_BTS])
def test_draws_follow_the_softmax(draw):
    keys = jax.random.split(jax.random.key(0), 4000)
    means = jax.jit(jax.vmap(lambda key: draw(scores(), jnp.asarray(ALLOWED), key=key)))(keys).mean(0)
    np.testing.assert_allclose(means, softmax(scores(), jnp.asarray(ALLOWED)), atol=0.04)


def test_a_sample_carries_its_probability_and_the_entropy():
    sample = sample_weights(scores(), jnp.asarray(ALLOWED), key=jax.random.key(2))
    p = np.asarray(softmax(scores(), jnp.asarray(ALLOWED)), np.float64)
    chosen = (p * np.asarray(sample.weights_BTS)).sum(-1)
    np.testing.assert_allclose(jnp.exp(sample.log_prob_BT), np.where(ALLOWED.any(-1), chosen, 1), rtol=1e-5)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
    np.testing.assert_allclose(sample.entropy_BT, entropy, atol=1e-6)
    gradient = jax.jit(
        jax.grad(lambda x: jnp.sum(sample_weights(x, jnp.asarray(ALLOWED), key=jax.random.key(2)).entropy_BT))
    )
    assert np.isfinite(gradient(scores())).all() and not np.asarray(gradient(scores()))[~ALLOWED].any()


REWARDS = jnp.array([-2.0, -0.1, -1.0, -3.0])


def expected_loss(x, theta, entropy_weight=0.0):
    """-(E_s[log p(y|s)] + λ H), over all keys; θ scales the rewards, as a predictor's parameter would."""
    p = jax.nn.softmax(x)
    return -(p @ (theta * REWARDS) - entropy_weight * jnp.sum(p * jnp.log(p)))


@pytest.mark.parametrize(("baseline", "entropy_weight"), [(0.0, 0.0), (-1.5, 0.3)])
def test_reinforce_is_right_on_average(baseline, entropy_weight):
    x, theta = jnp.array([0.2, -0.5, 0.8, 0.0]), jnp.float32(1.2)

    def surrogate(x, theta, key):
        sample = sample_weights(x[None, None], key=key)
        likelihood = theta * (sample.weights_BTS[:, 0] @ REWARDS)
        return reinforce_loss(likelihood, sample, jnp.float32(baseline), entropy_weight=entropy_weight)[0]

    keys = jax.random.split(jax.random.key(0), 40_000)
    gradients = jax.jit(jax.vmap(jax.grad(surrogate, (0, 1)), (None, None, 0)))(x, theta, keys)
    for got, wanted in zip(gradients, jax.grad(expected_loss, (0, 1))(x, theta, entropy_weight), strict=True):
        error = np.asarray(got.std(0)) / 200
        assert (np.abs(got.mean(0) - wanted) < 4.5 * error + 1e-4).all()


def test_a_baseline_lessens_the_variance_and_follows_the_rewards():
    x = jnp.zeros((1, 1, S))

    def gradient(key, baseline):
        def surrogate(x):
            sample = sample_weights(x, key=key)
            return reinforce_loss(sample.weights_BTS[:, 0] @ (REWARDS - 5), sample, baseline)[0]

        return jax.grad(surrogate)(x)

    keys = jax.random.split(jax.random.key(0), 500)
    many = jax.jit(jax.vmap(gradient, (0, None)))
    variance = [many(keys, jnp.float32(b)).var(0).sum() for b in (0.0, -6.5)]
    assert variance[1] < variance[0] / 5
    sample = sample_weights(jnp.zeros((2, 1, S)), key=jax.random.key(0))
    baseline = jnp.float32(0)
    for expected in (-0.3, -0.57):
        baseline = reinforce_loss(jnp.array([-2.0, -4.0]), sample, baseline)[1]
        np.testing.assert_allclose(baseline, expected, rtol=1e-5)


def test_temperature_falls_from_soft_to_hard():
    at = [float(temperature_at(step, start=2.0, end=0.02, num_steps=10)) for step in (0, 5, 10, 99)]
    np.testing.assert_allclose(at, [2, 0.2, 0.02, 0.02], rtol=1e-5)
    gap = [
        float(jnp.abs(softmax(scores() / temperature) - argmax_weights(scores())).max())
        for temperature in (*at[:2], 1e-3)
    ]
    assert gap[0] > gap[1] > gap[2] and gap[2] < 1e-6


def test_temperature_may_be_traced():
    run = jax.jit(lambda temperature: gumbel_weights(scores(), key=jax.random.key(0), temperature=temperature))
    np.testing.assert_array_equal(
        run(jnp.float32(0.7)), gumbel_weights(scores(), key=jax.random.key(0), temperature=0.7)
    )


def test_inputs_that_do_not_fit():
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature=.*; expected a positive number"):
            gumbel_weights(scores(), key=jax.random.key(0), temperature=temperature)
    with pytest.raises(ValueError, match="num_steps=0; expected 1 or more"):
        temperature_at(0, start=1.0, end=0.1, num_steps=0)
    sample = sample_weights(scores(), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"log_prob is float32 \(2, 3\); expected floating \[B=1, T\]"):
        inspect.unwrap(reinforce_loss)(jnp.zeros(1), sample, jnp.float32(0))
