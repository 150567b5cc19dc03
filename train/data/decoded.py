"""The examples of a batch as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from train.data.loader import Batch
from train.data.prepared.store import Prepared
from train.data.tokenization.tokenizer import Tokenizer

SIDES = ("", "source_", "other_")
"""Prefixes of the names of a batch's arrays."""


def tokenizer_of(side: str, prepared: Prepared) -> Tokenizer:
    """The tokenizer of one of `SIDES`."""
    return prepared.tokenizer if side or not prepared.pairs else prepared.target_tokenizer


def segments_of(batch: Batch, side: str, row: int) -> Iterator[tuple[str, np.ndarray]]:
    """The ids of each segment of a row, padding left out, with its number where there are several."""
    ids = batch[f"{side}tokens"][row]
    if (segments := batch.get(f"{side}segments")) is None:
        yield "", ids
        return
    numbers = [number for number in np.unique(segments[row]) if number > 0]
    for number in numbers:
        yield str(number) if len(numbers) > 1 else "", ids[segments[row] == number]


def texts_of(batch: Batch, row: int, prepared: Prepared) -> list[str]:
    """The texts of a row: each segment of each side."""
    return [
        text_of(tokenizer_of(side, prepared), ids)
        for side in SIDES
        if f"{side}tokens" in batch
        for _, ids in segments_of(batch, side, row)
    ]


def text_of(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> str:
    """The text of ids, with special tokens by their names."""
    names = {id: name for name, id in tokenizer.special_ids.items()}
    parts: list[str] = []
    run: list[int] = []
    for id in [*map(int, ids), None]:
        if id is not None and id not in names:
            run.append(id)
            continue
        if run:
            parts.append(tokenizer.decode(run))
            run = []
        if id is not None:
            parts.append(names[id])
    return "".join(parts)
