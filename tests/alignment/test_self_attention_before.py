"""Self-attention before the Transformer, against loops in float64: LSTMN, structured and decomposable attention."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from transformer.alignment.decomposable import DecomposableAttention, attend_both_ways, distance_bias
from transformer.alignment.intra import LSTMNWeights, Tape, lstmn
from transformer.alignment.structured import StructuredAttention, redundancy_penalty, structured_attention
from transformer.attention.spec.mask import AttentionMask

B, T, S, D, F, A, R = 2, 5, 4, 3, 4, 6, 3
NORMAL = nnx.initializers.normal(0.7)
VALID_T = np.arange(T) < np.array([[3], [T]])
VALID_S = np.arange(S) < np.array([[S], [2]])


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def exact(x):
    return np.asarray(x, np.float64)


def call(module, *args, **kwargs):
    """The module's call as one compiled program."""
    graphdef, state = nnx.split(module)
    return jax.jit(lambda state, args, kwargs: nnx.merge(graphdef, state)(*args, **kwargs))(state, args, kwargs)


def softmax(scores, seen):
    """Of a vector; zeros where not seen."""
    powers = np.exp(scores) * seen
    return powers / powers.sum() if powers.sum() > 0 else powers


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- LSTMN


def lstmn_weights(dtype=jnp.float32):
    shapes = ((F, A), (D, A), (F, A), (A,), (F, 4 * F), (D, 4 * F), (4 * F,))
    return LSTMNWeights(*(draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)))


def naive_lstmn(x, w, allowed):
    x, w = exact(x), {name: exact(value) for name, value in w._asdict().items()}
    hidden, memory, weights = np.zeros((B, T, F)), np.zeros((B, T, F)), np.zeros((B, T, T))
    for b in range(B):
        summary = np.zeros(F)
        for t in range(T):
            scores = np.zeros(T)
            for s in range(t):
                inside = hidden[b, s] @ w["hidden_FA"] + x[b, t] @ w["input_DA"] + summary @ w["summary_FA"]
                scores[s] = w["vector_A"] @ np.tanh(inside)
            weights[b, t] = softmax(scores, (np.arange(T) < t) & allowed[b, t])
            summary, carried = weights[b, t] @ hidden[b], weights[b, t] @ memory[b]
            gates = summary @ w["summary_gates_FG"] + x[b, t] @ w["input_gates_DG"] + w["bias_G"]
            i, f, o, candidate = np.split(gates, 4)
            memory[b, t] = sigmoid(f) * carried + sigmoid(i) * np.tanh(candidate)
            hidden[b, t] = sigmoid(o) * np.tanh(memory[b, t])
    return hidden, memory, weights


@pytest.mark.parametrize("masked", [False, True])
def test_lstmn_is_the_equations(masked):
    x, w = draw(B, T, D), lstmn_weights()
    mask = AttentionMask.padding(jnp.asarray(VALID_T)) if masked else None
    allowed = np.broadcast_to(VALID_T[:, None] if masked else True, (B, T, T))
    hidden, tape, weights = jax.jit(lstmn)(x, w, mask)
    np.testing.assert_array_equal(hidden, tape.hidden_BSF)
    for got, wanted in zip((hidden, tape.memory_BSF, weights), naive_lstmn(x, w, allowed), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_lstmn_gradients():
    with jax.enable_x64(True):
        mask = AttentionMask.padding(jnp.asarray(VALID_T))
        exact_weights = lstmn_weights(jnp.float64)
        lengths, valid = jnp.array([2, 0], jnp.int32), jnp.arange(T) < jnp.array([[3], [T]])

        def whole(x, w):
            hidden, tape, weights = lstmn(x, w, mask)
            return hidden, tape, weights

        def further(x, w, tape):
            """From a tape that holds other positions, with padding in a row."""
            return lstmn(x, w, tape=tape, lengths_B=lengths, valid_BT=valid)

        x = draw(B, T, D, dtype=jnp.float64)
        check_grads(jax.jit(whole), (x, exact_weights), order=2, modes=["rev"])
        check_grads(jax.jit(whole), (x, exact_weights), order=1, modes=["fwd"])
        tape = Tape(*(draw(*shape, dtype=jnp.float64) for shape in ((B, T + 3, F), (B, T + 3, F), (B, F))))
        check_grads(jax.jit(further), (x, exact_weights, tape), order=1, modes=["rev"])


def test_lstmn_takes_memory_for_one_tape():
    w, length = lstmn_weights(), 512

    def loss(x):
        return jnp.sum(lstmn(x, w)[0])

    needed = jax.jit(jax.grad(loss)).lower(draw(1, length, D)).compile().memory_analysis().temp_size_in_bytes
    # Of which a mask, weights and their gradients are of length², as bytes and float32; a tape a position would be 17 MB.
    assert needed < 6 * 4 * length**2


def test_lstmn_sees_its_past_alone_and_nothing_hidden():
    x, w = draw(B, T, D), lstmn_weights()
    run = jax.jit(lambda x, mask: lstmn(x, w, mask))
    hidden, _, weights = run(x, AttentionMask.none())
    np.testing.assert_array_equal(run(x.at[:, 3:].set(2.0), AttentionMask.none())[0][:, :3], hidden[:, :3])
    np.testing.assert_allclose(weights.sum(-1), [[0, 1, 1, 1, 1]] * B, atol=1e-6)
    # Segments: a second document starts with empty tapes.
    segments = AttentionMask.segments(jnp.asarray([[1, 1, 2, 2, 2]] * B))
    apart = lstmn(x[:, 2:], w)[0]
    np.testing.assert_allclose(run(x, segments)[0][:, 2:], apart, atol=1e-6)
    nothing = AttentionMask.padding(jnp.zeros((B, T), bool))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(lstmn(x, w, nothing)[0])))(x)
    assert np.isfinite(gradient).all() and not np.asarray(run(x, nothing)[2]).any()


def test_lstmn_inputs_that_do_not_fit():
    w = lstmn_weights()
    with pytest.raises(ValueError, match=r"input_DA is float32 \(3, 6\); expected floating \[D=4, A=6\]"):
        inspect.unwrap(lstmn)(draw(B, T, D + 1), w)
    narrow = w._replace(summary_gates_FG=draw(F, 12), input_gates_DG=draw(D, 12), bias_G=draw(12))
    with pytest.raises(ValueError, match=r"summary_gates has shape \(4, 12\); expected \[F, 4 F\]"):
        inspect.unwrap(lstmn)(draw(B, T, D), narrow)


# --- structured


def test_structured_is_the_equations():
    module = StructuredAttention(D, A, R, kernel_init=NORMAL, rngs=nnx.Rngs(0))
    x = draw(B, S, D)
    views, weights = call(module, x, AttentionMask.padding(jnp.asarray(VALID_S)))
    hidden = np.tanh(exact(x) @ exact(module.hidden.kernel[...])) @ exact(module.hops.kernel[...])
    expected = np.array([[softmax(hidden[b, :, r], VALID_S[b]) for r in range(R)] for b in range(B)])
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(views, expected @ exact(x), atol=1e-5)
    penalty = [np.linalg.norm(a @ a.T - np.eye(R), "fro") ** 2 for a in expected]
    np.testing.assert_allclose(redundancy_penalty(weights), penalty, rtol=1e-5)


def test_structured_gradients():
    with jax.enable_x64(True):
        mask = AttentionMask.padding(jnp.asarray(VALID_S).at[0].set(False))

        @jax.jit
        def run(scores, x):
            views, weights = structured_attention(scores, x, mask)
            return views, redundancy_penalty(weights)

        check_grads(run, (draw(B, S, R, dtype=jnp.float64), draw(B, S, D, dtype=jnp.float64)), order=1, modes=["rev"])


def test_structured_order_masks_and_the_least_penalty():
    scores, x = draw(B, S, R), draw(B, S, D)
    order = np.random.default_rng(1).permutation(S)
    views, weights = structured_attention(scores, x)
    np.testing.assert_allclose(structured_attention(scores[:, order], x[:, order])[0], views, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    mask = AttentionMask.padding(jnp.asarray(VALID_S).at[0].set(False))
    views, weights = structured_attention(scores, x.at[1, 2:].set(1e4), mask)
    np.testing.assert_array_equal(views[1], structured_attention(scores, x, mask)[0][1])
    assert not np.asarray(views[0]).any() and not np.asarray(weights[1, :, 2:]).any()
    np.testing.assert_allclose(redundancy_penalty(jnp.eye(R, S)[None]), 0)
    np.testing.assert_allclose(redundancy_penalty(jnp.eye(R, S)[None, :1].repeat(R, 1)), R * R - R)
    with pytest.raises(ValueError, match=r"x is float32 \(2, 5, 3\); expected floating \[B=2, S=4, D\]"):
        inspect.unwrap(structured_attention)(scores, draw(B, T, D))
    with pytest.raises(ValueError, match="it has 2 heads"):
        structured_attention(scores, x, AttentionMask.explicit(jnp.ones((1, 2, 1, S), bool)))


# --- decomposable


def make_decomposable(**options):
    return DecomposableAttention(D, F, 3, max_distance=2, kernel_init=NORMAL, rngs=nnx.Rngs(0), **options)


def naive_decomposable(model, a, b, valid_a, valid_b):
    """One sentence pair, word by word."""

    def layers(two, x):
        for linear in (two.first, two.second):
            x = np.maximum(x @ exact(linear.kernel[...]) + exact(linear.bias[...]), 0)
        return x

    def words(x, valid):
        if model.intra is None:
            return x
        features, bias = layers(model.intra, x), exact(model.bias[...])
        seen = np.zeros_like(x)
        for t in range(len(x)):
            scores = [features[t] @ features[s] + bias[max(-2, min(2, t - s)) + 2] for s in range(len(x))]
            seen[t] = softmax(np.array(scores), valid) @ x
        return np.concatenate([x, seen], axis=-1)

    a, b = words(exact(a), valid_a), words(exact(b), valid_b)
    scores = layers(model.attend, a) @ layers(model.attend, b).T
    v1 = sum(
        layers(model.compare, np.concatenate([a[t], softmax(scores[t], valid_b) @ b]))
        for t in range(len(a))
        if valid_a[t]
    )
    v2 = sum(
        layers(model.compare, np.concatenate([b[s], softmax(scores[:, s], valid_a) @ a]))
        for s in range(len(b))
        if valid_b[s]
    )
    y = layers(model.aggregate, np.concatenate([v1, v2]))
    return y @ exact(model.classify.kernel[...]) + exact(model.classify.bias[...])


@pytest.mark.parametrize("use_intra", [False, True])
def test_decomposable_is_the_equations(use_intra):
    model = make_decomposable(use_intra=use_intra)
    if use_intra:
        model.bias.set_value(draw(5))
    a, b = draw(B, T, D), draw(B, S, D)
    logits, over_b, over_a = call(model, a, b, valid_a_BT=jnp.asarray(VALID_T), valid_b_BS=jnp.asarray(VALID_S))
    expected = [naive_decomposable(model, a[i], b[i], VALID_T[i], VALID_S[i]) for i in range(B)]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(over_b.sum(-1), VALID_T, atol=1e-6)
    np.testing.assert_allclose(over_a.sum(-1), VALID_S, atol=1e-6)


@pytest.mark.parametrize("use_intra", [False, True])
def test_decomposable_padding_changes_nothing(use_intra):
    model = make_decomposable(use_intra=use_intra)
    a, b = draw(1, 3, D), draw(1, 2, D)
    wide_a, wide_b = (jnp.pad(x, ((0, 0), (0, 2), (0, 0)), constant_values=7.0) for x in (a, b))
    valid = {"valid_a_BT": jnp.arange(5)[None] < 3, "valid_b_BS": jnp.arange(4)[None] < 2}
    np.testing.assert_allclose(call(model, wide_a, wide_b, **valid)[0], call(model, a, b)[0], rtol=1e-5, atol=1e-5)

    gradient_of = jax.jit(jax.grad(lambda a, b, valid: jnp.sum(jnp.sin(model(a, b, **valid)[0])), (0, 1)))
    gradients = gradient_of(wide_a, wide_b, valid)
    assert not np.asarray(gradients[0][:, 3:]).any() and not np.asarray(gradients[1][:, 2:]).any()
    assert np.asarray(gradients[0][:, :3]).any()
    gradients = gradient_of(wide_a, wide_b, {"valid_a_BT": jnp.zeros((1, 5), bool), "valid_b_BS": valid["valid_b_BS"]})
    assert np.isfinite(gradients[0]).all() and np.isfinite(gradients[1]).all()


def test_decomposable_has_no_order_without_distances():
    model = make_decomposable()
    a, b = draw(B, T, D), draw(B, S, D)
    order = np.random.default_rng(1).permutation(T)
    np.testing.assert_allclose(call(model, a[:, order], b)[0], call(model, a, b)[0], rtol=1e-5, atol=1e-5)


def test_attend_both_ways():
    with jax.enable_x64(True):
        allowed = jnp.asarray(np.random.default_rng(1).random((B, 1, T, S)) > 0.4)
        mask = AttentionMask.explicit(allowed)
        arrays = [draw(*shape, dtype=jnp.float64) for shape in ((B, T, S), (B, T, D), (B, S, D))]
        check_grads(jax.jit(lambda *x: attend_both_ways(*x, mask)[:2]), arrays, order=1, modes=["rev"])
        beta, alpha, over_b, over_a = jax.jit(attend_both_ways)(*arrays, mask)
        np.testing.assert_allclose(beta, over_b @ arrays[2])
        np.testing.assert_allclose(alpha, over_a @ arrays[1])
        assert not np.asarray(over_a.swapaxes(1, 2))[~np.asarray(allowed[:, 0])].any()


def test_distances_beyond_the_greatest_share_a_bias():
    expected = [[2, 1, 0, 0], [3, 2, 1, 0], [4, 3, 2, 1], [4, 4, 3, 2]]
    np.testing.assert_array_equal(distance_bias(jnp.arange(5.0), 4), expected)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); expected an odd number"):
        distance_bias(jnp.zeros(4), 3)


def test_decomposable_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="max_distance=0; expected 1 or more"):
        DecomposableAttention(D, F, 3, max_distance=0, kernel_init=NORMAL, rngs=nnx.Rngs(0))
    call = inspect.unwrap(DecomposableAttention.__call__)
    with pytest.raises(ValueError, match=r"b is float32 \(2, 4, 2\); expected floating \[B=2, S, D=3\]"):
        call(make_decomposable(), draw(B, T, D), draw(B, S, 2))
    with pytest.raises(ValueError, match=r"valid_b is bool \(2, 5\); expected bool \[B=2, S=4\]"):
        call(make_decomposable(), draw(B, T, D), draw(B, S, D), valid_b_BS=jnp.asarray(VALID_T))
