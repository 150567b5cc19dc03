"""Training from a config: what is checked and read before the first step. All side effects of a run are here and in `steps`."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from train.checkpoints.checkpoint import Checkpoints
from train.config import RunConfig
from train.config.changes import check_allowed
from train.data.prepared.prepare import prepare
from train.parallel.mesh import check_batch, make_mesh, use_mesh
from train.parallel.processes import is_first, one_log, process_zero_first, report_lost_peers
from train.parallel.runtime import GracefulStop, Watchdog
from train.run.begin import agree_on, alone_in, check_data, with_data
from train.run.data_summary import write_data_summary
from train.run.init_from import check_begin, check_weights
from train.run.mirror import mirrored
from train.run.reference import store
from train.run.run_files import finished_step, forget_finished, write_run_files
from train.run.session import Finished
from train.run.steps import Run
from transformer.errors import UserError


def train(
    config: RunConfig,
    *,
    profile: tuple[int, int] | None = None,
    allow_changed: Sequence[str] = (),
    hang_seconds: float = 0.0,
) -> Finished:
    """Train from a config, or resume from the newest checkpoint in the run's folder.

    Args:
        profile: first and last step to trace for TensorBoard or Perfetto.
        allow_changed: fields and sections of the config that may differ from the checkpoint's though what follows is computed
            in another way, such as `optimizer.learning_rate`; `data` permits other data too.
        hang_seconds: after which a process without a new step or evaluated batch ends, with the stacks of its threads; 0: never.

    Raises:
        UserError: anything that the user can fix; raised before the first step where possible.
        SystemExit: other processes of the run are lost; a line reports it.
    """
    check_allowed(config, allow_changed)
    with one_log(), report_lost_peers(config.directory):
        agree_on(config)
        with alone_in(config.directory), mirrored(config):
            return _train(config, profile, allow_changed, hang_seconds)


class _Stopped(Exception):
    """A signal came before the first step."""


def _train(
    config: RunConfig, profile: tuple[int, int] | None, allow_changed: Sequence[str], hang_seconds: float
) -> Finished:
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.mesh.rules, config.batch_size, config.microbatches)
    check_batch(mesh, config.mesh.rules, config.evaluation_batch_size, 1, "evaluation.batch_size")
    check_begin(config)
    with process_zero_first():
        prepared = prepare(config.data)
    config = with_data(config, prepared)
    check_data(config, prepared)
    if profile is not None and profile[0] > config.steps:
        raise UserError(f"profile: step {profile[0]} is after the last one, {config.steps}")
    check_weights(config, prepared)
    with use_mesh(mesh, config.mesh.rules), GracefulStop() as stop, Watchdog(hang_seconds) as watch:
        run = Run(config, prepared, mesh)
        watch.alive()
        rolls_back = config.stability.on_spike == "rollback"
        with Checkpoints(config.directory, config.checkpoint, rolls_back=rolls_back) as checkpoints:
            if (done := checkpoints.latest) is not None and done > config.steps:
                raise UserError(
                    f"{config.directory}: this run is already at step {done}, and steps is {config.steps}; "
                    f"set steps to {done} or more, or start another run with --run-dir"
                )
            watch.alive()

            def on_batch() -> None:
                watch.alive()
                # Several processes would stop at different batches, and wait for each other.
                if stop.requested and jax.process_count() == 1:
                    raise _Stopped

            try:
                state = run.start(checkpoints, allow_changed, on_batch)
            except _Stopped:
                print(
                    f"{config.directory}: stopped before the first step; nothing is saved. Run the same command again"
                )
                return Finished(config.directory, 0, None, True, stop.number)
            watch.alive()
            over = done == config.steps or (done is not None and run.selection.is_over(config.evaluation.patience))
            if done is not None and over and finished_step(config.directory) == done:
                more = "steps" if done == config.steps else "evaluation.patience"
                print(f"{config.directory}: already finished at step {done}; raise {more} to continue")
                return Finished(config.directory, done, None, False)
            run_id = ""
            if is_first():
                run_id = write_run_files(config, prepared)
                write_data_summary(config.directory, run.prepared, run.batches)
                if done is None:
                    store(config, run.prepared)
                forget_finished(config.directory)
            return run.loop(state, checkpoints, stop, watch, profile, run_id)
