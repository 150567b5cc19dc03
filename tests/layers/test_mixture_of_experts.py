"""A mixture of experts: what a token becomes, who finds room, and what neither padding nor neighbours can change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers.feed_forward import ACTIVATIONS
from transformer.layers.mixture_of_experts import MixtureOfExperts, without_limit

D, F, E = 8, 16, 4


def layer(**changes):
    normal = nnx.initializers.normal(0.5)
    options = {"num_experts": E, "experts_per_token": 2, "kernel_init": normal, "out_init": normal, "rngs": nnx.Rngs(0)}
    return MixtureOfExperts(D, F, **(options | changes))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_definition(moe, x_BTD, valid_BT):
    """Token by token, in NumPy and float64."""
    x = np.asarray(x_BTD, np.float64)
    up, down = np.asarray(moe.up_EDF[...], np.float64), np.asarray(moe.down_EFD[...], np.float64)
    gate = None if moe.gate_EDF is None else np.asarray(moe.gate_EDF[...], np.float64)
    logits = x @ np.asarray(moe.router.kernel[...], np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    k, out = moe.experts_per_token, np.zeros_like(x)

    def function(h):
        return np.asarray(ACTIVATIONS[moe.activation][0](jnp.asarray(h, jnp.float32)), np.float64)

    for b in range(len(x)):
        valid = np.asarray(valid_BT[b])
        room = valid.sum()
        if moe.capacity is not None:
            room = min(max(np.ceil(moe.capacity * valid.sum() * k / moe.num_experts), 1), valid.sum())
        taken = np.zeros(moe.num_experts, int)
        order = np.argsort(-shares[b], axis=-1, kind="stable")[:, :k]
        for choice in range(k):
            for t in np.flatnonzero(valid):
                e = order[t, choice]
                taken[e] += 1
                if taken[e] > room:
                    continue
                weight = shares[b, t, e] / (shares[b, t, order[t]].sum() if k > 1 else 1)
                hidden = x[b, t] @ up[e]
                hidden = function(hidden) if gate is None else hidden * function(x[b, t] @ gate[e])
                out[b, t] += weight * (hidden @ down[e])
    return out


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("experts_per_token", [1, 2, 3])
@pytest.mark.parametrize("capacity", [None, 0.5, 1.0, 1.25])
def test_each_token_by_its_experts(capacity, experts_per_token, activation):
    moe = layer(capacity=capacity, experts_per_token=experts_per_token, activation=activation)
    x, valid = draw(3, 10, D), jnp.arange(10) < jnp.array([10, 7, 0])[:, None]
    out, _ = jax.jit(lambda x, valid: moe(x, valid))(x, valid)
    np.testing.assert_allclose(out, by_definition(moe, x, valid), atol=1e-5)


@pytest.mark.parametrize("capacity", [None, 0.5, 1.25])
def test_padding_changes_nothing(capacity):
    """Neither what it is nor how much of it there is, at the end or in between."""
    moe = layer(capacity=capacity)
    x = draw(2, 6, D)
    alone, losses = moe(x)
    padded = jnp.concatenate([x, 9 * draw(2, 7, D, seed=1)], axis=1)
    valid = jnp.broadcast_to(jnp.arange(13) < 6, (2, 13))
    out, padded_losses = moe(padded, valid)
    np.testing.assert_allclose(out[:, :6], alone, atol=1e-6)
    assert not np.asarray(out[:, 6:]).any()
    np.testing.assert_allclose(padded_losses.balance, losses.balance, rtol=1e-5)
    np.testing.assert_allclose(padded_losses.z, losses.z, rtol=1e-5)
    mixed = jnp.arange(13) % 2 == 0
    between = jnp.zeros((2, 13, D)).at[:, mixed].set(padded[:, :7])
    whole, _ = moe(padded[:, :7])
    spread, _ = moe(between, jnp.broadcast_to(mixed, (2, 13)))
    np.testing.assert_allclose(spread[:, mixed], whole, atol=1e-6)


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_rows_do_not_meet(capacity):
    moe = layer(capacity=capacity)
    x = draw(4, 6, D)
    together, _ = moe(x)
    for row in range(4):
        np.testing.assert_allclose(moe(x[row : row + 1])[0][0], together[row], atol=1e-6)


def test_without_a_limit_no_token_depends_on_another():
    moe = layer(capacity=0.25)
    x = draw(1, 8, D)
    limited, _ = moe(x)
    free = without_limit(moe)
    whole, _ = free(x)
    assert np.abs(np.asarray(limited - whole)).max() > 1e-2
    for t in range(8):
        np.testing.assert_allclose(free(x[:, t : t + 1])[0], whole[:, t : t + 1], atol=1e-6)
