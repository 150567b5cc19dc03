"""Every backend against the equation in float64, values and gradients; and what a call may not ask."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.attention.dispatch import attend, choose_backend
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.mods import Mod
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec, Dropout, Score
from transformer.randomness import seeds_of

B, T, N, H = 2, 8, 4, 16

MASKS = {
    "none": lambda: AttentionMask.none(),
    "causal": lambda: AttentionMask.causal(),
    "window": lambda: AttentionMask.causal() & AttentionMask.window(left=2),
    "padding": lambda: AttentionMask.padding(jnp.asarray(np.arange(T) < np.array([[5], [8]]))),
    "segments": lambda: (
        AttentionMask.causal() & AttentionMask.segments(jnp.array([[1] * 3 + [2] * 5, [1] * 6 + [0] * 2]))
    ),
    "explicit": lambda: AttentionMask.explicit(jnp.array(np.random.default_rng(1).random((B, N, T, T)) > 0.5)),
}


def inputs(num_kv_heads, dtype=jnp.float32, length=T):
    rng = np.random.default_rng(0)
    shapes = ((B, length, N, H), (B, length, num_kv_heads, H), (B, length, num_kv_heads, H))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def run(q, k, v, mask=None, **options):
    """The call as one compiled program, and not one for each of its operations."""
    return jax.jit(lambda q, k, v, mask: attend(q, k, v, mask, **options))(q, k, v, mask)


def in_float64(q, k, v, mask, bias=None, soft_cap=None):
    """The definition, in NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    allowed = jax.jit(lambda mask: mask.materialize(q.shape[1], k.shape[1]))(mask)
    allowed = np.ones((1, 1, 1, 1), bool) if allowed is None else np.asarray(allowed)
    powers = np.exp(logits - logits.max(-1, keepdims=True)) * allowed
    total = powers.sum(-1, keepdims=True)
    weights = np.divide(powers, total, out=np.zeros_like(powers), where=total > 0)
    return np.einsum("bnts,bsnh->btnh", weights, v), weights


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("backend", ["reference", "xla", "blockwise"])
def test_values(backend, num_kv_heads, name):
    q, k, v = inputs(num_kv_heads)
    mask = MASKS[name]()
    out, _ = run(q, k, v, mask, backend=backend)
    np.testing.assert_allclose(out, in_float64(q, k, v, mask)[0], atol=2e-6)


@pytest.mark.parametrize("name", MASKS)
def test_backends_have_equal_gradients(name):
    q, k, v = inputs(2)
    mask = MASKS[name]()

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=(1, 2, 3))
    def gradients(backend, q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, mask, backend=backend)[0]))

    expected = gradients("reference", q, k, v)
    for backend in ("xla", "blockwise"):
        for got, wanted in zip(gradients(backend, q, k, v), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-5, err_msg=backend)


def test_gradient_is_that_of_the_equation():
    q, k, v = inputs(2)
    mask = MASKS["segments"]()

    def loss(q):
        return jnp.sum(jnp.sin(attend(q, k, v, mask, backend="reference")[0]))

    gradient, step = np.asarray(jax.jit(jax.grad(loss))(q)), 1e-4
    direction = np.random.default_rng(3).normal(size=q.shape)
    ends = [np.sin(in_float64(np.asarray(q, np.float64) + s * step * direction, k, v, mask)[0]).sum() for s in (1, -1)]
    np.testing.assert_allclose(np.sum(gradient * direction), (ends[0] - ends[1]) / (2 * step), rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "xla", "blockwise"])
def test_bfloat16(backend):
    q, k, v = inputs(2, jnp.bfloat16)
    out, _ = run(q, k, v, AttentionMask.causal(), backend=backend)
    assert out.dtype == jnp.bfloat16
    expected = in_float64(q, k, v, AttentionMask.causal())[0]
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected) < 1e-2


def test_bias_and_soft_cap():
    q, k, v = inputs(4)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=(1, N, T, T)), jnp.float32)
    # Without a program around it, as one calls it in a notebook.
    out, weights = attend(q, k, v, AttentionMask.causal(), bias, logit_soft_cap=2.0, return_weights=True)
    expected, expected_weights = in_float64(q, k, v, AttentionMask.causal(), bias, 2.0)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "xla", "blockwise"])
def test_a_query_that_sees_nothing_gives_zeros_and_no_nan(backend):
    q, k, v = inputs(4)
    mask = AttentionMask.padding(jnp.zeros((B, T), bool))

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, mask, backend=backend)[0])

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
    assert value == 0
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_a_masked_key_has_no_influence_at_all():
    q, k, v = inputs(4)
    mask = MASKS["padding"]()
    changed_k, changed_v = np.array(k), np.array(v)
    changed_k[0, 5:] = changed_v[0, 5:] = 1e4
    forward = jax.jit(lambda k, v: attend(q, k, v, mask)[0])
    np.testing.assert_array_equal(forward(k, v), forward(changed_k, changed_v))
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(attend(q, k, v, mask)[0])))(v)
    assert not np.asarray(gradient)[0, 5:].any()


def test_dropout_keeps_the_mean_and_needs_a_key():
    q, k, v = inputs(4)
    np.testing.assert_allclose(run(q, k, jnp.ones_like(v), dropout_rate=0.5)[0], 1, atol=1e-6)

    @jax.jit
    def means_of(keys, ones):
        return jax.vmap(lambda key: jnp.mean(attend(q, k, ones, dropout_rate=0.5, dropout_key=key)[0]))(keys)

    # The ones come as an argument: XLA 0.10.2 reduces a transposed product with a constant of ones to a wrong number.
    means = np.asarray(means_of(jax.random.split(jax.random.key(0), 200), jnp.ones_like(v)))
    assert abs(float(means.mean()) - 1) < 0.02
    assert float(means.std()) > 0


@pytest.mark.parametrize("window", [None, 40, 200])
def test_blockwise_over_several_blocks(window):
    """A length that no block divides; blocks wholly outside the window are skipped."""
    q, k, v = inputs(2, length=300)
    mask = AttentionMask.causal() if window is None else AttentionMask.causal() & AttentionMask.window(left=window)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=(1, 2, 3))
    def both(backend, q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, mask, backend=backend)[0]))

    (value, grads), (expected, expected_grads) = both("blockwise", q, k, v), both("reference", q, k, v)
    # A sum of thousands of terms, of which float32 tells no more than its own last places.
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5), grads, expected_grads)


def request(mask=None, bias=None, soft_cap=None, dropout=None, mod=None, **changes):
    mask = AttentionMask.causal() if mask is None else mask
    defaults = {
        "platform": "gpu", "dtype": jnp.bfloat16, "batch_size": 2, "num_queries": 64, "num_keys": 64,
        "num_heads": 2, "num_kv_heads": 2,
        "head_dim": 64, "value_dim": 64, "compute_capability": 8.0,
        "spec": AttentionSpec(mask, Score(0.125, soft_cap, bias, mod), dropout),
    }  # fmt: skip
    return AttentionShapes(**(defaults | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "cudnn"),
        ({"dtype": jnp.float32}, "xla"),
        ({"head_dim": 20, "value_dim": 20}, "xla"),
        ({"head_dim": 256, "value_dim": 256}, "xla"),
        ({"value_dim": 32}, "blockwise"),
        ({"bias": jnp.zeros((1, 1, 1, 1))}, "xla"),
        ({"mask": AttentionMask.segments(jnp.ones((1, 64), jnp.int32))}, "xla"),
        ({"mask": AttentionMask.causal() & AttentionMask.window(left=8)}, "cudnn"),
        ({"soft_cap": 30.0}, "blockwise"),
        ({"dropout": Dropout(seeds_of(jax.random.key(0), 2), 0.1)}, "blockwise"),
        ({"mod": Mod.score(lambda s, b, h, q, k: s, jnp.float32)}, "blockwise"),
        ({"dtype": jnp.float32, "num_queries": 8192, "num_keys": 8192}, "blockwise"),
        ({"platform": "tpu"}, "xla"),
        ({"platform": "cpu"}, "blockwise"),
    ],
)
def test_auto_chooses_what_can_run(changes, expected):
    assert choose_backend("auto", request(**changes)) == expected


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(ValueError, match="cudnn.*GPU"):
        attend(*inputs(4), backend="cudnn")
    with pytest.raises(ValueError, match="xla.*dropout"):
        attend(*inputs(4), backend="xla", dropout_rate=0.1, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match="Did you mean 'reference'"):
        attend(*inputs(4), backend="referense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q has shape"),
        (lambda q, k, v: (q, k, v[:, :-1]), "k has shape"),
        (lambda q, k, v: (q[..., :-1], k, v), "head_dim must agree"),
        (lambda q, k, v: (q[:, :, :3], k, v), "3 query heads"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    # Without the suite's own checker of shapes, as a user calls it.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(attend)(*change(*inputs(2)))
