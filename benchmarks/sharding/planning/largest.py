"""The largest batch and the longest context that fit a layout: by formula, then confirmed by a few compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.predict.ahead import Compiler
from benchmarks.sharding.predict.analytic import Analysis
from train.config import RunConfig
from train.parallel.mesh import MESH_AXES
from transformer.errors import ConfigError, UserError

COMPILES = 4
"""The most programs that are compiled for one answer."""
TIMEOUT = 300
"""Seconds that one of them may take."""
MOST = 1 << 20
"""The largest multiple, and the longest context in tokens, that are looked at."""
TOKENS = 128
"""A context is a multiple of this many tokens."""


def largest(config: RunConfig, target: Target, python: str | None) -> dict[str, Any]:
    """The largest batch at the config's length, and the longest context with one sequence a device, in the config's layout.

    Args:
        python: interpreter of an environment with the target's compiler; None: by formula only.
    """
    compiler = None if python is None else Compiler(target, python)
    sizes = dict(zip(MESH_AXES, config.mesh.sizes(target.num_devices), strict=True))
    parts = config.mesh.pipeline_microbatches or 1 if sizes["pipeline"] > 1 else config.microbatches
    step = sizes["data"] * sizes["fsdp"] * sizes["expert"] * parts
    span = TOKENS * 2 * sizes["context"]
    analysis = Analysis(config)

    def batch(count: int) -> RunConfig:
        return dataclasses.replace(config, batch_size=count * step)

    def context(count: int) -> RunConfig:
        model: Any = dataclasses.replace(config.model, max_length=count * span)
        return dataclasses.replace(config, model=model, length=None, batch_size=step)

    def batch_fits(count: int) -> bool:
        return analysis.estimate(batch(count), target).memory <= target.chip.memory

    def context_fits(count: int) -> bool:
        one = context(count)
        return Analysis(one).estimate(one, target).memory <= target.chip.memory

    try:
        return {
            "batch_size": _confirmed(batch, bisected(batch_fits), step, compiler),
            "sequence_length": _confirmed(
                context, bisected(context_fits, fine=16, most=max(MOST // span, 1)), span, compiler
            ),
            "batch_of_context": step,
        }
    finally:
        if compiler is not None:
            compiler.close()


def bisected(fits: Callable[[int], bool], fine: int = MOST, most: int = MOST) -> int:
    """The largest multiple that fits, of those from 1 to `most`; 0: none does.

    Args:
        fine: it is found to within one part in so many.
    """
    if not fits(1):
        return 0
    low = 1
    while 2 * low <= most and fits(2 * low):
        low *= 2
    high = min(2 * low, most + 1)
    while high - low > max(low // fine, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _confirmed(
    make: Callable[[int], RunConfig], count: int, unit: int, compiler: Compiler | None
) -> dict[str, Any]:  # fmt: skip
    """The figures: by formula, and what the compiler says: the largest that fits, and the smallest that does not."""
    found: dict[str, Any] = {"formula": count * unit, "compiled": None, "too_large": None}
    if compiler is None or count == 0:
        return found
    low, high, trial = 0, 0, count
    for number in range(1, COMPILES + 1):
        print(f"looking for the largest: {trial * unit:,}, program {number} of up to {COMPILES}", flush=True)
        try:
            answer = compiler.compile(make(trial), TIMEOUT)
        except (UserError, ConfigError) as error:
            return found | {"error": str(error)}
        if answer.failed:
            return found | {"error": answer.error}
        low, high = (trial, high) if answer.fits else (low, trial)
        # The next one by how much of the memory this one takes.
        trial = (low + high) // 2 if high else max(low + 1, int(low * 1.25))
        if high and high - low <= max(low // 16, 1):
            break
    return found | {"compiled": low * unit or None, "too_large": high * unit or None}


def sentences(found: dict[str, Any]) -> list[str]:
    """The figures in words."""
    titles = {
        "batch_size": "Largest batch of this layout",
        "sequence_length": f"Longest context, in a batch of {found['batch_of_context']}",
    }
    lines = []
    for name, title in titles.items():
        one, unit = found[name], "sequences" if name == "batch_size" else "tokens"
        text = f"{title}: {one['formula']:,} {unit} by formula" if one["formula"] else f"{title}: none fits by formula"
        if one.get("error"):
            text += f"; the compiler failed: {one['error']}"
        elif one["compiled"]:
            text += f"; {one['compiled']:,} fit by the compiler"
        elif one["too_large"]:
            text += "; none that was compiled fits"
        if one["too_large"]:
            text += f", {one['too_large']:,} do not"
        lines.append(f"{text}.")
    return lines
