"""Batches: which examples make up a step, prefetched to the device before they are needed.

The examples of global step s are a function of (seed, s) alone. A process takes its own rows of that batch, and
threads only prefetch: the numbers of devices, processes and threads do not change what a step sees, and starting at
any step costs the same.

Axes: B rows of a process's part of the batch, T positions.
"""

from __future__ import annotations

import abc
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np

from train.data.examples.buckets import Buckets
from train.data.examples.draws import Draws, draw_key
from train.data.examples.pack import Examples, Packing, with_lengths
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from transformer.errors import UserError

Batch = dict[str, np.ndarray]
"""The arrays of the objective, as the modules of `train.data.examples` describe them, and `example` [B] int64: which example a
row is, -1 for a row of padding, whose weights are 0 and whose label is -1."""

_ENDLESS = 1 << 62
_OnDevice = TypeVar("_OnDevice")


class ExampleMaker(Protocol):
    """What makes the batches: an objective."""

    def check_data(self, prepared: Prepared, length: int) -> None:
        """Raise a `UserError` unless the data suits it, with sequences of `length` tokens to predict."""

    def examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        """The examples of an array. Raises `UserError` if the packing does not suit, or there is too little text."""

    def buckets(self, array: TokenArray, length: int, batch_size: int, seed: int, *, shown: bool) -> Buckets:
        """The batches of an array with packing `pad`. Raises `UserError` where there are none."""


class Batches(abc.ABC):
    """The endless training batches of one process, by step."""

    def __init__(self, threads: int, prefetch: int) -> None:
        self._threads, self._prefetch = threads, prefetch

    @property
    @abc.abstractmethod
    def examples_per_epoch(self) -> int:
        """How many different examples there are, over all sources."""

    @property
    @abc.abstractmethod
    def efficiency(self) -> float:
        """The fraction of positions that hold a token of text; for pairs, on the target side."""

    @property
    @abc.abstractmethod
    def source_efficiency(self) -> float | None:
        """The same for the source, if there is one."""

    @abc.abstractmethod
    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of a global step, counted from 0."""

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches from `start_step` on, fetched ahead on threads. Close it to end the threads."""
        return fetch_ahead(self.batch, start_step, _ENDLESS, self._threads, self._prefetch)


class MixedBatches(Batches):
    """Rows drawn from all sources by weight: a batch mixes them."""

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
        super().__init__(threads, prefetch)
        self._sources = sources
        self._first_id = np.cumsum([0, *map(len, sources)])
        self._order = _order(sources, weights, seed)
        self._order[0]  # grain's setup on first use is not thread-safe
        self._batch_size = batch_size
        self._key = draw_key(seed, "train")
        self._rows = range(batch_size)[rows]

    @property
    def examples_per_epoch(self) -> int:
        return int(self._first_id[-1])

    @property
    def efficiency(self) -> float:
        return _mean([(len(source), source.efficiency) for source in self._sources])

    @property
    def source_efficiency(self) -> float | None:
        parts = [(len(source), source.source_efficiency) for source in self._sources]
        return _mean([(count, part) for count, part in parts if part is not None]) if parts[0][1] is not None else None

    def batch(self, step: int) -> Batch:
        draws = Draws(self._key, step * self._batch_size + np.array(self._rows, np.int64))
        return gather(self._sources, self._first_id, self._ids(step), draws)

    def _ids(self, step: int) -> np.ndarray:
        first = step * self._batch_size
        drawn = (self._order[first + row] for row in self._rows)
        return np.array([self._first_id[source] + example for source, example in drawn], np.int64)


class BucketedBatches(Batches):
    """One pair per row, pairs of similar length together; a batch comes from one source, which is drawn by weight."""

    def __init__(
        self, sources: list[Buckets], weights: list[float], *, seed: int, rows: slice, threads: int, prefetch: int
    ) -> None:
        """As for `MixedBatches`; the size of a batch is that of the buckets."""
        super().__init__(threads, prefetch)
        self._sources = sources
        self._first_id = np.cumsum([0, *map(len, sources)])
        self._order = _endless_order(len(sources), weights)
        self._order[0]
        self._rows = rows

    @property
    def examples_per_epoch(self) -> int:
        return int(self._first_id[-1])

    @property
    def efficiency(self) -> float:
        return _mean([(len(source), source.efficiency[1]) for source in self._sources])

    @property
    def source_efficiency(self) -> float:
        return _mean([(len(source), source.efficiency[0]) for source in self._sources])

    def batch(self, step: int) -> Batch:
        number, ordinal = self._order[step]
        source = self._sources[number]
        width, pairs = source.numbers(*divmod(int(ordinal), source.batches))
        return pairs_of(source, width, pairs[self._rows], self._first_id[number])


def train_batches(
    prepared: Prepared,
    config: DataConfig,
    *,
    batch_size: int,
    length: int,
    seed: int,
    objective: ExampleMaker,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The training batches of process `process_index`: global batches of `batch_size` sequences of `length` tokens.

    With a source, `length` is that of the target. Each source is reshuffled every epoch,
    and sources are mixed by weight. Raises `UserError` for a source shorter than one sequence, for data
    that does not suit the objective, and for a batch that the processes do not divide.
    """
    objective.check_data(prepared, length)
    weights = [source.weight for source in config.sources]
    rows = rows_of(batch_size, process_index, process_count)
    shown = process_index == 0
    if config.packing == "pad":
        buckets = [objective.buckets(array, length, batch_size, seed, shown=shown) for array in prepared.train]
        return BucketedBatches(buckets, weights, seed=seed, rows=rows, threads=config.workers, prefetch=config.prefetch)
    common = (prepared.tokenizer, config.packing, length)
    return MixedBatches(
        [objective.examples(array, *common, training=True, shown=shown) for array in prepared.train],
        weights,
        batch_size=batch_size,
        seed=seed,
        rows=rows,
        threads=config.workers,
        prefetch=config.prefetch,
    )


def prefetch_to_device(
    batches: Iterator[Batch], put: Callable[[Batch], _OnDevice], size: int = 2
) -> Generator[_OnDevice, None, None]:
    """`put` of each batch, called `size` batches ahead, so that a transfer runs while the previous step computes.

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


def rows_of(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that a process holds: an equal, contiguous part."""
    if batch_size % process_count:
        raise UserError(f"batch_size {batch_size} is not divisible by {process_count} processes; make it a multiple")
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _order(sources: list[Examples], weights: list[float], seed: int) -> Any:
    """The endless sequence of (source, example) to draw, as a `grain.MapDataset` with random access."""
    import grain

    shuffled = []
    for number, source in enumerate(sources):
        # A separate seed for each source: grain adds the epoch to it, so neighbouring seeds would share epochs.
        own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        indices = grain.MapDataset.range(len(source)).shuffle(seed=own_seed).repeat()
        shuffled.append(indices.map(lambda example, number=number: (number, example)))
    return grain.MapDataset.mix(shuffled, weights) if len(shuffled) > 1 else shuffled[0]


def _endless_order(sources: int, weights: list[float]) -> Any:
    """The endless sequence of (source, how often it was drawn before), with random access."""
    import grain

    counted = [
        grain.MapDataset.range(_ENDLESS).map(lambda ordinal, number=number: (number, ordinal))
        for number in range(sources)
    ]
    return grain.MapDataset.mix(counted, weights) if sources > 1 else counted[0]


def gather(sources: list[Examples], first_id: np.ndarray, ids: np.ndarray, draws: Draws) -> Batch:
    """The examples of global `ids` [B], whichever sources they belong to."""
    owner = np.searchsorted(first_id, ids, side="right") - 1
    most = max(source.most_documents for source in sources)
    if np.all(owner == owner[0]):
        return with_lengths(sources[owner[0]].gather(ids - first_id[owner[0]], draws), most) | {"example": ids}
    batch: Batch = {"example": ids}
    for number in np.unique(owner):
        rows = np.flatnonzero(owner == number)
        for name, part in sources[number].gather(ids[rows] - first_id[number], draws.rows(rows)).items():
            batch.setdefault(name, np.empty((len(ids), *part.shape[1:]), part.dtype))[rows] = part
    return with_lengths(batch, most)


def pairs_of(source: Buckets, width: int, pairs: np.ndarray, first_id: int) -> Batch:
    return with_lengths(source.gather(width, pairs), 1) | {"example": np.where(pairs < 0, -1, pairs + first_id)}


def _mean(parts: list[tuple[int, float]]) -> float:
    """The mean of values, weighted by their counts."""
    return sum(count * value for count, value in parts) / sum(count for count, _ in parts)


def fetch_ahead(
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
