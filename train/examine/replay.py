"""`manyheads replay`: takes a step of a run again, and shows what it is made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from train.checkpoints.stored import FOLDER, StoredCheckpoints, restore_state
from train.config import RunConfig, load
from train.data.decoded import texts_of
from train.data.loader import Batch
from train.data.prepared.content import Content
from train.data.prepared.prepare import prepare
from train.data.prepared.store import Prepared
from train.examine.nonfinite import Origin, first_non_finite
from train.parallel.mesh import make_mesh, use_mesh
from train.program.program import Program
from train.program.state import TrainState
from train.program.step import step_keys
from train.report.display import console
from train.run.begin import batches_of, check_data, program_of
from train.run.init_from import fresh_state
from train.run.order import Order
from train.run.reference import with_stored
from train.run.run_files import config_file, read_metrics
from train.run.skipped import read_skipped
from transformer.errors import UserError

_COMPARED = ("loss", "grad_norm")
_CHARACTERS = 100


def replay(run: Path, step: int, *, rows: int = 8) -> bool:
    """Take the steps from the checkpoint before `step` again, up to it, and print its metrics and the loss of each example.

    Where they are not finite, the operation that made the first value that is not is printed too. The run's folder is not
    changed.

    Args:
        rows: how many examples to print, those of the highest losses.

    Returns:
        Whether loss and gradient norm are those that the run recorded, bit for bit; True if it did not record the step.

    Raises:
        UserError: no such run or step, or data that changed.
    """
    config = load(config_file(run))
    if not 1 <= step <= config.steps:
        raise UserError(f"--step: got {step}; allowed: 1 to {config.steps}, the run's last step")
    prepared = prepare(config.data)
    check_data(config, prepared)
    mesh = make_mesh(config.mesh)
    stored = StoredCheckpoints(run) if (run / FOLDER).is_dir() else None
    known = [] if stored is None else stored.steps
    with use_mesh(mesh, config.mesh.rules):
        program = program_of(config, prepared, mesh)
        order, state = Order(), None
        if stored is not None and known:
            meta = stored.meta(known[-1])
            if Content.from_data(meta["data"]).digest != Content.of(prepared).digest:
                raise UserError(
                    f"{run}: the data is not what the run was trained on; manyheads train on it says what differs"
                )
            order, last = _when_taken(run, step, Order.from_data(meta["passed"]))
            before = [one for one in known if one <= last and stored.damage(one) is None]
            if before:
                state = restore_state(stored.folder(before[-1]), program.abstract)
        prepared = with_stored(run, config, prepared)
        state = fresh_state(program, config, prepared) if state is None else state
        start, batches = int(state.step), batches_of(config, prepared)
        print(f"{run}: step {step}, from {f'the checkpoint of step {start}' if start else 'the beginning'}")
        out = console()
        for earlier in track(
            range(start + 1, step),
            "taking the steps before it",
            console=out,
            transient=True,
            disable=not out.is_terminal,
        ):
            state, _ = program.train_step(state, program.to_devices(batches.batch(order.batch(earlier))))
        batch = batches.batch(order.batch(step))
        losses = _losses(state, batch, config, program)
        state, metrics = program.train_step(state, program.to_devices(batch))
        values = {name: float(value) for name, value in metrics.items()}
        same = _say_metrics(run, step, values)
        _say_examples(losses, batch, prepared, rows)
        if not all(math.isfinite(values[name]) for name in _COMPARED):
            where = _origin(program, state, batch)
            print(
                f"first value that is not finite: {'none; the norm of the gradient is too large' if where is None else where}"
            )
    return same


def _when_taken(run: Path, step: int, order: Order) -> tuple[Order, int]:
    """The order of batches when the run took a step, and the last step before it with a state that led to it.

    A step from which the run rolled back was taken once more, with another batch: the one that was skipped is meant.
    """
    records = [record for record in read_skipped(run) if record["step"] == step]
    if not records:
        return order, step - 1
    back_to = records[-1]["rolled_back_to"]
    return Order.from_data(records[-1]["passed"]), step - 1 if back_to is None else back_to


def _losses(state: TrainState, batch: Batch, config: RunConfig, program: Program) -> np.ndarray | None:
    """The loss of each example alone [B], without dropout; None for an objective that compares examples with each other."""
    if config.objective.compares_rows:
        return None
    found = []
    for row in range(len(batch["example"])):
        # As many copies as an evaluation takes at once, so that the run's own program computes them.
        copies = {
            name: np.repeat(array[row : row + 1], config.evaluation_batch_size, 0) for name, array in batch.items()
        }
        sums, _ = program.eval_step(state.params, program.to_devices(copies))
        found.append(float(sums.total() / jnp.maximum(sums.weight, 1)))
    return np.array(found)


def _say_metrics(run: Path, step: int, values: dict[str, float]) -> bool:
    curves = read_metrics(run)
    recorded = {name: curves.get(f"train/{name}", {}).get(step) for name in _COMPARED}
    print("; ".join(f"{name.replace('_', ' ')} {values[name]!r}" for name in _COMPARED))
    if None in recorded.values():
        print("the run did not record this step")
        return True
    differing = [name for name in _COMPARED if not _equal(values[name], recorded[name])]
    for name in differing:
        print(f"the run recorded another {name.replace('_', ' ')}: {recorded[name]!r}")
    if differing:
        print(
            f"on another kind or number of devices than the {jax.device_count()} here, sums round differently (--devices)"
        )
    else:
        print("the run recorded the same, bit for bit")
    return not differing


def _equal(one: float, other: float | None) -> bool:
    return one == other or (other is not None and math.isnan(one) and math.isnan(other))


def _say_examples(losses: np.ndarray | None, batch: Batch, prepared: Prepared, rows: int) -> None:
    if losses is None:
        print("examples have no losses of their own: the objective compares them with each other")
        return
    print("loss of each example alone, without dropout:")
    # Those that are not finite come first.
    order = np.argsort(np.where(np.isfinite(losses), -losses, -np.inf), kind="stable")
    for row in order[:rows].tolist():
        text = json.dumps(" | ".join(texts_of(batch, row, prepared))[:_CHARACTERS], ensure_ascii=False)
        print(f"  {losses[row]:9.4f}  row {row}, example {batch['example'][row]}: {text}")
    if len(order) > rows:
        print(f"  and {len(order) - rows} more")


def _origin(program: Program, after: TrainState, batch: Batch) -> Origin | None:
    """Where a value first was not finite in the step before the state `after`, which has the parameters of before it: the update
    was skipped."""
    rows = program.to_devices(batch)
    return first_non_finite(program.gradient, after.params, rows, step_keys(after.key, after.step - 1, rows))
