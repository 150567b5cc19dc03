"""Tokenising a stream of documents on several threads, in order and in bounded memory."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from train.data.readers import Document
from train.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 1024
_BATCHES_PER_WORKER = 2
_LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"


def tokenised(
    tokenizers: Sequence[Tokenizer], documents: Iterable[Document], workers: int
) -> Iterator[tuple[Document, tuple[np.ndarray, ...]]]:
    """Each document with the token ids [n] of each of its sides, in the order given, whatever the number of `workers`.

    There is one tokenizer for each side. They release the GIL, so threads are enough, and nothing is copied between
    processes. No more than a few batches of text are in memory at once.
    """

    def encode(batch: list[Document]) -> list[tuple[np.ndarray, ...]]:
        sides = zip(*(document.sides for document in batch), strict=True)
        encoded = [tokenizer.encode_batch(texts) for tokenizer, texts in zip(tokenizers, sides, strict=True)]
        return list(zip(*encoded, strict=True))

    waiting: deque[tuple[list[Document], Future[list[tuple[np.ndarray, ...]]]]] = deque()
    with _library_threads_off(), ThreadPoolExecutor(workers, "tokenise") as pool:
        for batch in _batches(documents):
            waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) > workers * _BATCHES_PER_WORKER:
                yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())


def _finished(
    documents: list[Document], ids: Future[list[tuple[np.ndarray, ...]]]
) -> Iterator[tuple[Document, tuple[np.ndarray, ...]]]:
    return zip(documents, ids.result(), strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document.sides))
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _library_threads_off() -> Iterator[None]:
    """Keep `tokenizers` from adding threads of its own to ours. It reads the environment at every call."""
    before = os.environ.get(_LIBRARY_THREADS)
    os.environ[_LIBRARY_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LIBRARY_THREADS]
        else:
            os.environ[_LIBRARY_THREADS] = before
