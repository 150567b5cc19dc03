"""What a run records of its data, for its report: sources, lengths of documents, and how much of a batch is padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from train.data.loader import Batches
from train.data.prepared.store import Prepared, TokenArray
from train.files import write_whole, writing
from transformer.errors import UserError, first_line

_FILE = "data.json"
_SHARES = (0.1, 0.5, 0.9, 0.99, 1)
_MOST = 1_000_000
"""Documents whose lengths are counted, evenly spaced over a source that has more."""


def write_data_summary(directory: Path, prepared: Prepared, batches: Batches) -> None:
    """Write it into a run's folder. Raises `UserError` if that cannot be written."""
    counts = {"train": prepared.meta.train, "validation": prepared.meta.validation}
    arrays = {"train": prepared.train, "validation": prepared.validation}
    found: dict[str, Any] = {
        "sources": [
            {
                "split": split, "name": one.name, "documents": one.documents, "tokens": one.predicted.tokens,
                "bytes": one.predicted.bytes, "skipped": one.skipped, "lengths": _lengths(array),
            }
            for split in counts for one, array in zip(counts[split], arrays[split], strict=True)
        ],
        "vocabulary": prepared.tokenizer.vocab_size,
        "labels": list(prepared.meta.labels),
        "examples_per_epoch": batches.examples_per_epoch,
        "filled": batches.efficiency,
        "source_filled": batches.source_efficiency,
    }  # fmt: skip
    with writing(directory):
        write_whole(directory / _FILE, json.dumps(found, indent=2) + "\n")


def read_data_summary(directory: Path) -> dict[str, Any] | None:
    """What was written; None for a run without it. Raises `UserError` if it cannot be read."""
    path = directory / _FILE
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}; delete it") from None
    if found is not None and not _is_summary(found):
        raise UserError(f"{path}: not what a run records of its data; delete it")
    return found


def _is_summary(found: Any) -> bool:
    if not (isinstance(found, dict) and isinstance(found.get("sources"), list)):
        return False
    numbers = [found.get(name) for name in ("vocabulary", "examples_per_epoch", "filled")]
    for one in found["sources"]:
        if not (isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("split"), str)):
            return False
        lengths = one.get("lengths")
        if not (isinstance(lengths, dict) and isinstance(lengths.get("histogram"), list)):
            return False
        quantiles = lengths.get("quantiles")
        if not (isinstance(quantiles, dict) and (not quantiles or set(map(str, _SHARES)) == quantiles.keys())):
            return False
        numbers += [*(one.get(name) for name in ("documents", "tokens", "bytes", "skipped")), *quantiles.values()]
        numbers += lengths["histogram"]
    return all(isinstance(number, int | float) for number in numbers)


def _lengths(array: TokenArray) -> dict[str, Any]:
    """Quantiles of the numbers of tokens of documents, and how many documents have up to 1, 2, 4, ... tokens."""
    predicted = array.target if array.target is not None and array.others == 1 else array
    step = -(-predicted.documents // _MOST)
    if not step:
        return {"quantiles": {}, "histogram": []}
    # Only these are read of an array that is as large as the data.
    begins = predicted.offsets[:-1:step]
    sizes = predicted.offsets[1::step] - begins
    quantiles = {str(share): int(np.quantile(sizes, share, method="nearest")) for share in _SHARES}
    places = np.ceil(np.log2(np.maximum(sizes, 1))).astype(int)
    return {"quantiles": quantiles, "histogram": (np.bincount(places) * step).tolist()}
