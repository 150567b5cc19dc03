"""Batches: a step's examples depend on the seed and the step alone, and evaluation sees everything once."""

from __future__ import annotations

import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.evaluation import evaluation_batches
from train.data.loader import Batches, prefetch_to_device, train_batches
from train.data.prepared.prepare import DataConfig, prepare
from train.data.prepared.store import Meta, Prepared, TokenArray
from train.data.sources.source_config import FilesSource, StdlibSource
from train.data.tokenization.tokenizer import ByteTokenizer
from train.objectives import Causal
from transformer.errors import UserError

CAUSAL = Causal()
LENGTH = 8
META = Meta(
    format_version=1,
    fingerprint="",
    python="",
    dtype="<u2",
    vocab_size=256,
    end_of_text=0,
    train=(),
    validation=(),
    gzip_bytes=None,
    xz_bytes=None,
)


def token_array(name: str, tokens: int, first: int = 1) -> TokenArray:
    """One array of `tokens` predicted tokens, in documents of 1 to 20."""
    sizes = np.random.default_rng(tokens).integers(1, 20, tokens)
    offsets = np.minimum(np.cumsum([1, *sizes]), tokens + 1)
    offsets = offsets[: np.searchsorted(offsets, tokens + 1) + 1]
    return TokenArray(name, first + np.arange(tokens + 1, dtype=np.uint32), offsets)


PREPARED = Prepared(
    Path(),
    META,
    ByteTokenizer(),
    train=(token_array("small", 205), token_array("large", 1003, first=10_000)),
    validation=(token_array("held out", 101), token_array("held out too", 60)),
)


def config_of(*weights: float, **settings) -> DataConfig:
    return DataConfig(sources=tuple(StdlibSource(weight=weight) for weight in weights), **settings)


def batches_of(
    *weights: float, seed: int = 0, batch_size: int = 6, process: tuple[int, int] = (0, 1), **settings
) -> Batches:
    return train_batches(
        PREPARED,
        config_of(*weights or (1.0, 3.0), **settings),
        batch_size=batch_size,
        length=LENGTH,
        seed=seed,
        process_index=process[0],
        process_count=process[1],
        objective=CAUSAL,
    )


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
        assert value.dtype == other[name].dtype


@pytest.mark.parametrize("packing", ["chunk", "documents"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**9),
    processes=st.sampled_from([1, 2, 3, 6]),
    workers=st.integers(1, 3),
    prefetch=st.integers(1, 3),
)
def test_a_step_depends_on_seed_and_step_alone(
    packing, seed: int, step: int, processes: int, workers: int, prefetch: int
) -> None:
    expected = batches_of(seed=seed, packing=packing).batch(step)
    parts = []
    for index in range(processes):
        process = batches_of(
            seed=seed, process=(index, processes), packing=packing, num_workers=workers, prefetch=prefetch
        )
        iterator = process.iterate(max(0, step - 1))
        fetched = [next(iterator) for _ in range(1 + (step > 0))]
        iterator.close()
        assert_same(fetched[-1], process.batch(step))
        parts.append(fetched[-1])
    assert_same({name: np.concatenate([part[name] for part in parts]) for name in expected}, expected)


def test_every_epoch_shows_every_example_once_in_a_new_order() -> None:
    prepared = Prepared(Path(), META, ByteTokenizer(), (PREPARED.train[1],), ())
    batches = train_batches(prepared, config_of(1.0), batch_size=5, length=LENGTH, seed=3, objective=CAUSAL)
    count = batches.examples_per_epoch
    assert count == 125
    ids = np.concatenate([batches.batch(step)["example"] for step in range(3 * count // 5)]).reshape(3, count)
    assert [sorted(epoch) for epoch in ids.tolist()] == [list(range(count))] * 3
    assert len({tuple(epoch) for epoch in ids.tolist()}) == 3
    assert tuple(ids[0]) != tuple(range(count))
    other_seed = train_batches(prepared, config_of(1.0), batch_size=5, length=LENGTH, seed=4, objective=CAUSAL)
    assert other_seed.batch(0)["example"].tolist() != ids[0, :5].tolist()


def test_sources_are_mixed_by_weight() -> None:
    batches = batches_of(1.0, 3.0)
    ids = np.concatenate([batches.batch(step)["example"] for step in range(200)])
    assert np.mean(ids < len(PREPARED.train[0].tokens) // LENGTH) == pytest.approx(0.25, abs=0.01)


def test_the_example_ids_name_the_rows() -> None:
    batch = batches_of(1.0, 3.0).batch(7)
    small = 205 // LENGTH
    for row, example in enumerate(batch["example"]):
        begin = 1 + example * LENGTH if example < small else 10_000 + (example - small) * LENGTH
        np.testing.assert_array_equal(batch["tokens"][row], begin + np.arange(LENGTH))
        np.testing.assert_array_equal(batch["targets"][row], begin + 1 + np.arange(LENGTH))
    assert {name: value.dtype.name for name, value in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "example": "int64",
    }


@pytest.mark.parametrize("packing", ["chunk", "documents"])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_token_once_in_batches_of_one_shape(packing, processes: int) -> None:
    targets, shapes, examples = [], set(), []
    for index in range(processes):
        batches = evaluation_batches(
            PREPARED,
            config_of(1.0, 1.0, packing=packing),
            batch_size=4,
            length=LENGTH,
            process_index=index,
            process_count=processes,
            objective=CAUSAL,
        )
        fetched = list(batches)
        assert len(fetched) == len(batches)
        for batch in fetched:
            targets.append(batch["targets"][batch["weights"] > 0])
            shapes.add(batch["tokens"].shape)
            examples += batch["example"].tolist()
            assert np.all(batch["weights"][batch["example"] < 0] == 0)
    expected = np.concatenate([array.tokens[1:] for array in PREPARED.validation])
    np.testing.assert_array_equal(np.sort(np.concatenate(targets)), np.sort(expected))
    assert shapes == {(4 // processes, LENGTH)}
    shown = sorted(example for example in examples if example >= 0)
    assert shown == list(range(len(shown)))


@pytest.mark.parametrize("packing", ["chunk", "documents"])
def test_from_files_to_batches(corpus: Path, packing) -> None:
    sources = tuple(
        FilesSource(path=f"{corpus}/{half}*.txt", weight=weight) for half, weight in zip("012", (1, 2, 3), strict=True)
    )
    config = DataConfig(sources=sources, validation_fraction=0.4, packing=packing)
    for _ in range(2):  # made, then found
        prepared = prepare(config, progress=False)
        evaluation = list(evaluation_batches(prepared, config, batch_size=4, length=64, objective=CAUSAL))
        assert sum(batch["weights"].sum() for batch in evaluation) == prepared.meta.tokens("validation")
        batches = train_batches(prepared, config, batch_size=6, length=64, seed=1, objective=CAUSAL)
        assert 0.9 < batches.efficiency <= 1
        text = prepared.tokenizer.decode(batches.batch(0)["tokens"].reshape(-1))
        assert "alpha" in text
        assert "Grüße" in text


def test_evaluation_can_end_early_and_needs_text() -> None:
    batches = evaluation_batches(
        PREPARED, config_of(1.0, 1.0), batch_size=4, length=LENGTH, max_batches=2, objective=CAUSAL
    )
    whole = evaluation_batches(PREPARED, config_of(1.0, 1.0), batch_size=4, length=LENGTH, objective=CAUSAL)
    assert len(batches) == 2 < len(whole)
    for one, other in zip(batches, whole, strict=False):
        np.testing.assert_array_equal(one["example"], other["example"])
    without = Prepared(Path(), META, ByteTokenizer(), PREPARED.train, ())
    with pytest.raises(UserError, match="no validation text"):
        evaluation_batches(without, config_of(1.0, 1.0), batch_size=4, length=LENGTH, objective=CAUSAL)


def test_a_batch_that_the_processes_do_not_divide() -> None:
    with pytest.raises(UserError, match="batch_size 6 is not divisible by 4 processes"):
        batches_of(process=(0, 4))


def test_a_source_shorter_than_one_sequence() -> None:
    with pytest.raises(UserError, match="small: 205 tokens are fewer than one sequence of 206"):
        train_batches(PREPARED, config_of(1.0, 1.0), batch_size=2, length=206, seed=0, objective=CAUSAL)


def test_batches_are_put_on_the_device_ahead_and_threads_end() -> None:
    put: list[int] = []

    def device_put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        put.append(int(batch["example"][0]))
        return jax.device_put({name: value for name, value in batch.items() if name != "example"})

    batches = batches_of(num_workers=2)
    before = threading.active_count()
    iterator = prefetch_to_device(batches.iterate(5), device_put)
    first = next(iterator)
    assert isinstance(first["tokens"], jax.Array)
    np.testing.assert_array_equal(first["tokens"], batches.batch(5)["tokens"])
    assert len(put) == 2
    np.testing.assert_array_equal(next(iterator)["tokens"], batches.batch(6)["tokens"])
    assert len(put) == 3
    iterator.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=10)
    assert threading.active_count() <= before


def test_a_finite_iterator_is_put_to_its_end() -> None:
    batches = evaluation_batches(
        PREPARED, config_of(1.0, 1.0), batch_size=4, length=LENGTH, max_batches=3, objective=CAUSAL
    )
    put = [batch["example"][0] for batch in prefetch_to_device(iter(batches), lambda batch: batch)]
    assert put == [batch["example"][0] for batch in batches] and len(put) == 3
