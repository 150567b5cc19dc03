"""One query's attention against the mechanisms of many, for every kind of alignment."""

from __future__ import annotations

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.alignment.kinds import KINDS
from tests.changed import built
from transformer.alignment.additive import additive_attention
from transformer.alignment.registry import ALIGNMENTS, AlignmentConfig, make_alignment
from transformer.alignment.scored import AdditiveConfig, LocalConfig, MultiplicativeConfig
from transformer.attention.linear.fast_weights import fast_weights
from transformer.attention.linear.linear_attention import linear_attention
from transformer.attention.spec.mask import AttentionMask
from transformer.errors import ConfigError

B, D, S, E, A = 3, 6, 8, 6, 4
OPTIONS = {"kernel_init": nnx.initializers.normal(0.5)}


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


VALID_S = jnp.arange(S) < jnp.array([[8], [5], [2]])
STATES, QUERY = normal(B, S, E, seed=1), normal(B, D, seed=2)


@functools.cache
def attention(kind):
    return make_alignment(KINDS[kind], D, E, dtype=jnp.float32, rngs=nnx.Rngs(0), **OPTIONS)


def attend(kind, *, states=STATES, step=1, **options):
    module = attention(kind)
    source = module.prepare(states, VALID_S, states[:, 0])
    return module(QUERY, source, jnp.full(B, step, jnp.int32), return_weights=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_states_have_no_influence(kind):
    changed = jnp.where(VALID_S[..., None], STATES, 7.0)
    before, after = attend(kind), attend(kind, states=changed)
    np.testing.assert_array_equal(before[0], after[0])
    assert before[0].shape == (B, E)
    if before[1] is not None:
        np.testing.assert_array_equal(before[1], after[1])
        assert not np.asarray(before[1])[~np.asarray(VALID_S)].any()


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"none", "delta", "local_p", "local_m"}))
def test_weights_are_distributions_that_give_the_context(kind):
    context, weights = attend(kind)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(jnp.einsum("BS,BSE->BE", weights, STATES), context, atol=1e-5)


def test_hard_attention_takes_the_likeliest_state_or_draws_one():
    _, weights = attend("hard")
    assert set(np.unique(weights)) == {0, 1}
    module = attention("hard")
    soft, _ = additive_attention(
        module.query(QUERY[:, None]), module.key(STATES), STATES, module.vector.kernel[...],
        AttentionMask.padding(VALID_S),
    )  # fmt: skip
    draw = jax.vmap(lambda key: attend("hard", key=key)[1])(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(draw.max(-1), 1, atol=1e-6)
    np.testing.assert_allclose(jnp.einsum("BS,BSE->BE", draw.mean(0), STATES), soft[:, 0], atol=0.12)


def test_local_m_sees_a_window_about_the_step():
    _, weights = attend("local_m", step=3)
    seen = (np.abs(np.arange(S) - 3) <= 2) & np.asarray(VALID_S)
    np.testing.assert_array_equal(np.asarray(weights > 0), seen)
    np.testing.assert_allclose(weights[:2].sum(-1), 1, atol=1e-6)
    # A step far behind the source sees none of it.
    assert not np.asarray(attend("local_m", step=30)[0]).any()


def test_local_p_fades_about_a_position_of_the_rows_own_length():
    _, weights = attend("local_p")
    assert (np.asarray(weights.sum(-1)) < 1).all()
    assert (np.asarray(weights.sum(-1)) > 0).all()


def test_linear_and_delta_read_what_the_mechanisms_of_many_queries_read():
    linear, delta = attention("linear"), attention("delta")
    queries, keys = linear.query(QUERY)[:, None, None], linear.key(STATES)[:, :, None]
    expected, _ = linear_attention(queries, keys, STATES[:, :, None], causal=False, valid_BS=VALID_S)
    np.testing.assert_allclose(attend("linear")[0], expected[:, 0, 0], atol=1e-5)
    # The query stands behind the last state, where it reads and writes nothing.
    strength = jax.nn.sigmoid(delta.strength(STATES))
    joined = jnp.pad(delta.key(STATES), ((0, 0), (0, 1), (0, 0)))[:, :, None]
    queries = joined.at[:, -1, 0].set(delta.query(QUERY))
    out, _ = fast_weights(
        queries, joined, jnp.pad(STATES, ((0, 0), (0, 1), (0, 0)))[:, :, None], jnp.pad(strength, ((0, 0), (0, 1), (0, 0))),
        rule="delta", feature_map=delta.features, chunk=1, segments_BT=jnp.pad(VALID_S.astype(jnp.int32), ((0, 0), (0, 1))),
    )  # fmt: skip
    np.testing.assert_allclose(attend("delta")[0], out[:, -1, 0], atol=1e-5)


@pytest.mark.parametrize("kind", ["additive, sparsemax", "general, entmax15"])
def test_sparse_weights_are_zero_for_some_states(kind):
    sharp = attend(kind, states=8 * STATES)[1]
    assert ((np.asarray(sharp) == 0) & np.asarray(VALID_S)).any()


def test_every_kind_has_a_module_and_a_test():
    assert set(typing.get_args(AlignmentConfig)) == set(ALIGNMENTS)
    named = [one for config in ALIGNMENTS for one in typing.get_args(typing.get_type_hints(config)["kind"])]
    assert set(named) == {config.kind for config in KINDS.values()}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="as wide as hidden_dim"):
        make_alignment(MultiplicativeConfig(kind="dot"), D, E + 1, rngs=nnx.Rngs(0), **OPTIONS)
    for config_type, fields, wrong in (
        (AdditiveConfig, {"dim": 0}, "dim"),
        (AdditiveConfig, {"kind": "addtive"}, "kind"),
        (AdditiveConfig, {"normalizer": "softmin"}, "normalizer"),
        (LocalConfig, {"kind": "local_m", "dim": 4}, "dim"),
        (LocalConfig, {"window": 0}, "window"),
    ):
        with pytest.raises(ConfigError) as caught:
            built(config_type, **fields)
        assert caught.value.field == wrong
