"""What a run says of itself."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.config import RunConfig
from train.data.loader import Batches

_SHOWN = 16
"""The most examples that a message names."""


def headline(config: RunConfig, mesh: jax.sharding.Mesh, counted: str, start: int, over: bool) -> str:
    """The first line of a run.

    Args:
        counted: how many parameters there are, as text.
        start: the step that it resumes after; 0 for a new one.
        over: whether all its steps are done.
    """
    begins = f"resuming after step {start}" if start else "starting"
    if over:
        begins = f"all steps are done, {start}; making the results"
    devices = f"{mesh.devices.size} × {mesh.devices.flat[0].device_kind} ({config.mesh.strategy})"
    return f"{config.name}: {begins}; {counted} on {devices}; {config.tokens_per_step:,} tokens a step"


def start_of(mesh: jax.sharding.Mesh, until: float | None) -> dict[str, Any]:
    """What is recorded of a beginning: when, and on what.

    Args:
        until: when the run made its last record before.
    """
    return {
        "unix_seconds": time.time(), "previous_until": until,
        "device": mesh.devices.flat[0].device_kind, "devices": int(mesh.devices.size),
        "processes": jax.process_count(), "host": platform.node(), "cores": os.cpu_count(),
    }  # fmt: skip


def course_of(config: RunConfig, batches: Batches) -> str:
    """How often a run goes through its data, as text."""
    examples = batches.examples_per_epoch
    epochs = config.steps * config.batch_size / examples
    return f"{config.steps:,} steps of {config.batch_size:,} examples: {epochs:,.3g} epochs of {examples:,}"


def padding_of(batches: Batches) -> str | None:
    """The fraction of positions that is padding, as text; None if it is negligible."""
    parts = {"source": batches.source_efficiency, "target": batches.efficiency}
    wastes = {side: 1 - part for side, part in parts.items() if part is not None}
    if max(wastes.values()) < 0.001:
        return None
    if len(wastes) == 1:
        return f"padding: {wastes['target']:.1%} of all positions"
    return f"padding: {wastes['source']:.1%} of the source's positions, {wastes['target']:.1%} of the target's"


def all_skipped(count: int, good: int | None, directory: Path, examples: np.ndarray | None = None) -> str:
    """Why a run ends whose last `count` updates were skipped, as text.

    Args:
        good: the step of the newest checkpoint. None is written while updates are skipped, so that it is from before them.
        examples: those of the last step.
    """
    last = "" if examples is None else f", the last on examples {_compact(examples)}"
    kept = "no checkpoint was written before" if good is None else f"the last good checkpoint is at step {good}"
    return (
        f"{count} updates in a row were skipped{last}; {kept} in {directory}. Resume with a lower optimizer.learning_rate or "
        "with optimizer.clip_norm, and --allow-changed optimizer"
    )


def interrupted_at(step: int, saved: int | None, directory: Path, *, over: bool) -> str:
    """What an interrupted run says at its end.

    Args:
        saved: the step of the newest checkpoint; None if there is none.
        over: whether all steps are done.
    """
    if saved is None:
        return f"stopped after step {step}; all updates were skipped, and nothing is saved"
    state = "state" if saved == step else f"state of step {saved}, before skipped updates,"
    how = "for the results; all steps are done" if over else "to resume"
    return f"stopped after step {step}; the {state} is saved in {directory}. Run the same command again {how}"


def _compact(examples: np.ndarray) -> str:
    ids = examples.tolist()
    return ", ".join(map(str, ids[:_SHOWN])) + (" ..." if len(ids) > _SHOWN else "")
