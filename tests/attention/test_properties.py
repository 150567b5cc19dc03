"""What must hold of softmax attention by every backend, whatever the numbers."""

from __future__ import annotations

import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from transformer.attention.backends import blockwise, loops
from transformer.attention.dispatch import attend
from transformer.attention.spec.mask import AttentionMask

B, T, N, K, H = 2, 24, 4, 2, 8
BACKENDS = ["reference", "xla", "blockwise", "blockwise in loops"]
settings = hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True, scope="module")
def _short_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 8)
        patch.setattr(loops, "BLOCK", 8)
        yield


@functools.cache
def compiled(backend):
    """Output and gradients for an array of a mask, which may be anything: one program for all examples."""

    def run(q, k, v, allowed, scale):
        def loss(q, k, v):
            out = attend(q, k, v, AttentionMask.explicit(allowed), scale=1.0, backend=backend.split()[0])[0]
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q * scale, k, v)
        return out, gradients

    limit = blockwise.MAX_BLOCKS
    blockwise.MAX_BLOCKS = 0 if backend.endswith("loops") else limit
    try:
        shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        mask = jax.ShapeDtypeStruct((B, 1, T, T), jnp.bool_)
        return jax.jit(run).lower(*arrays, mask, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    finally:
        blockwise.MAX_BLOCKS = limit


def draw(seed, share=0.6):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K)]
    return *arrays, rng.random((B, 1, T, T)) < share, rng


def run(backend, q, k, v, allowed, scale=1.0):
    return jax.tree.map(np.asarray, compiled(backend)(q, k, v, allowed, np.float32(scale)))


@pytest.mark.parametrize("backend", BACKENDS)
@settings
@hypothesis.given(seed=seeds)
def test_order_of_keys_means_nothing(backend, seed):
    q, k, v, allowed, rng = draw(seed)
    order = rng.permutation(T)
    out, (dq, dk, dv) = run(backend, q, k, v, allowed)
    other, (dq_other, dk_other, dv_other) = run(backend, q, k[:, order], v[:, order], allowed[..., order])
    pairs = [(out, other), (dq, dq_other), (dk[:, order], dk_other), (dv[:, order], dv_other)]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings
@hypothesis.given(seed=seeds)
def test_a_hidden_key_has_exactly_no_influence(backend, seed):
    q, k, v, allowed, rng = draw(seed)
    hidden = rng.random((B, T)) < 0.3
    allowed &= ~hidden[:, None, None, :]
    changed_k, changed_v = k.copy(), v.copy()
    changed_k[hidden], changed_v[hidden] = 1e3 * rng.normal(), -77.0
    out, (dq, dk, dv) = run(backend, q, k, v, allowed)
    other, (dq_other, dk_other, dv_other) = run(backend, q, changed_k, changed_v, allowed)
    for ours, theirs in [
        (out, other),
        (dq, dq_other),
        (dk[~hidden], dk_other[~hidden]),
        (dv[~hidden], dv_other[~hidden]),
    ]:
        np.testing.assert_array_equal(ours, theirs)
    assert not dk[hidden].any() and not dv[hidden].any()


@pytest.mark.parametrize("backend", BACKENDS)
@settings
@hypothesis.given(seed=seeds)
def test_rows_that_see_nothing_give_zeros_and_no_nan(backend, seed):
    q, k, v, allowed, rng = draw(seed, share=0.1)
    blind = ~allowed.any(-1)[:, 0]
    hypothesis.assume(blind.any())
    out, (dq, dk, dv) = run(backend, q, k, v, allowed, scale=float(rng.choice([1.0, 1e4])))
    assert not out[blind].any() and not dq[blind].any()
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("backend", BACKENDS)
@settings
@hypothesis.given(seed=seeds)
def test_weights_are_a_distribution(backend, seed):
    """Of constant values every mean is that constant, and no output leaves the values' range."""
    q, k, v, allowed, _ = draw(seed)
    allowed[..., 0] = True
    np.testing.assert_allclose(run(backend, q, k, np.full_like(v, 3.0), allowed)[0], 3.0, rtol=1e-5)
    out = run(backend, q, k, v, allowed)[0]
    assert out.max() <= v.max() + 1e-5 and out.min() >= v.min() - 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@settings
@hypothesis.given(seed=seeds)
def test_shifted_logits_change_nothing(backend, seed):
    """A vector added to every key adds one number to all logits of a query."""
    q, k, v, allowed, rng = draw(seed)
    shift = rng.normal(size=(B, 1, K, H)).astype(np.float32)
    np.testing.assert_allclose(run(backend, q, k + shift, v, allowed)[0], run(backend, q, k, v, allowed)[0], atol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings
@hypothesis.given(seed=seeds, prefix=st.integers(1, T - 1))
def test_a_causal_prefix_does_not_see_what_follows(backend, seed, prefix):
    q, k, v, _, rng = draw(seed)
    allowed = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, 1, T, T))
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[:, prefix:] = rng.normal(size=x[:, prefix:].shape)
    out, other = run(backend, q, k, v, allowed)[0], run(backend, *changed, allowed)[0]
    np.testing.assert_array_equal(out[:, :prefix], other[:, :prefix])


@pytest.mark.parametrize("backend", ["reference", "xla", "blockwise"])
def test_packed_documents_are_as_if_apart(backend):
    q, k, v, _, _ = draw(0)
    lengths = [7, 12, 5]
    segments = jnp.asarray(np.repeat([1, 2, 3], lengths)[None].repeat(B, 0))
    mask = AttentionMask.causal() & AttentionMask.segments(segments)
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    packed = attend(q, k, v, mask, backend=backend)[0]
    ends = np.cumsum(lengths)
    apart = [
        attend(*(x[:, end - length : end] for x in (q, k, v)), AttentionMask.causal(), backend="reference")[0]
        for end, length in zip(ends, lengths, strict=True)
    ]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "xla", "blockwise"])
def test_no_keys_at_all_give_zeros(backend):
    q, k, v = (jnp.ones((1, size, 2, 4)) for size in (3, 0, 0))
    out, weights = attend(q, k, v, backend=backend, return_weights=True)
    assert out.shape == (1, 3, 2, 4) and not out.any()
    assert weights.shape == (1, 2, 3, 0)


def test_integers_are_refused():
    q = jnp.ones((1, 2, 2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"q is int32 \(1, 2, 2, 4\)"):
        inspect.unwrap(attend)(q, q, q)
