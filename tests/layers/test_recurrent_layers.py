"""Cells against NumPy, scans against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers.recurrent import CELLS, gru_step, lstm_step, scan_cell

B, T, I, D = 3, 7, 5, 6  # noqa: E741
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
