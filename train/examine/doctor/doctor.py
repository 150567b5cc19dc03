"""`manyheads doctor`: where a training step's time goes on the devices at hand, and what to change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from train.checkpoints.stored import StoredCheckpoints, restore_state
from train.config import RunConfig, load
from train.data.loader import Batches
from train.data.prepared.prepare import prepare
from train.data.prepared.store import Prepared
from train.examine.doctor.advice import Seen, advise
from train.examine.doctor.breakdown import break_down
from train.examine.doctor.page import write_page
from train.examine.doctor.peaks import peaks_of
from train.examine.doctor.record import record
from train.examine.doctor.report import Report
from train.examine.doctor.show import show
from train.examine.explain import cost
from train.files import writing
from train.parallel.mesh import check_batch, make_mesh, use_mesh
from train.program.program import Program, flops_per_prediction
from train.program.state import TrainState
from train.run.begin import batches_of, check_data, program_of, with_data
from train.run.init_from import check_begin, fresh_state
from train.run.order import Order
from train.run.reference import referred
from train.run.run_files import config_file
from transformer.errors import UserError

PAGE = "doctor.html"


def doctor(config: RunConfig, *, steps: int = 5, folder: Path | None = None) -> Report:
    """Take a few steps of a run that a config describes, print where their time goes, and write a page.

    Args:
        steps: how many are timed, and as many again are traced.
        folder: for the page; `doctor/NAME` by default.

    Raises:
        UserError: a config or data that does not work, or a trace that holds nothing.
    """
    check_begin(config)
    return _examine(config, None, steps, folder)


def doctor_of_run(run: Path, *, steps: int = 5, folder: Path | None = None) -> Report:
    """The same from the newest checkpoint of a run on. The run's folder is not changed.

    Raises:
        UserError: as `doctor`; or no run, or one without a whole checkpoint.
    """
    config = load(config_file(run))
    stored = StoredCheckpoints(run)
    if stored.latest is None:
        raise UserError(
            f"{run}: this run has no checkpoint yet; examine its config: manyheads doctor {run}/config.yaml"
        )
    stored.check(stored.latest)
    return _examine(config, stored, steps, folder)


def _examine(config: RunConfig, stored: StoredCheckpoints | None, steps: int, folder: Path | None) -> Report:
    if steps < 1:
        raise UserError(f"--steps: got {steps}; allowed: 1 or more")
    page = (Path("doctor") / config.name if folder is None else folder) / PAGE
    with writing(page):
        page.parent.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.mesh.rules, config.batch_size, config.microbatches)
    prepared = prepare(config.data)
    config = with_data(config, prepared)
    check_data(config, prepared)
    devices = list(mesh.devices.flat)
    peaks = peaks_of(devices, config.model.dtype)
    with use_mesh(mesh, config.mesh.rules):
        program = program_of(config, prepared, mesh)
        state, order = _state(config, prepared, program, stored)
        # Those of the run itself are other numbers, and the work is the same.
        prepared = referred(program, config, prepared, state.params)
        first, batches = int(state.step) + 1, batches_of(config, prepared)
        recording = record(program, state, batches, order, steps)
        breakdown = break_down(recording.text, recording.events, steps, peaks)
        flops = flops_per_prediction(config, prepared, program) * recording.predictions
    seen = Seen(
        config=config, device=devices[0], breakdown=breakdown, peaks=peaks, choices=recording.choices,
        seconds=recording.seconds, waiting=recording.waiting, padding=_padding(batches), memory=recording.memory,
        kept=_kept(config, len(devices)),
    )  # fmt: skip
    report = Report(
        config=config, devices=_said(devices), first=first, recording=recording, breakdown=breakdown, peaks=peaks,
        mfu=flops / recording.seconds / peaks.of_all(len(devices)), advice=tuple(advise(seen)),
    )  # fmt: skip
    show(report)
    write_page(report, page)
    print(f"page: {page}")
    return report


def _state(
    config: RunConfig, prepared: Prepared, program: Program, stored: StoredCheckpoints | None
) -> tuple[TrainState, Order]:
    """The state to begin with, and the order of the batches after it."""
    if stored is None or stored.latest is None:
        return fresh_state(program, config, prepared), Order()
    meta = stored.meta(stored.latest)
    return restore_state(stored.folder(stored.latest), program.abstract), Order.from_data(meta.get("passed", ()))


def _padding(batches: Batches) -> float:
    """The part of all positions, of the source and of the target, that is padding."""
    parts = [part for part in (batches.efficiency, batches.source_efficiency) if part is not None]
    return 1 - sum(parts) / len(parts)


def _kept(config: RunConfig, devices: int) -> float:
    """Bytes that each device would keep in addition for the backward pass if nothing was computed again."""
    if config.model.remat == "none":
        return 0.0
    without = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    return (cost(without).activation_bytes - cost(config).activation_bytes) / devices


def _said(devices: list[jax.Device]) -> str:
    return f"{len(devices)} × {devices[0].device_kind}"
