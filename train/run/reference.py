"""The reference model of preference tuning: what the weights that a run began with say of its data.

It is applied once, before the first step, so that a step computes no more than the model that is trained, and a run that goes on
compares with the same numbers, bit for bit. They are in reference.npz of the run's folder.

Axes: N examples of a split.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from train.config import RunConfig
from train.data.evaluation import evaluation_batches
from train.data.loader import prefetch_to_device
from train.data.prepared.content import Content
from train.data.prepared.store import Prepared, TokenArray
from train.files import whole_file, writing
from train.parallel.mesh import shard_batch
from train.program.program import Program
from train.run.evaluate import outputs_of
from transformer.errors import UserError, first_line

FILE = "reference.npz"
_SPLITS = ("train", "validation")


def referred(
    program: Program, config: RunConfig, prepared: Prepared, params: nnx.State, on_batch: Callable[[], None] = lambda: None
) -> Prepared:  # fmt: skip
    """The data with the log-probabilities of all answers by these parameters, where the objective needs them.

    Args:
        on_batch: called before each batch; what it raises ends the computation.
    """
    if not config.objective.needs_reference:
        return prepared
    print(
        f"{config.name}: computing the reference model's log-probabilities of all answers, once, with the starting weights"
    )
    found = {split: _log_probs(program, config, prepared, split, params, on_batch) for split in _SPLITS}
    return _with(config, prepared, found)


def with_stored(directory: Path, config: RunConfig, prepared: Prepared) -> Prepared:
    """The data with what a run's folder holds of it, where the objective needs it.

    Raises:
        UserError: no such file, a damaged one, or one about other data.
    """
    if not config.objective.needs_reference:
        return prepared
    path = directory / FILE
    try:
        with np.load(path, allow_pickle=False) as stored:
            about, found = str(stored["about"]), {split: stored[split] for split in _SPLITS}
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); it holds the reference model's log-probabilities, without which the "
            "run cannot continue: restore it, or start a new run"
        ) from None
    if about != _about(config, prepared):
        raise UserError(
            f"{path}: it was made for other data, or for another length; restore the old settings, or start a new run"
        )
    return _with(config, prepared, found)


def store(config: RunConfig, prepared: Prepared) -> None:
    """Write what `referred` found into the run's folder. Raises `UserError` if it cannot be written."""
    if not config.objective.needs_reference:
        return
    arrays: dict[str, Any] = {
        split: np.concatenate([np.zeros((0, 2), np.float32), *_references(getattr(prepared, split))])
        for split in _SPLITS
    }
    path = config.directory / FILE
    with writing(path), whole_file(path) as unfinished, unfinished.open("wb") as stream:
        np.savez(stream, about=np.array(_about(config, prepared)), **arrays)


def _references(arrays: Sequence[TokenArray]) -> list[np.ndarray]:
    return [array.reference for array in arrays if array.reference is not None]


def _about(config: RunConfig, prepared: Prepared) -> str:
    """What the numbers depend on in addition to the weights."""
    return json.dumps([Content.of(prepared).digest, config.sequence_length, getattr(config.objective, "too_long", "")])


def _log_probs(
    program: Program, config: RunConfig, prepared: Prepared, split: str, params: nnx.State, on_batch: Callable[[], None]
) -> np.ndarray:  # fmt: skip
    """[N, 2] float32: of both answers of each example of a split, as evaluations number them."""
    arrays = getattr(prepared, split)
    if not arrays:
        return np.zeros((0, 2), np.float32)
    batches = evaluation_batches(
        dataclasses.replace(prepared, validation=arrays), config.data, batch_size=config.evaluation_batch_size,
        length=config.sequence_length, objective=config.objective, process_index=jax.process_index(),
        process_count=jax.process_count(),
    )  # fmt: skip

    def to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return shard_batch(batch | {"example": batch["example"].astype(np.int32)}, program.batch_sharding)

    def watched() -> Iterator[dict[str, jax.Array]]:
        for batch in prefetch_to_device(iter(batches), to_device):
            on_batch()
            yield batch

    parts = [
        (outputs["example"], outputs["log_probs"]) for _, outputs in outputs_of(program.eval_step, params, watched())
    ]
    ids, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    found = np.full((int(ids.max()) + 1, 2), np.nan, np.float32)
    found[ids[ids >= 0]] = values[ids >= 0]
    return found


def _with(config: RunConfig, prepared: Prepared, found: dict[str, np.ndarray]) -> Prepared:
    splits: dict[str, tuple[TokenArray, ...]] = {}
    for split, values in found.items():
        arrays, start = [], 0
        for array in getattr(prepared, split):
            count = len(
                config.objective.examples(
                    array, prepared.tokenizer, config.data.packing, config.sequence_length, training=False, shown=False
                )
            )
            arrays.append(dataclasses.replace(array, reference=values[start : start + count]))
            start += count
        if start != len(values):
            raise UserError(
                f"{config.directory / FILE}: {len(values)} pairs, where the data has {start}; begin another run"
            )
        splits[split] = tuple(arrays)
    return dataclasses.replace(prepared, train=splits["train"], validation=splits["validation"])
