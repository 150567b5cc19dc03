"""What cannot be meant is refused with a `ValueError` that names it; what is unusual is right all the same."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.alignment.sparse_softmax import sparse_attention
from transformer.attention.common import headless_mask
from transformer.attention.dispatch import attend
from transformer.attention.spec.mask import AttentionMask
from transformer.mixers.state import KVCache

Q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 4)), jnp.float32)
call = inspect.unwrap(attend)


def test_every_mechanism_asks_a_mask_mod_for_each_head_and_row():
    by_head = AttentionMask.mod(lambda b, h, q, k: k <= h)
    np.testing.assert_array_equal(
        sparse_attention(Q, Q, Q, by_head, normalizer="softmax")[1] > 0,
        attend(Q, Q, Q, by_head, return_weights=True)[1] > 0,
    )
    by_row = headless_mask(AttentionMask.mod(lambda b, h, q, k: k <= b), 2, 3, 3)
    np.testing.assert_array_equal(by_row.sum(-1), [[1, 1, 1], [2, 2, 2]])
    with pytest.raises(ValueError, match="num_heads must be given"):
        by_head.materialize(3, 3)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda: AttentionMask.causal(jnp.arange(3)), "3 rows"),
        (lambda: AttentionMask.prefix(jnp.arange(3)), "3 rows"),
        (lambda: AttentionMask.window(left=2).shift_queries(jnp.arange(3)), "3 rows"),
        (lambda: AttentionMask.causal(jnp.zeros((2, 1), jnp.int32)), "offset is int32"),
        (lambda: AttentionMask.causal(jnp.array([1.5, 2.0])), "offset is float32"),
        (lambda: AttentionMask.prefix(2.5), "length is 2.5"),
        (lambda: AttentionMask.window(left=2.5), "left=2.5"),
        (lambda: AttentionMask.window(left=0), "left=0"),
        (lambda: AttentionMask.padding([[True]]), "list"),
        (
            lambda: AttentionMask.padding(jnp.ones((2, 3), bool)) | AttentionMask.padding(jnp.ones((2, 9), bool)),
            "3 and 9",
        ),
        (lambda: AttentionMask.segments(jnp.ones((2, 3), jnp.int32), jnp.ones((3, 3), jnp.int32)), "2 rows"),
        (lambda: jnp.ones((3, 3), bool), "AttentionMask"),
    ],
)
def test_invalid_masks_are_refused(monkeypatch, mask, message):
    for name in ("causal", "prefix", "window", "padding", "segments"):
        monkeypatch.setattr(AttentionMask, name, staticmethod(inspect.unwrap(getattr(AttentionMask, name))))

    def run():
        call(Q, Q, Q, mask())

    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("number", [np.int64(1), jnp.int32(1)])
def test_whole_numbers_of_any_kind(number):
    plain = attend(Q, Q, Q, AttentionMask.causal(1))[0]
    np.testing.assert_allclose(attend(Q, Q, Q, inspect.unwrap(AttentionMask.causal)(number))[0], plain, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias_BNTS": jnp.ones((1, 1, 3, 3), bool)}, "bias is bool"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap=0.0"),
        ({"dropout_rate": 1.5}, "dropout_rate=1.5"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
        ({"scale": jnp.float32(1)}, "scale is a"),
        ({"return_weights": 1}, "return_weights=1"),
        ({"return_weights": (2,)}, "head 2 does not exist"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        call(Q, Q, Q, **options)


def test_arrays_of_the_wrong_type_or_shape_are_refused():
    with pytest.raises(ValueError, match="q is a list"):
        call([1.0], Q, Q)
    with pytest.raises(ValueError, match="expected one type"):
        call(Q, Q.astype(jnp.bfloat16), Q)
    with pytest.raises(ValueError, match="heads and head_dim"):
        call(Q, Q[:, :, :0], Q[:, :, :0])


def test_nothing_to_do_gives_nothing_of_the_right_shape():
    out, weights = attend(Q, Q[:, :0], Q[:, :0], return_weights=(1,))
    assert out.shape == Q.shape and weights.shape == (2, 1, 3, 0)
    assert attend(Q[:0], Q[:0], Q[:0])[0].shape == (0, 3, 2, 4)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_a_row_of_minus_infinity_is_a_row_with_no_key(backend):
    bias = jnp.zeros((1, 1, 3, 3)).at[:, :, 2].set(-jnp.inf)
    out, gradient = jax.value_and_grad(lambda q: attend(q, Q, Q, None, bias, backend=backend)[0].sum())(Q)
    assert np.isfinite(out) and np.isfinite(gradient).all()
    assert not attend(Q, Q, Q, None, bias, backend=backend)[0][:, 2].any()


def test_a_full_cache_is_refused():
    cache = KVCache.empty(2, 2, 2, 4, jnp.float32)
    with pytest.raises(ValueError, match="room for 2"):
        cache.append(Q, Q)


def test_a_mesh_of_another_kind_is_named():
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh), nnx.logical_axis_rules((("seq", "sequence"),)), pytest.raises(ValueError, match="Auto"):
        attend(*[jnp.ones((1, 16, 1, 4))] * 3, backend="ring")
