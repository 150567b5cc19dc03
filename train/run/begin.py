"""What is checked before a run begins: its folder, its config in all processes, and its data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax

from train.checkpoints.selection import check_selection
from train.config import RunConfig, difference, to_data
from train.data.loader import Batches, train_batches
from train.data.prepared.prepare import check_vocabulary
from train.data.prepared.store import Prepared
from train.files import Busy, locked, run_lock, writing
from train.parallel.processes import gathered
from train.program.program import Program
from transformer.errors import UserError
from transformer.models.labelled import LabelledHeadConfig


def waits_for_data(config: RunConfig) -> bool:
    """Whether only the data decides something: the number of classes, or of steps."""
    return config.epochs is not None or _head_of_data(config) is not None


def _head_of_data(config: RunConfig) -> LabelledHeadConfig | None:
    """The model's head, if its number of classes is that of the data."""
    head = getattr(config.model, "head", None)
    return head if isinstance(head, LabelledHeadConfig) and head.num_labels is None else None


def with_data(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The config with what its data decides: the number of classes, and the steps of `epochs`.

    Raises:
        UserError: the examples of an epoch cannot be made.
    """
    if (head := _head_of_data(config)) is not None:
        config.objective.check_data(prepared, config.sequence_length)
        head = dataclasses.replace(head, num_labels=config.objective.num_labels(prepared))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, head=head))  # type: ignore[arg-type]
    if config.epochs is not None:
        check_data(config, prepared)
        steps = math.ceil(config.epochs * batches_of(config, prepared).examples_per_epoch / config.batch_size)
        config = dataclasses.replace(config, steps=steps, epochs=None)
    return config


def check_data(config: RunConfig, prepared: Prepared) -> None:
    """Raise a `UserError` unless the data fits the model and the objective."""
    source_vocab_size = getattr(config.model, "source_vocab_size", None)
    inserted = config.objective.largest_inserted(prepared.tokenizer)
    if source_vocab_size is None:
        check_vocabulary(prepared, config.model.vocab_size, inserted=inserted)
    else:
        check_vocabulary(prepared, source_vocab_size, target_vocab_size=config.model.vocab_size, inserted=inserted)
    config.objective.check_data(prepared, config.sequence_length)
    config.objective.check_classes(prepared, config.model)
    check_selection(config, prepared)


def program_of(config: RunConfig, prepared: Prepared, mesh: jax.sharding.Mesh) -> Program:
    """The program of a config whose objective depends on the data. Raises as `Program`."""
    return Program(dataclasses.replace(config, objective=config.objective.with_data(prepared)), mesh)


def batches_of(config: RunConfig, prepared: Prepared) -> Batches:
    """The training batches of a run: the rows of this process."""
    return train_batches(
        prepared, config.data, batch_size=config.batch_size, length=config.sequence_length, seed=config.seed,
        objective=config.objective.with_data(prepared), process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Make the folder, and keep a second process from training in it; a run that is refused leaves no folder."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    lock, refused = run_lock(directory, jax.process_index()), False
    try:
        with locked(lock):
            try:
                yield
            finally:
                if refused := not (directory / "config.yaml").exists():
                    lock.unlink(missing_ok=True)
    except Busy:
        raise UserError(f"{directory}: another process is training here; choose another --run-dir") from None
    finally:
        if refused:
            # A folder that holds something else stays.
            for folder in (directory / "checkpoints", directory):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def agree_on(config: RunConfig) -> None:
    """Raise a `UserError` in every process unless all have the same config."""
    if jax.process_count() == 1:
        return
    texts = gathered(json.dumps(to_data(config), sort_keys=True))
    others = {index: text for index, text in enumerate(texts) if text != texts[0]}
    if others:
        index, text = next(iter(others.items()))
        changed = difference(json.loads(texts[0]), json.loads(text))
        raise UserError(
            f"processes {', '.join(map(str, others))} have a different config from process 0; process {index}: "
            f"{'; '.join(changed)}. Start all with the same config and overrides"
        )
