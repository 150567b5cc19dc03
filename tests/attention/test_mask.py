"""Masks say what they mean, alone and combined."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.attention.spec.mask import AttentionMask

T = 6


def dense(mask, num_queries=T, num_keys=T):
    return np.broadcast_to(mask.materialize(num_queries, num_keys), (1, 1, num_queries, num_keys))[0, 0]


def test_none_needs_no_array():
    assert AttentionMask.none().materialize(T, T) is None


def test_causal_is_lower_triangular():
    np.testing.assert_array_equal(dense(AttentionMask.causal()), np.tril(np.ones((T, T), bool)))


def test_causal_moved_sees_what_came_before():
    np.testing.assert_array_equal(
        dense(AttentionMask.causal().shift_queries(3), 2, T), [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    )


def test_offset_may_differ_by_row():
    allowed = AttentionMask.causal(jnp.array([0, 4])).materialize(1, T)
    np.testing.assert_array_equal(allowed[:, 0, 0], [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize(("left", "right"), [(0, 3), (2, None), (None, 1), (1, 2)])
def test_window(left, right):
    rows, columns = np.indices((T, T))
    expected = np.ones((T, T), bool)
    if left is not None:
        expected &= columns >= rows - left
    if right is not None:
        expected &= columns <= rows + right
    np.testing.assert_array_equal(dense(AttentionMask.window(left, right)), expected)


def test_segments_hide_other_documents_and_padding():
    segments = jnp.array([[1, 1, 2, 2, 0, 0]])
    expected = np.zeros((T, T), bool)
    expected[:2, :2] = expected[2:4, 2:4] = True
    np.testing.assert_array_equal(dense(AttentionMask.segments(segments)), expected)


def test_and_is_conjunction():
    valid = jnp.array([[True, False, True, True, True, True]])
    mask = AttentionMask.causal() & AttentionMask.padding(valid) & AttentionMask.window(left=2)
    expected = dense(AttentionMask.causal()) & np.asarray(valid) & dense(AttentionMask.window(left=2))
    np.testing.assert_array_equal(dense(mask), expected)


def test_causal_twice_is_causal_once():
    assert len((AttentionMask.causal() & AttentionMask.causal()).predicates) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttentionMask.window(left=-1),
        lambda: AttentionMask.window(left=0, right=0),
        lambda: AttentionMask.window(left=0),
        lambda: AttentionMask.mod(lambda b, h, q, k: q - k),
        lambda: AttentionMask.explicit(jnp.ones((2, 1, T, T), bool)).materialize(T, T, batch_size=3),
        lambda: inspect.unwrap(AttentionMask.padding)(jnp.ones((1, T))),
        lambda: inspect.unwrap(AttentionMask.segments)(jnp.ones((1, T))),
        lambda: inspect.unwrap(AttentionMask.explicit)(jnp.ones((T, T), bool)),
        lambda: AttentionMask.padding(jnp.ones((1, T + 1), bool)).materialize(T, T),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match=r"mask|window"):
        make()
