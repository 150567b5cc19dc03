"""`manyheads inspect-data`: the examples of a step, decoded, before a run or after it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.checkpoints.stored import FOLDER, StoredCheckpoints
from train.config import RunConfig, load
from train.data.decoded import SIDES, segments_of, text_of, tokenizer_of
from train.data.loader import Batch
from train.data.prepared.prepare import prepare
from train.data.prepared.store import Prepared
from train.files import write_whole, writing
from train.finetune.base import find_base
from train.remote import local_run
from train.run.begin import batches_of, check_data, with_data
from train.run.order import Order
from train.run.run_files import config_file
from transformer.errors import UserError


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run, or a config that may become one, and which batches its steps take."""

    config: RunConfig
    order: Order = Order()

    @classmethod
    def of(cls, named: str, overrides: Sequence[str] = ()) -> Planned:
        """That of a config's file, or of a run's folder or address. Raises `UserError` if there is neither."""
        path = local_run(named)
        if not path.is_dir():
            return cls(load(path, overrides, find_base=find_base))
        config = load(config_file(path), overrides)
        stored = StoredCheckpoints(path) if (path / FOLDER).is_dir() else None
        newest = None if stored is None else stored.latest
        # Imported weights, and runs of an older version, have passed over none.
        return cls(
            config,
            Order() if stored is None or newest is None else Order.from_data(stored.meta(newest).get("passed", ())),
        )


def inspect_data(
    planned: Planned, *, step: int = 1, rows: int = 4, other: Planned | None = None, out: Path | None = None
) -> bool:
    """Print the examples of a step: their ids, their text by segments, what is predicted, and their labels.

    Args:
        rows: how many of them.
        other: compare with the batch of another one, and print only the rows that differ.
        out: a file for all rows of the batch, arrays included, as one JSON object a line.

    Returns:
        Whether both batches are equal; True without `other`.

    Raises:
        UserError: data that cannot be read or does not fit, or no such step.
    """
    if step < 1:
        raise UserError(f"step: got {step}; allowed: 1 or more")
    prepared, batch = _batch_of(planned, step)
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


def _batch_of(planned: Planned, step: int) -> tuple[Prepared, Batch]:
    prepared = prepare(planned.config.data)
    config = with_data(planned.config, prepared)
    check_data(config, prepared)
    return prepared, batches_of(config, prepared).batch(planned.order.batch(step))


def _differing(one: Batch, other: Batch) -> list[int]:
    """The rows in which two batches differ; all where their arrays are others."""
    every = list(range(len(one["example"])))
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return every
    return [row for row in every if any(not np.array_equal(one[name][row], other[name][row]) for name in one)]


def _row(batch: Batch, row: int, prepared: Prepared) -> Iterator[str]:
    yield f"\nrow {row}, example {batch['example'][row]}"
    for side in SIDES:
        if f"{side}tokens" not in batch:
            continue
        tokenizer = tokenizer_of(side, prepared)
        for number, ids in segments_of(batch, side, row):
            what = f"{side.rstrip('_') or 'text'} {number}".strip()
            yield f"  {what} ({len(ids)} tokens): {json.dumps(text_of(tokenizer, ids), ensure_ascii=False)}"
    if "weights" in batch and "targets" in batch:
        weights, targets = batch["weights"][row], batch["targets"][row]
        predicted = weights > 0
        text = ""
        if prepared.meta.label_kind == "tags":
            text = f": {_label(targets[predicted], prepared.meta.labels)}"
        elif predicted.sum() < 0.5 * len(weights):
            tokenizer = prepared.target_tokenizer if prepared.pairs else prepared.tokenizer
            text = f": {json.dumps([text_of(tokenizer, [id]) for id in targets[predicted]], ensure_ascii=False)}"
        yield f"  predicted: {int(predicted.sum())} of {len(weights)} positions{text}"
    if "labels" in batch:
        label = batch["labels"][row]
        if prepared.meta.label_kind == "classes":
            label = np.flatnonzero(label)
        yield f"  label: {_label(label, prepared.meta.labels) or 'none'}"


def _label(label: np.ndarray, names: Sequence[str]) -> str:
    if not names or not np.issubdtype(label.dtype, np.integer):
        return str(label.tolist())
    if label.ndim == 0:
        return names[int(label)] if label >= 0 else "none"
    return " ".join(names[int(number)] for number in label if number >= 0)


def _as_data(batch: Batch, row: int, prepared: Prepared, step: int) -> dict[str, Any]:
    arrays = {name: array[row].tolist() for name, array in batch.items()}
    texts = {}
    for side in SIDES:
        if f"{side}tokens" in batch:
            tokenizer = tokenizer_of(side, prepared)
            texts[f"{side}text"] = [text_of(tokenizer, ids) for _, ids in segments_of(batch, side, row)]
    return {"step": step, "row": row, **texts, **arrays}
