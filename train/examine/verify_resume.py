"""`manyheads verify-resume`: a run that is killed again and again, held against one that is not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from train.checkpoints.stored import AVERAGE, PARAMS, STATE, StoredCheckpoints
from train.config import RunConfig, dump
from train.data.prepared.prepare import prepare
from train.examine.interrupted import MOMENTS, Kill, Killer, Layout, Running, seconds_to_first_step
from train.files import check_new, write_whole, writing
from train.report.metrics import read_examples
from train.run.begin import with_data
from train.run.run_files import read_metrics
from train.versions import versions

REPORT = "report.json"
TOLERANCE = 1e-5
"""Relative difference of losses between layouts, whose sums round differently. In one layout none is allowed."""


def verify_resume(config: RunConfig, folder: Path, *, kills: int, layouts: Sequence[Layout], seed: int = 0) -> bool:
    """Train without interruption; then again, killed at random moments and resumed; compare, and write a report.

    Args:
        folder: where both runs and the report are kept; a new one.
        kills: how often the second run is killed, in turn at each of `MOMENTS`. If it ends before, it is compared, and begins
            again.
        layouts: the second run takes them in turn, from one start to the next; the first run takes the first of them.
        seed: of the moments.

    Returns:
        Whether examples and losses of all steps, parameters and optimiser state are the same: bit for bit in one layout.

    Raises:
        UserError: a run fails, or the folder is there already.
    """
    check_new(folder)
    config = with_data(config, prepare(config.data))
    log = dataclasses.replace(config.log, every=1, examples=True)
    file = folder / "config.yaml"
    with writing(folder):
        folder.mkdir(parents=True)
        file.write_text(dump(dataclasses.replace(config, run_dir=None, log=log)), encoding="utf-8")
    whole, killed = folder / "whole", folder / "killed"
    print(f"{config.name}: {config.steps} steps without interruption", flush=True)
    running = Running(file, whole, layouts[0])
    starting = seconds_to_first_step(running)
    running.finish()
    killer = Killer(file, killed, starting, config.evaluation.every, seed)
    found, exact = list[Kill](), len(set(layouts)) == 1
    places = itertools.cycle(layouts)
    moments = itertools.cycle(moment for moment in MOMENTS if moment != "evaluation" or config.evaluation.every)
    runs, differences = 0, list[str]()
    while len(found) < kills and not differences:
        if (kill := killer.kill(next(moments), next(places))) is not None:
            found.append(kill)
            print(f"kill {len(found)} of {kills}: {_said(kill)}", flush=True)
            continue
        # It ended before the moment came: this one is compared, and the next begins again.
        runs += 1
        if differences := compare(whole, killed, exact=exact):
            break
        killed.rename(killed.with_name(f"killed-{runs}"))
    if not differences:
        Running(file, killed, next(places)).finish()
        runs += 1
        differences = compare(whole, killed, exact=exact)
    report = {
        "config": config.name, "steps": config.steps, "seed": seed,
        "layouts": [dataclasses.asdict(layout) for layout in layouts], "runs": runs, "differences": differences,
        "largest_difference": _largest_difference(whole, killed),
        "kills": [dataclasses.asdict(kill) for kill in found], "versions": versions(),
    }  # fmt: skip
    with writing(folder):
        write_whole(folder / REPORT, json.dumps(report, indent=1) + "\n")
    saving, evaluating = (sum(getattr(kill, name) for kill in found) for name in ("while_saving", "while_evaluating"))
    print(f"{runs} runs were killed and finished" if runs > 1 else "one run was killed and finished")
    print(
        f"{len(found)} kills, {saving} of them while a checkpoint was written, {evaluating} in an evaluation: "
        f"{'; '.join(differences) or 'no difference'}"
    )
    print(f"report: {folder / REPORT}")
    return not differences


def _said(kill: Kill) -> str:
    where = f"{kill.seconds:.1f} s after its start"
    if kill.while_saving:
        where = "a checkpoint was being written"
    elif kill.while_evaluating:
        where = "in an evaluation"
    return f"after step {kill.step}, {where} ({Layout(kill.devices, kill.processes)})"


def compare(whole: Path, killed: Path, *, exact: bool) -> list[str]:
    """A line for each difference between two finished runs.

    Args:
        exact: bit for bit; otherwise the same examples, losses within `TOLERANCE`, and no look at the arrays.
    """
    lines = []
    taken = [read_examples(run) for run in (whole, killed)]
    if other := [
        step for step in sorted(taken[0].keys() | taken[1].keys()) if taken[0].get(step) != taken[1].get(step)
    ]:
        lines.append(f"examples: {len(other)} steps differ, the first is {other[0]}")
    one, another = (read_metrics(run) for run in (whole, killed))
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        before, after = one.get(name, {}), another.get(name, {})
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


def _largest_difference(whole: Path, killed: Path) -> float:
    """The largest relative difference of the losses of a step."""
    one, other = (read_metrics(run).get("train/loss", {}) for run in (whole, killed))
    return max((abs(one[step] / other[step] - 1) for step in one.keys() & other.keys() if other[step]), default=0.0)


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
