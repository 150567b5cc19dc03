"""`manyheads inspect-data`: the examples of a step, decoded, before a run or after it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.config import RunConfig
from train.data.loader import Batch, train_batches
from train.data.prepared.prepare import prepare
from train.data.prepared.store import Prepared
from train.data.tokenization.tokenizer import Tokenizer
from train.files import write_whole, writing
from train.run.begin import check_data
from transformer.errors import UserError

_SIDES = ("", "source_", "other_")
"""Prefixes of the names of a batch's arrays."""


def inspect_data(
    config: RunConfig, *, step: int = 1, rows: int = 4, other: RunConfig | None = None, out: Path | None = None
) -> bool:
    """Print the examples of a step: their ids, their text by segments, what is predicted, and their labels.

    Args:
        rows: how many of them.
        other: compare with the batch of another config, and print only the rows that differ.
        out: a file for all rows of the batch, arrays included, as one JSON object a line.

    Returns:
        Whether both batches are equal; True without `other`.

    Raises:
        UserError: data that cannot be read or does not fit, or no such step.
    """
    if step < 1:
        raise UserError(f"step: got {step}; allowed: 1 or more")
    prepared, batch = _batch_of(config, step)
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in batch.items() if name != "example")
    print(f"step {step}: {shapes}")
    numbers = list(range(len(batch["example"])))
    same = True
    if other is not None:
        differing = _differing(batch, _batch_of(other, step)[1])
        same = not differing
        print(f"rows that differ: {', '.join(map(str, differing)) or 'none'}")
        numbers = differing
    for number in numbers[:rows]:
        print("\n".join(_row(batch, number, prepared)))
    if out is not None:
        whole = [_as_data(batch, number, prepared, step) for number in range(len(batch["example"]))]
        lines = [json.dumps(row, ensure_ascii=False) for row in whole]
        with writing(out):
            write_whole(out, "".join(f"{line}\n" for line in lines))
    return same


def _batch_of(config: RunConfig, step: int) -> tuple[Prepared, Batch]:
    prepared = prepare(config.data)
    check_data(config, prepared)
    batches = train_batches(
        prepared, config.data, batch_size=config.batch_size, length=config.sequence_length, seed=config.seed,
        objective=config.objective.with_data(prepared),
    )  # fmt: skip
    return prepared, batches.batch(step - 1)


def _differing(one: Batch, other: Batch) -> list[int]:
    """The rows in which two batches differ; all where their arrays are others."""
    every = list(range(len(one["example"])))
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return every
    return [row for row in every if any(not np.array_equal(one[name][row], other[name][row]) for name in one)]


def _row(batch: Batch, row: int, prepared: Prepared) -> Iterator[str]:
    yield f"\nrow {row}, example {batch['example'][row]}"
    for side in _SIDES:
        if f"{side}tokens" not in batch:
            continue
        tokenizer = prepared.tokenizer if side or not prepared.pairs else prepared.target_tokenizer
        for number, ids in _segments(batch, side, row):
            what = f"{side.rstrip('_') or 'text'} {number}".strip()
            yield f"  {what} ({len(ids)} tokens): {json.dumps(shown_text(tokenizer, ids), ensure_ascii=False)}"
    if "weights" in batch and "targets" in batch:
        weights, targets = batch["weights"][row], batch["targets"][row]
        predicted = weights > 0
        text = ""
        if prepared.meta.label_kind == "tags":
            text = f": {_label(targets[predicted], prepared.meta.labels)}"
        elif predicted.sum() < 0.5 * len(weights):
            tokenizer = prepared.target_tokenizer if prepared.pairs else prepared.tokenizer
            text = f": {json.dumps([shown_text(tokenizer, [id]) for id in targets[predicted]], ensure_ascii=False)}"
        yield f"  predicted: {int(predicted.sum())} of {len(weights)} positions{text}"
    if "labels" in batch:
        yield f"  label: {_label(batch['labels'][row], prepared.meta.labels)}"


def _segments(batch: Batch, side: str, row: int) -> Iterator[tuple[str, np.ndarray]]:
    """The ids of each segment of a row, padding left out, with its number where there are several."""
    ids = batch[f"{side}tokens"][row]
    if (segments := batch.get(f"{side}segments")) is None:
        yield "", ids
        return
    numbers = [number for number in np.unique(segments[row]) if number > 0]
    for number in numbers:
        yield str(number) if len(numbers) > 1 else "", ids[segments[row] == number]


def shown_text(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> str:
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


def _label(label: np.ndarray, names: Sequence[str]) -> str:
    if not names or not np.issubdtype(label.dtype, np.integer):
        return str(label.tolist())
    if label.ndim == 0:
        return names[int(label)] if label >= 0 else "none"
    return " ".join(names[int(number)] for number in label if number >= 0)


def _as_data(batch: Batch, row: int, prepared: Prepared, step: int) -> dict[str, Any]:
    arrays = {name: array[row].tolist() for name, array in batch.items()}
    texts = {}
    for side in _SIDES:
        if f"{side}tokens" in batch:
            tokenizer = prepared.tokenizer if side or not prepared.pairs else prepared.target_tokenizer
            texts[f"{side}text"] = [shown_text(tokenizer, ids) for _, ids in _segments(batch, side, row)]
    return {"step": step, "row": row, **texts, **arrays}
