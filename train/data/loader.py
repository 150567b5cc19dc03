"""Batches: which examples make up a step, and having them ready, and on the device, before they are needed.

The examples of global step s are a function of (seed, s) alone. A process takes its own rows of that batch, and
threads only fetch ahead: neither the number of devices, processes nor threads changes what a step sees, and to begin
at a step costs the same whichever it is.

Axes: B rows of a process's part of the batch, T positions.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import numpy as np

from train.data.pack import Examples, examples
from train.data.prepare import DataConfig
from train.data.store import Prepared
from transformer.errors import UserError

Batch = dict[str, np.ndarray]
"""The arrays of `train.data.pack`, and `example` [B] int64: which example a row is, -1 for a row of padding."""

_ENDLESS = 1 << 62
_OnDevice = TypeVar("_OnDevice")


class Batches:
    """The endless training batches of one process, by step."""

    def __init__(
        self,
        sources: list[Examples],
        weights: list[float],
        *,
        batch_size: int,
        seed: int,
        rows: slice,
        threads: int,
        prefetch: int,
    ) -> None:
        """Draws from `sources` by `weights`; yields the `rows` of each global batch of `batch_size`."""
        self._sources = sources
        self._first_id = np.cumsum([0, *map(len, sources)])
        self._order = _order(sources, weights, seed)
        self._order[0]  # what grain sets up on first use is not made for several threads at once
        self._batch_size = batch_size
        self._rows = range(batch_size)[rows]
        self._threads = threads
        self._prefetch = prefetch

    @property
    def examples_per_epoch(self) -> int:
        """How many different examples there are, over all sources."""
        return int(self._first_id[-1])

    @property
    def efficiency(self) -> float:
        """The part of all positions of all examples that have a target."""
        positions = sum(len(source) for source in self._sources)
        return sum(source.efficiency * len(source) for source in self._sources) / positions

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of a global step, counted from 0."""
        return _gather(self._sources, self._first_id, self._ids(step))

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches from `start_step` on, fetched ahead on threads. Close it to end the threads."""
        return _fetch_ahead(self.batch, start_step, _ENDLESS, self._threads, self._prefetch)

    def _ids(self, step: int) -> np.ndarray:
        first = step * self._batch_size
        drawn = (self._order[first + row] for row in self._rows)
        return np.array([self._first_id[source] + example for source, example in drawn], np.int64)


class EvaluationBatches:
    """The validation examples of one process, each once and in order. `len` is the number of batches."""

    def __init__(
        self,
        sources: list[Examples],
        *,
        batch_size: int,
        rows: slice,
        threads: int,
        prefetch: int,
        max_batches: int | None,
    ) -> None:
        """As for `Batches`; `max_batches` ends early."""
        self._sources = sources
        self._first_id = np.cumsum([0, *map(len, sources)])
        self._batch_size = batch_size
        self._rows = range(batch_size)[rows]
        self._threads = threads
        self._prefetch = prefetch
        self._len = -(-int(self._first_id[-1]) // batch_size)
        if max_batches is not None:
            self._len = min(self._len, max_batches)

    def __len__(self) -> int:
        return self._len

    def batch(self, index: int) -> Batch:
        """This process's rows of one batch. Rows past the last example have weight 0, so that all shapes are equal."""
        ids = index * self._batch_size + np.array(self._rows, np.int64)
        inside = ids < self._first_id[-1]
        batch = _gather(self._sources, self._first_id, np.where(inside, ids, 0))
        batch["weights"] *= inside[:, None]
        batch["example"] = np.where(inside, ids, -1)
        return batch

    def __iter__(self) -> Generator[Batch, None, None]:
        return _fetch_ahead(self.batch, 0, len(self), self._threads, self._prefetch)


def train_batches(
    prepared: Prepared,
    config: DataConfig,
    *,
    batch_size: int,
    length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The training batches of process `process_index`: global batches of `batch_size` sequences of `length` tokens.

    Each source is shuffled anew every time all of it has been seen, and sources are mixed by weight. Raises
    `UserError` for a source shorter than one sequence and for a batch that the processes do not divide.
    """
    return Batches(
        [examples(array, config.packing, length, training=True) for array in prepared.train],
        [source.weight for source in config.sources],
        batch_size=batch_size,
        seed=seed,
        rows=_rows(batch_size, process_index, process_count),
        threads=config.workers,
        prefetch=config.prefetch,
    )


def evaluation_batches(
    prepared: Prepared,
    config: DataConfig,
    *,
    batch_size: int,
    length: int,
    process_index: int = 0,
    process_count: int = 1,
    max_batches: int | None = None,
) -> EvaluationBatches:
    """The validation batches of one process, as `train_batches`. Every validation token is predicted once.

    Raises `UserError` if no validation text was prepared.
    """
    if not prepared.validation:
        raise UserError("no validation text: set data.validation_fraction above 0, or give data.validation a source")
    return EvaluationBatches(
        [examples(array, config.packing, length, training=False) for array in prepared.validation],
        batch_size=batch_size,
        rows=_rows(batch_size, process_index, process_count),
        threads=config.workers,
        prefetch=config.prefetch,
        max_batches=max_batches,
    )


def prefetch_to_device(
    batches: Iterator[Batch], put: Callable[[Batch], _OnDevice], size: int = 2
) -> Generator[_OnDevice, None, None]:
    """`put` of each batch, called `size` batches ahead: a transfer goes on while the step before it computes.

    `put` starts a transfer without waiting for it, as `jax.device_put` and `jax.make_array_from_process_local_data`
    do. Closing this iterator closes `batches`.
    """
    waiting: deque[_OnDevice] = deque()
    try:
        waiting.extend(put(batch) for batch in itertools.islice(batches, size))
        while waiting:
            yield waiting.popleft()
            waiting.extend(put(batch) for batch in itertools.islice(batches, 1))
    finally:
        close: Any = getattr(batches, "close", None)
        if close is not None:
            close()


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that a process holds: an equal, contiguous part."""
    if batch_size % process_count:
        raise UserError(f"a batch of {batch_size} does not divide by {process_count} processes; make it a multiple")
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _order(sources: list[Examples], weights: list[float], seed: int) -> Any:
    """The endless sequence of (source, example) to draw, as a `grain.MapDataset` found by place, not by replay."""
    import grain

    shuffled = []
    for number, source in enumerate(sources):
        # A seed of its own for each source: grain adds the epoch to it, so neighbouring seeds would share epochs.
        own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        indices = grain.MapDataset.range(len(source)).shuffle(seed=own_seed).repeat()
        shuffled.append(indices.map(lambda example, number=number: (number, example)))
    return grain.MapDataset.mix(shuffled, weights) if len(shuffled) > 1 else shuffled[0]


def _gather(sources: list[Examples], first_id: np.ndarray, ids: np.ndarray) -> Batch:
    """The examples of global `ids` [B], whichever sources they belong to."""
    owner = np.searchsorted(first_id, ids, side="right") - 1
    if np.all(owner == owner[0]):
        return sources[owner[0]].gather(ids - first_id[owner[0]]) | {"example": ids}
    batch: Batch = {"example": ids}
    for number in np.unique(owner):
        rows = np.flatnonzero(owner == number)
        for name, part in sources[number].gather(ids[rows] - first_id[number]).items():
            batch.setdefault(name, np.empty((len(ids), *part.shape[1:]), part.dtype))[rows] = part
    return batch


def _fetch_ahead(
    fetch: Callable[[int], Batch], start: int, stop: int, threads: int, prefetch: int
) -> Generator[Batch, None, None]:
    """`fetch` of start, start + 1, ..., in order, up to `prefetch` of them ahead."""
    import grain

    options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
    batches = iter(grain.MapDataset.range(start, stop).map(fetch).to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()
