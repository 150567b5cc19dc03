"""Fast weights against loops over time in float64; all forms equal; state, documents and padding."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from transformer.attention.linear.fast_weights import (
    RULES,
    fast_weights,
    fast_weights_step,
    unit_lower_inverse,
)

B, T, N, K, H, V = 2, 13, 4, 2, 3, 5


run = jax.jit(fast_weights, static_argnames=("rule", "feature_map", "chunk"))
run_step = jax.jit(fast_weights_step, static_argnames="rule")


def inputs(rule, dtype=jnp.float32, length=T):
    """q, k, v, β and (where the rule decays) log α."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, length, *dims)) for dims in ((N, H), (K, H), (K, V)))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    beta, log_decay = rng.uniform(0.1, 1, (B, length, K)), -rng.uniform(0, 1, (B, length, K))
    arrays = (q, k, v, beta, log_decay) if RULES[rule].decays else (q, k, v, beta)
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def naive(rule, q, k, v, beta, log_decay=None, *, feature_map="identity", segments=None, state=None):
    """The equations, one position and one head at a time."""
    phi = {"identity": lambda x: x, "elu": lambda x: np.where(x > 0, x + 1, np.exp(x))}[feature_map]
    q, k, v, beta = (np.asarray(x, np.float64) for x in (q, k, v, beta))
    length = q.shape[1]
    out, last = np.zeros((B, length, N, V)), np.zeros((B, K, H, V))
    for b, n in np.ndindex(B, N):
        head = n // (N // K)
        w = np.zeros((H, V)) if state is None else np.array(state, np.float64)[b, head]
        document = None
        for t in range(length):
            segment = 1 if segments is None else segments[b, t]
            if segment != 0:
                w = w if document in (None, segment) else np.zeros((H, V))
                document = segment
                key, value = phi(k[b, t, head]), v[b, t, head]
                w = w if log_decay is None else w * np.exp(float(log_decay[b, t, head]))
                value = value - w.T @ key if RULES[rule].erases else value
                w = w + beta[b, t, head] * np.outer(key, value)
            out[b, t, n] = w.T @ phi(q[b, t, n])
        last[b, head] = w
    return out, last


DOCUMENTS = np.array([[1] * 3 + [2] * 1 + [3] * 7 + [0] * 2, [4] * 5 + [0] * 1 + [4] * 7])
VALID = np.random.default_rng(5).random((B, T)) > 0.3

CHUNKS = (None, 4, 1)
CONDITIONS: dict[str, dict] = {
    "plain": {},
    "everything": {
        "feature_map": "elu", "segments": np.where(VALID, DOCUMENTS, 0),
        "state": np.random.default_rng(6).normal(size=(B, K, H, V)),
    },
}  # fmt: skip
NAMES = {"segments": "segments_BT", "state": "state_BKMV"}


def as_arguments(condition, dtype=jnp.float32):
    arguments = {NAMES.get(name, name): value for name, value in condition.items()}
    return {
        name: jnp.asarray(value, dtype if value.dtype == np.float64 else None)
        if isinstance(value, np.ndarray)
        else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize(("chunk", "condition"), [*((chunk, "everything") for chunk in CHUNKS), (4, "plain")])
@pytest.mark.parametrize("rule", RULES)
def test_values_are_those_of_the_equations(rule, chunk, condition):
    arrays = inputs(rule)
    out, state = run(*arrays, rule=rule, chunk=chunk, **as_arguments(CONDITIONS[condition]))
    expected, expected_state = naive(rule, *arrays, **CONDITIONS[condition])
    size = 1 + np.abs(expected).max()
    np.testing.assert_allclose(out / size, expected / size, atol=3e-6)
    np.testing.assert_allclose(state / size, expected_state / size, atol=3e-6)


@pytest.mark.parametrize("rule", ["gated_sum", "delta", "gated_delta"])
def test_forms_have_equal_gradients(rule):
    with jax.enable_x64(True):
        arrays = inputs(rule, jnp.float64)
        arguments = as_arguments(CONDITIONS["everything"], jnp.float64)
        start = arguments.pop("state_BKMV")

        def loss(chunk, start, *arrays):
            out, state = run(*arrays, rule=rule, chunk=chunk, state_BKMV=start, **arguments)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

        grad = jax.jit(jax.grad(loss, tuple(range(1, len(arrays) + 2))), static_argnums=0)
        expected = grad(1, start, *arrays)
        for chunk in (None, 4):
            for got, wanted in zip(grad(chunk, start, *arrays), expected, strict=True):
                np.testing.assert_allclose(got, wanted, atol=1e-10)


def test_gradients_are_those_of_the_equations():
    with jax.enable_x64(True):
        arrays = inputs("gated_delta", jnp.float64, length=5)

        def write(*arrays):
            return run(*map(jnp.asarray, arrays), rule="gated_delta", chunk=2, feature_map="elu")

        check_grads(write, arrays, order=1, modes=["rev"], rtol=1e-4)


@pytest.mark.parametrize(
    ("length", "chunk", "rule"),
    [(1, 3, "delta"), (2, 64, "gated_delta"), (7, 3, "sum"), (11, 5, "gated_delta"), (8, 1, "delta")],
)
def test_any_chunk_gives_what_one_position_after_another_gives(length, chunk, rule):
    arrays = inputs(rule, length=length)
    expected = run(*arrays, rule=rule, chunk=1)
    for got, wanted in zip(run(*arrays, rule=rule, chunk=chunk), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-6)


@pytest.mark.parametrize("rule", ["gated_sum", "delta"])
def test_a_sequence_in_two_parts_and_then_in_steps(rule):
    arrays = tuple(map(np.asarray, inputs(rule)))
    expected, expected_state = run(*arrays, rule=rule)
    first, state = run(*(x[:, :5] for x in arrays), rule=rule, chunk=3)
    second, state = run(*(x[:, 5:11] for x in arrays), rule=rule, chunk=3, state_BKMV=state)
    outs = [first, second]
    for t in (11, 12):
        out, state = run_step(state, *(x[:, t] for x in arrays), rule=rule)
        outs.append(out[:, None])
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=1e-5)
    np.testing.assert_allclose(state, expected_state, atol=1e-5)


def test_a_step_that_is_not_valid_leaves_the_state():
    state = np.ones((B, K, H, V), np.float32)
    step = [np.asarray(x)[:, 0] for x in inputs("gated_delta")]
    _, kept = run_step(state, *step, rule="gated_delta", valid_B=jnp.array([True, False]))
    kept = np.asarray(kept)
    np.testing.assert_array_equal(kept[1], state[1])
    # The other one as it is called without a program around it.
    alone = fast_weights_step(*map(jnp.asarray, (state, *step)), rule="gated_delta")[1]
    np.testing.assert_allclose(kept[0], np.asarray(alone)[0], atol=1e-6)


@pytest.mark.parametrize("rule", ["sum", "gated_delta"])
def test_documents_are_apart(rule):
    arrays = tuple(map(np.asarray, inputs(rule)))
    segments = jnp.asarray([[7] * 6 + [8] * 7] * B)
    packed, state = run(*arrays, rule=rule, chunk=4, segments_BT=segments)
    first, _ = run(*(x[:, :6] for x in arrays), rule=rule)
    second, last = run(*(x[:, 6:] for x in arrays), rule=rule)
    np.testing.assert_allclose(packed, np.concatenate([first, second], axis=1), atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


@pytest.mark.parametrize(("rule", "chunk"), [("gated_delta", chunk) for chunk in CHUNKS] + [("sum", 4)])
def test_a_masked_key_has_no_influence(rule, chunk):
    arrays = inputs(rule)
    valid = jnp.asarray(VALID, jnp.int32)

    def write(k, v):
        return run(arrays[0], k, v, *arrays[3:], rule=rule, chunk=chunk, segments_BT=valid)[0]

    k, v = arrays[1:3]
    hidden = ~VALID[..., None, None]
    changed = write(np.where(hidden, np.float32(3), k), np.where(hidden, np.float32(-9), v))
    np.testing.assert_array_equal(changed, write(k, v))
    for gradient in jax.jit(jax.grad(lambda k, v: jnp.sum(jnp.sin(write(k, v))), (0, 1)))(k, v):
        assert not np.asarray(gradient)[~VALID].any()
        assert np.asarray(gradient)[VALID].any()


@pytest.mark.parametrize("rule", ["sum", "gated_delta"])
def test_nothing_valid_gives_zeros_and_no_nan(rule):
    def loss(*arrays):
        return jnp.sum(run(*arrays, rule=rule, chunk=4, segments_BT=jnp.zeros((B, T), jnp.int32))[0])

    arrays = inputs(rule)
    value, gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays)))))(*arrays)
    assert value == 0
    assert not any(np.asarray(gradient).any() for gradient in gradients)


@pytest.mark.parametrize("rule", ["sum", "gated_delta"])
def test_what_comes_later_changes_nothing(rule):
    arrays = inputs(rule)
    changed = tuple(map(np.array, arrays))
    for i, x in enumerate(changed):
        x[:, 9:] = 0.5 if i < 4 else -3.0
    before, after = (np.asarray(run(*x, rule=rule, chunk=4)[0]) for x in (arrays, changed))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.abs(before - after)[:, 9:].max() > 0.1


def test_the_delta_rule_recalls_what_was_written_last():
    """Orthonormal keys, β = 1: each key reads the newest of its values; the plain sum reads all of them together."""
    k = np.eye(3, dtype=np.float32)[[0, 1, 0, 2, 0]][None, :, None]
    v = np.arange(1, 6, dtype=np.float32)[None, :, None, None]
    np.testing.assert_allclose(np.ravel(run(k, k, v, rule="delta")[0]), [1, 2, 3, 4, 5], atol=1e-6)
    np.testing.assert_allclose(np.ravel(run(k, k, v, rule="sum")[0]), [1, 2, 4, 4, 9], atol=1e-6)


def test_strong_decay_over_a_long_sequence_stays_finite():
    q, k, v, beta, log_decay = inputs("gated_delta", length=100)

    def loss(log_decay):
        return jnp.sum(run(q, k, v, beta, log_decay, rule="gated_delta", chunk=None)[0])

    value, gradient = jax.jit(jax.value_and_grad(loss))(log_decay * 50)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_memory_and_work_grow_with_the_length_alone():
    def cost(length):
        shapes = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
        compiled = jax.jit(jax.grad(lambda *x: run(*x, chunk=32)[0].sum(), (0, 1, 2))).lower(*shapes).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert cost(8192) < 4.2 * cost(2048)


def test_types():
    out, state = run(*inputs("delta", jnp.bfloat16))
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    exact = np.asarray(run(*inputs("delta"))[0])
    assert np.linalg.norm(np.asarray(out, np.float32) - exact) / np.linalg.norm(exact) < 2e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rule": "dellta"},
            "rule='dellta' does not exist; there are sum, gated_sum, delta, gated_delta. Did you mean 'delta'",
        ),
        ({"feature_map": "elu1"}, "Did you mean 'elu'"),
        ({"chunk": 0}, "chunk=0; expected 1 or more"),
        ({"rule": "gated_delta"}, "log_decay is None; only the gated rules take it"),
        ({"log_decay_BTK": jnp.zeros((B, T, K))}, r"log_decay is of shape \(2, 13, 2\)"),
        ({"state_BKMV": jnp.zeros((B, K, H + 1, V))}, r"state has shape .* expected \[B, K, M, V\] = \(2, 2, 3, 5\)"),
        (
            {"segments_BT": jnp.ones((B, T + 1), jnp.int32)},
            r"segments is int32 \(2, 14\); expected integer \[B=2, T=13\]",
        ),
        ({"segments_BT": jnp.ones((B, T))}, "segments is float32"),
        ({"q_BTNH": jnp.zeros((B, T, 3, H))}, r"q has 3 heads \(2, 13, 3, 3\), not a multiple of k's 2"),
        (
            {"k_BTKH": jnp.zeros((B, T, K, H + 1))},
            r"k is float32 \(2, 13, 2, 4\); expected floating \[B=2, T=13, K, H=3\]",
        ),
        ({"v_BTKV": jnp.zeros((B, T, K, V), jnp.int32)}, "v is int32"),
    ],
)
def test_inputs_that_do_not_fit(arguments, message):
    arrays = dict(zip(("q_BTNH", "k_BTKH", "v_BTKV", "beta_BTK"), inputs("delta"), strict=True))
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(fast_weights)(**(arrays | arguments))


def test_arrays_that_a_feature_map_captures_have_gradients_in_chunks():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 10, 2, 3)), jnp.float32) for _ in range(3))

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(matrix, chunk):
        out, state = fast_weights(q, k, v, feature_map=lambda x: jnp.tanh(x @ matrix), rule="sum", chunk=chunk)
        return jnp.sum(out**2) + jnp.sum(state)

    matrix = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    grads = [np.asarray(gradient(matrix, chunk)) for chunk in (4, 1)]
    np.testing.assert_allclose(*grads, rtol=1e-4)
    assert np.abs(grads[0]).min() > 0


@pytest.mark.parametrize("size", [1, 2, 5, 16, 33])
def test_unit_lower_inverse(size):
    matrix = np.random.default_rng(size).normal(size=(3, size, size)).astype(np.float32)
    expected = np.linalg.inv(np.eye(size) + np.tril(matrix, -1).astype(np.float64))
    inverse = jax.jit(unit_lower_inverse)
    np.testing.assert_allclose(inverse(jnp.asarray(matrix)), expected, rtol=2e-4, atol=1e-4 * np.abs(expected).max())
    # Equal keys: powers of the matrix would reach 10^9 and cancel.
    ones = inverse(jnp.ones((size, size)))
    np.testing.assert_allclose(ones, np.linalg.inv(np.tril(np.ones((size, size)))), atol=1e-6)
