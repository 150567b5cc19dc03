"""`manyheads verify-resume`: a run that is killed again and again, held against one that is not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from train.config import RunConfig, dump
from train.files import check_new, write_whole, writing
from train.run.run_files import read_metrics
from train.run.stored import AVERAGE, PARAMS, STATE, StoredCheckpoints
from train.versions import versions
from transformer.errors import UserError

REPORT = "report.json"
TOLERANCE = 1e-5
"""Relative difference of losses between numbers of devices, whose sums round differently. On one number none is allowed."""
_POLL_SECONDS = 0.005


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    meant: str
    """What it waited for: `start` (a moment while it starts), `step` (a step), `save` (a checkpoint being written)."""
    step: int
    """The last step that was recorded before it."""
    while_saving: bool
    """Whether a checkpoint was being written."""
    devices: int
    seconds: float
    """After the process began."""


def verify_resume(config: RunConfig, folder: Path, *, kills: int, devices: Sequence[int], seed: int = 0) -> bool:
    """Train without interruption; then again, killed at random moments and resumed; compare, and write a report.

    Args:
        folder: where both runs and the report are kept; a new one.
        kills: how often the second run is killed, in turn while it starts, after a step, and while it writes a checkpoint. If it
            ends before, it is compared, and begins again.
        devices: numbers of virtual CPU devices, which the second run takes in turn; the first run takes the first of them.
        seed: of the moments.

    Returns:
        Whether losses, parameters and optimiser state are the same: bit for bit on one number of devices.

    Raises:
        UserError: a run fails, or the folder is there already.
    """
    check_new(folder)
    with writing(folder):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(dataclasses.replace(config, run_dir=None)), encoding="utf-8")
    whole, killed = folder / "whole", folder / "killed"
    print(f"{config.name}: {config.steps} steps without interruption", flush=True)
    process, began = _start(folder, whole, devices[0]), time.monotonic()
    while process.poll() is None and not _last_step(whole):
        time.sleep(_POLL_SECONDS)
    starting = time.monotonic() - began
    _end(process, whole)
    random, found, exact = np.random.default_rng(seed), list[Kill](), len(set(devices)) == 1
    runs, meant = 0, itertools.cycle(("start", "step", "save"))
    while len(found) < kills:
        count = devices[(len(found) + runs) % len(devices)]
        if (kill := _killed(folder, killed, next(meant), count, starting, random)) is not None:
            found.append(kill)
            where = "a checkpoint was being written" if kill.while_saving else f"{kill.seconds:.1f} s after its start"
            print(f"kill {len(found)} of {kills}: after step {kill.step}, {where}", flush=True)
            continue
        # It ended before the moment came: this one is compared, and the next begins again.
        runs += 1
        if lines := compare(whole, killed, exact=exact):
            raise UserError(f"{killed}: {'; '.join(lines)}")
        killed.rename(killed.with_name(f"killed-{runs}"))
    _end(_start(folder, killed, devices[0]), killed)
    differences = compare(whole, killed, exact=exact)
    report = {
        "config": config.name, "steps": config.steps, "seed": seed, "devices": list(devices), "differences": differences,
        "kills": [dataclasses.asdict(kill) for kill in found], "versions": versions(),
    }  # fmt: skip
    with writing(folder):
        write_whole(folder / REPORT, json.dumps(report, indent=1) + "\n")
    saving = sum(kill.while_saving for kill in found)
    print(f"{runs + 1} runs were killed and finished" if runs else "one run was killed and finished")
    print(
        f"{len(found)} kills, {saving} of them while a checkpoint was written: {'; '.join(differences) or 'no difference'}"
    )
    print(f"report: {folder / REPORT}")
    return not differences


def compare(whole: Path, killed: Path, *, exact: bool) -> list[str]:
    """A line for each difference between two finished runs.

    Args:
        exact: bit for bit; otherwise losses within `TOLERANCE`, and no look at the arrays.
    """
    lines = []
    one, other = (read_metrics(run) for run in (whole, killed))
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        before, after = one.get(name, {}), other.get(name, {})
        if before.keys() != after.keys():
            lines.append(f"{name}: {len(before)} and {len(after)} records")
            continue
        allowed = 0.0 if exact else TOLERANCE
        far = [step for step in before if not _near(before[step], after[step], allowed)]
        if far and (exact or name != "train/grad_norm"):
            step = min(far)
            lines.append(f"{name}: {len(far)} steps differ, the first is {step}: {before[step]!r} and {after[step]!r}")
    if exact:
        lines += [f"{name}: not the same bits" for name in _arrays_that_differ(whole, killed)]
    return lines


def _near(one: float, other: float, allowed: float) -> bool:
    return abs(one - other) <= allowed * abs(one) or (math.isnan(one) and math.isnan(other))


def _arrays_that_differ(whole: Path, killed: Path) -> list[str]:
    stored = [StoredCheckpoints(run) for run in (whole, killed)]
    found = []
    items = [PARAMS, STATE]
    if (stored[0].folder(stored[0].steps[-1]) / AVERAGE).is_dir():
        items.append(AVERAGE)
    for item in items:
        one, other = (_arrays(checkpoints.folder(checkpoints.steps[-1]) / item) for checkpoints in stored)
        found += [name for name in sorted(one.keys() | other.keys()) if not _equal(one.get(name), other.get(name))]
    return found


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of one item of a checkpoint by their paths, whatever devices they were on."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        described = checkpointer.metadata(folder.absolute()).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
        tree = checkpointer.restore(folder.absolute(), ocp.args.PyTreeRestore(restore_args=how))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keys = jax.dtypes.prng_key
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, keys) else leaf
        )
        for path, leaf in leaves
    }


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Whether both have the same bits, NaN included."""
    return one is not None and other is not None and one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _start(folder: Path, run: Path, devices: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "train.commands.cli", "train", str(folder / "config.yaml"), "--run-dir", str(run)]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with _errors_of(run).open("w", encoding="utf-8") as errors:
        return subprocess.Popen(
            [*command, "--devices", str(devices)], stdout=subprocess.DEVNULL, stderr=errors,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip


def _errors_of(run: Path) -> Path:
    """The file of what a run's newest process wrote to standard error."""
    return run.with_name(f"{run.name}.errors.txt")


def _last_line(run: Path) -> str:
    lines = _errors_of(run).read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "without a message")


def _end(process: subprocess.Popen[bytes], run: Path) -> None:
    """Wait for a run. Raises `UserError` with its error unless it finished."""
    if process.wait():
        raise UserError(f"{run}: ended with status {process.returncode}: {_last_line(run)}")


def _killed(
    folder: Path, run: Path, meant: str, devices: int, starting: float, random: np.random.Generator
) -> Kill | None:
    """Start or resume the run, and kill it at a random moment; None if it finished before.

    Args:
        meant: as in `Kill`.
        starting: seconds until the first step of a run.
    """
    before = _last_step(run)
    process, began = _start(folder, run, devices), time.monotonic()
    moment, steps, more = random.uniform(0.0, starting), random.integers(1, 8), random.uniform(0.0, 0.05)
    while process.poll() is None:
        late = time.monotonic() - began
        if meant == "start" and late >= moment:
            break
        # Records of steps that were taken before are not new ones.
        if meant != "start" and late > 0.3 * starting and _last_step(run) >= before + steps:
            while meant == "save" and process.poll() is None and not _is_saving(run):
                time.sleep(_POLL_SECONDS)
            time.sleep(more)
            break
        time.sleep(_POLL_SECONDS)
    in_save = _is_saving(run)
    process.kill()
    process.wait()
    if process.returncode == 0:
        return None
    if process.returncode > 0:
        raise UserError(f"{run}: ended with status {process.returncode}: {_last_line(run)}")
    return Kill(meant, _last_step(run), in_save, devices, round(time.monotonic() - began, 3))


def _last_step(run: Path) -> int:
    return max(read_metrics(run).get("train/loss", {}), default=0)


def _is_saving(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any("tmp" in name for name in os.listdir(folder))
