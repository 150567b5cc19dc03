"""A run's checkpoints as a table, and their removal."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from train.checkpoints.stored import StoredCheckpoints, read_scores
from train.files import Busy, locked, run_lock, writing
from train.report.display import console
from transformer.errors import UserError


def list_checkpoints(run: Path) -> bool:
    """Print each checkpoint's step, time, size and held-out score, and whether it is whole; whether all are.

    Raises:
        UserError: no such run.
    """
    stored = StoredCheckpoints(run)
    marks = {stored.latest: "latest", stored.best: "best"}
    if stored.latest == stored.best:
        marks = {stored.latest: "latest, best"}
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("step", "written", "size", "loss", ""):
        table.add_column(column, justify="right" if column in ("step", "size", "loss") else "left")
    whole, scores = True, read_scores(run)
    for step in stored.steps:
        folder, found = stored.folder(step), stored.damage(step)
        if not folder.is_dir():
            continue  # the run has removed it by now
        whole &= found is None
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        written = datetime.datetime.fromtimestamp(folder.stat().st_mtime).isoformat(" ", "seconds")
        loss = scores.get(step, {}).get("loss")
        table.add_row(
            str(step), written, _size(size), "–" if loss is None else f"{loss:.4f}",
            marks.get(step, "") if found is None else f"damaged: {found}",
        )  # fmt: skip
    console().print(table if stored.steps else f"{run}: this run has no checkpoint yet", soft_wrap=True)
    return whole


def remove_checkpoints(run: Path, steps: Sequence[str]) -> None:
    """Delete the checkpoints of some steps.

    Raises:
        UserError: no such run or checkpoint, or the run is being trained.
    """
    stored = StoredCheckpoints(run)
    known = {str(step) for step in stored.steps}
    if unknown := [step for step in steps if step not in known]:
        raise UserError(
            f"--remove: got {unknown[0]!r}; this run has {', '.join(map(str, stored.steps)) or 'no checkpoint'}"
        )
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run_lock(run)))
        except Busy:
            raise UserError(f"{run}: a process is training here; wait until it has ended") from None
        for step in steps:
            with writing(run):
                shutil.rmtree(stored.folder(int(step)))


def _size(count: int) -> str:
    """Bytes in the largest unit that leaves a digit before the point."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
