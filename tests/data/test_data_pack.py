"""Packing: every token is predicted once, and documents that are kept apart stay apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.examples.pack import Chunked, Documents, examples, fit_documents
from train.data.prepared.store import TokenArray
from transformer.errors import UserError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def token_array(sizes: list[int], index_path: Path | None = None) -> TokenArray:
    """Documents of these sizes, ends of text (0) included; every other token is its own place in the array."""
    offsets = np.cumsum([1, *sizes])
    tokens = np.arange(offsets[-1], dtype=np.uint16)
    tokens[[0, *(offsets[1:] - 1)]] = 0
    return TokenArray("test", tokens, offsets, index_path)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, length=st.integers(2, 17))
def test_chunks_predict_each_token_once(sizes: list[int], length: int) -> None:
    array = token_array(sizes)
    chunks = Chunked(array, length, keep_rest=True)
    batch = chunks.gather(np.arange(len(chunks)))
    counted = batch["weights"] > 0
    np.testing.assert_array_equal(batch["targets"][counted], array.tokens[1:])
    np.testing.assert_array_equal(batch["tokens"][counted], array.tokens[:-1])
    assert chunks.efficiency == pytest.approx(counted.mean())

    dropped = Chunked(array, length)
    assert len(dropped) == (len(array.tokens) - 1) // length
    if len(dropped):
        whole = dropped.gather(np.arange(len(dropped)))
        assert np.all(whole["weights"] == 1)
        np.testing.assert_array_equal(whole["tokens"], batch["tokens"][: len(dropped)])


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, length=st.integers(2, 17))
def test_documents_predict_each_token_once_and_stay_apart(sizes: list[int], length: int) -> None:
    array = token_array(sizes)
    packed = Documents(array, length)
    batch = packed.gather(np.arange(len(packed)))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "tokens": ((len(packed), length), "int32"),
        "targets": ((len(packed), length), "int32"),
        "weights": ((len(packed), length), "float32"),
        "segments": ((len(packed), length), "int32"),
        "positions": ((len(packed), length), "int32"),
    }
    counted = batch["weights"] > 0
    assert sorted(batch["targets"][counted]) == sorted(array.tokens[1:])
    assert packed.efficiency == pytest.approx(counted.mean())
    np.testing.assert_array_equal(batch["segments"] > 0, counted)

    document_of = np.searchsorted(array.offsets, np.arange(len(array.tokens)), side="right") - 1
    for row in range(len(packed)):
        segments = batch["segments"][row]
        assert set(segments) - {0} == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            np.testing.assert_array_equal(batch["positions"][row][inside], np.arange(inside.sum()))
            targets, inputs = batch["targets"][row][inside], batch["tokens"][row][inside]
            np.testing.assert_array_equal(targets[:-1], inputs[1:])
            assert np.all(targets[:-1] != 0)  # an end of text is the last target of its segment
            assert len(set(document_of[targets[targets != 0]])) <= 1


def test_whole_documents_stay_whole_and_fill_the_examples() -> None:
    sizes = np.random.default_rng(0).integers(1, 64, 2000)
    packed = Documents(token_array(sizes.tolist()), 64)
    assert packed.efficiency > 0.97
    index = fit_documents(np.cumsum([1, *sizes]), 64)
    assert sorted(index[:, 1]) == sorted(sizes)
    assert np.bincount(index[:, 2], index[:, 1]).max() <= 64


def test_the_index_is_stored_next_to_the_tokens(tmp_path: Path) -> None:
    array = token_array([5, 9, 3], tmp_path / "0")
    made = Documents(array, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["0.fit1-8.npy"]
    kept = Documents(array, 8)
    first, second = (packed.gather(np.arange(len(made))) for packed in (made, kept))
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)

    unwritable = token_array([5, 9, 3], tmp_path / "missing" / "0")
    assert len(Documents(unwritable, 8)) == len(made)


@pytest.mark.parametrize("packing", ["chunk", "documents"])
def test_less_than_one_sequence_is_refused_for_training_only(packing) -> None:
    array = token_array([5, 9])
    with pytest.raises(UserError, match="test: 14 tokens are fewer than one sequence of 15; add text"):
        examples(array, packing, 15, training=True)
    assert len(examples(array, packing, 14, training=True)) == 1
    assert len(examples(array, packing, 15, training=False)) == 1
