"""Tokenises a stream of documents on several threads, in order and in bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, cast

import numpy as np

from train.data.prepared.label_arrays import NONE
from train.data.sources.records import Answers, Document
from train.data.tokenization.align import encode_with_places, encode_words, tokens_of_answer
from train.data.tokenization.chat import Chat
from train.data.tokenization.template_limits import TooSlow, Unusable
from train.data.tokenization.tokenizer import Tokenizer
from transformer.errors import UserError

_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 1024
_BATCHES_PER_WORKER = 2
SAID, REJECTED = 1, 2
"""The marks of a dialogue's tokens."""
_LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"


class Tokenised(NamedTuple):
    """A document as tokens."""

    document: Document
    sides: tuple[np.ndarray, ...]
    """The ids [n] of each of its sides."""
    marks: np.ndarray | None
    """For words with tags, the index of each word's first token [words]; for a question, the first and the last token [2] of
    its first answer; -1 if there is none. For a dialogue, one for each token [n]: `SAID` where the assistant writes it, and
    `REJECTED` in an answer that is not preferred, whose whole dialogue follows that with the preferred one."""
    refused: str = ""
    """Why the chat template does not render the dialogue, which has no tokens then; empty: it does."""


def tokenised(tokenizers: Sequence[Tokenizer], documents: Iterable[Document], workers: int) -> Iterator[Tokenised]:
    """Each document with its tokens, in the order given, whatever the number of `workers`.

    One tokenizer is for the first side, the other for the rest. They release the GIL, so threads suffice, and nothing
    is copied between processes. No more than a few batches of text are in memory at once.
    """

    def encode(batch: list[Document]) -> list[Tokenised]:
        return encode_documents(tokenizers, batch)

    waiting: deque[Future[list[Tokenised]]] = deque()
    with _library_threads_off(), ThreadPoolExecutor(workers, "tokenise") as pool:
        for batch in batches(documents, _BATCH_DOCUMENTS, _BATCH_CHARACTERS):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > workers * _BATCHES_PER_WORKER:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def encode_documents(tokenizers: Sequence[Tokenizer], documents: list[Document]) -> list[Tokenised]:
    """The tokens of documents of one kind."""
    if documents[0].messages:
        return _dialogues(tokenizers[0], documents)
    if documents[0].words is not None:
        words = encode_words(tokenizers[0], [document.words or () for document in documents])
        return [Tokenised(document, (ids,), firsts) for document, (ids, firsts) in zip(documents, words, strict=True)]
    first = tokenizers[0].encode_batch([document.text for document in documents])
    texts = [text for document in documents for text in document.sides[1:]]
    marks: list[np.ndarray | None] = [None] * len(documents)
    if isinstance(documents[0].label, Answers):
        placed = encode_with_places(tokenizers[-1], texts)
        marks = [_answer(document, places) for document, (_, places) in zip(documents, placed, strict=True)]
        others = iter([ids for ids, _ in placed])
    else:
        others = iter(tokenizers[-1].encode_batch(texts))
    return [
        Tokenised(document, (ids, *itertools.islice(others, len(document.sides) - 1)), mark)
        for document, ids, mark in zip(documents, first, marks, strict=True)
    ]


def _dialogues(tokenizer: Tokenizer, documents: list[Document]) -> list[Tokenised]:
    chat, found = Chat(tokenizer), []
    for document in documents:
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for answer in document.answers or ((),):
            try:
                ids, said = chat.tokens([*document.messages, *answer], document.tools)
            except TooSlow as error:
                # A document that is left out here would be another machine's: the data would not be the same.
                raise UserError(f"{document.id}: the chat template: {error}; simplify the template") from None
            except Unusable as error:
                found.append(Tokenised(document, (), None, f"the chat template refuses the dialogue: {error}"))
                break
            parts.append((ids, said * SAID + len(parts) * REJECTED))
        else:
            if len(parts) > 1:
                _unmark_beginning(*parts)
            ids, marks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            found.append(Tokenised(document, (ids,), marks))
    return found


def _unmark_beginning(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> None:
    """Take the mark `SAID` from what two dialogues have in common at their beginning."""
    shorter = min(len(one[0]), len(other[0]))
    differs = np.flatnonzero(one[0][:shorter] != other[0][:shorter])
    common = int(differs[0]) if len(differs) else shorter
    for _, marks in (one, other):
        marks[:common] &= ~SAID


def _answer(document: Document, places: np.ndarray) -> np.ndarray:
    texts, starts = cast("Answers", document.label)
    if not texts:
        return np.array([NONE, NONE], np.int32)
    return tokens_of_answer(places, starts[0], starts[0] + len(texts[0]))


def batches(documents: Iterable[Document], most: int, characters_enough: int) -> Iterator[list[Document]]:
    """The documents in successive parts: each ends with its `most`th document, or once it has `characters_enough`."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document.sides))
        if characters >= characters_enough or len(batch) >= most:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _library_threads_off() -> Iterator[None]:
    """Keep `tokenizers` from starting its own threads. It reads the environment at every call."""
    before = os.environ.get(_LIBRARY_THREADS)
    os.environ[_LIBRARY_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LIBRARY_THREADS]
        else:
            os.environ[_LIBRARY_THREADS] = before
