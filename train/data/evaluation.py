"""Batches of the validation text: which examples an evaluation sees, and in which order.

The order is the same for every run and step, and its beginning is a fair sample: all evaluations of a run see the same examples.
"""

from __future__ import annotations

import abc
from collections.abc import Generator, Sequence

import numpy as np

from train.data.examples.buckets import Buckets
from train.data.examples.draws import Draws, draw_key
from train.data.examples.pack import Examples
from train.data.loader import Batch, ExampleMaker, fetch_ahead, gather, pairs_of, rows_of
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared
from transformer.errors import UserError

_VALIDATION_KEY = draw_key(0, "validation")  # one seed for all runs, so that they are scored on the same examples


class EvaluationBatches(abc.ABC):
    """The validation examples of one process, each once. `len` is the number of batches.

    A batch is of one source, and the sources take turns by their sizes, so that the first few batches are a fair sample. The
    order is the same for every run and step.
    """

    def __init__(self, counts: Sequence[int], threads: int, prefetch: int, max_batches: int | None) -> None:
        """Of `counts` batches of the sources, `max_batches` at most are used."""
        sources = np.repeat(np.arange(len(counts)), counts)
        within = np.concatenate([np.arange(count) for count in counts])
        turns = np.argsort((within + 0.5) / np.asarray(counts)[sources], kind="stable")
        self.sources: list[int] = sources[turns][:max_batches].tolist()
        """The number of each batch's source."""
        self._within = within[turns]
        self._threads, self._prefetch = threads, prefetch

    def __len__(self) -> int:
        return len(self.sources)

    @abc.abstractmethod
    def batch(self, index: int) -> Batch:
        """This process's rows of one batch."""

    def __iter__(self) -> Generator[Batch, None, None]:
        return fetch_ahead(self.batch, 0, len(self), self._threads, self._prefetch)


class ShuffledEvaluation(EvaluationBatches):
    """The examples of each source in a fixed random order, in batches of one shape; those of one document stay together."""

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
        """As for `MixedBatches`; `max_batches` ends early."""
        self._examples = sources
        self._first_id = np.cumsum([0, *map(len, sources)])
        self._orders = [_shuffled(source, number) for number, source in enumerate(sources)]
        self._batch_size = batch_size
        self._rows = range(batch_size)[rows]
        super().__init__([-(-len(source) // batch_size) for source in sources], threads, prefetch, max_batches)

    def batch(self, index: int) -> Batch:
        """This process's rows of one batch. Rows after the last example have weight 0, so that all shapes are equal."""
        number = self.sources[index]
        order = self._orders[number]
        places = self._within[index] * self._batch_size + np.array(self._rows, np.int64)
        inside = places < len(order)
        ids = self._first_id[number] + order[np.where(inside, places, 0)]
        batch = gather(self._examples, self._first_id, ids, Draws(_VALIDATION_KEY, ids))
        batch["weights"] *= inside[:, None]
        if "labels" in batch:
            batch["labels"][~inside] = -1
        batch["example"] = np.where(inside, ids, -1)
        return batch


class BucketedEvaluation(EvaluationBatches):
    """The pairs in batches of similar length, in shuffled order."""

    def __init__(
        self, sources: list[Buckets], *, rows: slice, threads: int, prefetch: int, max_batches: int | None
    ) -> None:
        """As for `ShuffledEvaluation`."""
        self._buckets = sources
        self._first_id = np.cumsum([0, *map(len, sources)])
        self._rows = rows
        super().__init__([source.batches for source in sources], threads, prefetch, max_batches)

    def batch(self, index: int) -> Batch:
        number = self.sources[index]
        source = self._buckets[number]
        width, pairs = source.numbers(0, int(self._within[index]))
        return pairs_of(source, width, pairs[self._rows], self._first_id[number])


def _shuffled(source: Examples, number: int) -> np.ndarray:
    """All examples of a source in random order, those of one document together."""
    random = np.random.Generator(np.random.Philox(key=np.array([_VALIDATION_KEY, number], np.uint64)))
    documents = getattr(source, "documents", None)
    if documents is None:
        return random.permutation(len(source))
    place = random.permutation(int(documents.max(initial=-1)) + 1)
    return np.argsort(place[documents], kind="stable")


def evaluation_batches(
    prepared: Prepared,
    config: DataConfig,
    *,
    batch_size: int,
    length: int,
    objective: ExampleMaker,
    process_index: int = 0,
    process_count: int = 1,
    max_batches: int | None = None,
) -> EvaluationBatches:
    """The validation batches of one process, as `train_batches`.

    Objectives that predict all tokens (causal, seq2seq) predict every validation token once. Random draws of an objective
    are the same for an example every time; span corruption leaves out what does not fill a sequence. Raises `UserError` if no
    validation text was prepared.
    """
    if not prepared.validation:
        raise UserError("no validation text: set data.validation_fraction above 0, or give data.validation a source")
    objective.check_data(prepared, length)
    rows = rows_of(batch_size, process_index, process_count)
    threads, prefetch, shown = config.workers, config.prefetch, process_index == 0
    if config.packing == "pad":
        buckets = [objective.buckets(array, length, batch_size, 0, shown=shown) for array in prepared.validation]
        return BucketedEvaluation(buckets, rows=rows, threads=threads, prefetch=prefetch, max_batches=max_batches)
    common = (prepared.tokenizer, config.packing, length)
    return ShuffledEvaluation(
        [objective.examples(array, *common, training=False, shown=shown) for array in prepared.validation],
        batch_size=batch_size,
        rows=rows,
        threads=threads,
        prefetch=prefetch,
        max_batches=max_batches,
    )
