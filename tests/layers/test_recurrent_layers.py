"""Cells against NumPy, scans against loops, and one query's attention against the mechanisms of many."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.attention.additive import additive_attention
from transformer.attention.fast_weights import fast_weights
from transformer.attention.linear_attention import linear_attention
from transformer.attention.mask import AttentionMask
from transformer.layers.recurrent import CELLS, KINDS, SourceAttention, gru_step, lstm_step, scan_cell

B, T, I, D, S, E, A = 3, 7, 5, 6, 8, 6, 4  # noqa: E741
OPTIONS = {"kernel_init": nnx.initializers.normal(0.5)}
VALID = jnp.arange(T) < jnp.array([[7], [4], [1]])


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make(name, **options):
    return CELLS[name](I, D, rngs=nnx.Rngs(0), **OPTIONS, **options)


def test_a_gru_step_is_the_papers():
    rng = np.random.default_rng(0)
    x, h = rng.normal(size=(B, I)), rng.normal(size=(B, D))
    W, W_r, W_z = (rng.normal(size=(I, D)) for _ in range(3))
    U, U_r, U_z = (rng.normal(size=(D, D)) for _ in range(3))
    r, z = sigmoid(x @ W_r + h @ U_r), sigmoid(x @ W_z + h @ U_z)
    expected = (1 - z) * h + z * np.tanh(x @ W + (r * h) @ U)
    inputs = np.concatenate([x @ W_r, x @ W_z, x @ W], axis=1)
    arrays = (jnp.asarray(a, jnp.float32) for a in (inputs, h, np.concatenate([U_r, U_z], axis=1), U))
    np.testing.assert_allclose(gru_step(*arrays), expected, rtol=1e-5, atol=1e-5)


def test_an_lstm_step_is_the_papers():
    rng = np.random.default_rng(0)
    x, h, c = rng.normal(size=(B, I)), rng.normal(size=(B, D)), rng.normal(size=(B, D))
    W, U = rng.normal(size=(4, I, D)), rng.normal(size=(4, D, D))
    i, f, o = (sigmoid(x @ W[k] + h @ U[k]) for k in range(3))
    memory = f * c + i * np.tanh(x @ W[3] + h @ U[3])
    inputs, kernel = np.concatenate(list(x @ W), axis=1), np.concatenate(list(U), axis=1)
    got = lstm_step(*(jnp.asarray(a, jnp.float32) for a in (inputs, h, c, kernel)))
    np.testing.assert_allclose(got[0], o * np.tanh(memory), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], memory, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_a_loop_that_passes_over_padding(name, reverse):
    cell, x = make(name), normal(B, T, I)
    out, final = scan_cell(cell, x, cell.empty_state(B), valid_BT=VALID, reverse=reverse)
    assert out.shape == (B, T, D)
    for row, length in enumerate((7, 4, 1)):
        state = cell.empty_state(1)
        for t in reversed(range(length)) if reverse else range(length):
            state = cell.step(cell.project(x[row : row + 1, t]), state)
            np.testing.assert_allclose(out[row, t], state[0][0], atol=1e-6)
        for got, expected in zip(final, state, strict=True):
            np.testing.assert_allclose(got[row], expected[0], atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_kernels_start_orthogonal_and_the_forget_gate_open(name):
    cell = make(name)
    for block in np.split(np.asarray(cell.gates.kernel[...]), cell.gates.kernel.shape[1] // D, axis=1):
        np.testing.assert_allclose(block @ block.T, np.eye(D), atol=1e-5)
    bias = np.zeros(cell.num_gates * D)
    if name == "lstm":
        bias[D : 2 * D] = 1
    np.testing.assert_array_equal(cell.input.bias[...], bias)
    assert cell.input.bias.get_metadata()["out_sharding"] == ("mlp",)


@pytest.mark.parametrize("name", CELLS)
def test_narrow_products_keep_a_wide_state(name):
    narrow, wide = make(name, dtype=jnp.bfloat16), make(name)
    out, final = scan_cell(narrow, normal(B, T, I), narrow.empty_state(B))
    assert out.dtype == jnp.bfloat16
    assert {part.dtype for part in final} == {jnp.dtype(jnp.float32)}
    expected, _ = scan_cell(wide, normal(B, T, I), wide.empty_state(B))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)


VALID_S = jnp.arange(S) < jnp.array([[8], [5], [2]])
STATES, QUERY = normal(B, S, E, seed=1), normal(B, D, seed=2)


@functools.cache
def attention(kind, window=2):
    return SourceAttention(kind, D, E, A, window=window, rngs=nnx.Rngs(0), **OPTIONS)


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
        rule="delta", feature_map=delta._features, form="recurrent", valid_BT=jnp.pad(VALID_S, ((0, 0), (0, 1))),
    )  # fmt: skip
    np.testing.assert_allclose(attend("delta")[0], out[:, -1, 0], atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="dot needs them equal"):
        SourceAttention("dot", D, E + 1, A, rngs=nnx.Rngs(0), **OPTIONS)
    with pytest.raises(ValueError, match="Did you mean 'additive'"):
        SourceAttention("addtive", D, E, A, rngs=nnx.Rngs(0), **OPTIONS)
