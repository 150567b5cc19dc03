"""Interleaved timing, and results with their origin."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from train.files import writing
from train.versions import versions

RESULTS = Path(__file__).parent / "results"


def in_turn(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each candidate once per round, in rotating order, and collect what they return.

    A machine's speed drifts; alternating candidates see the same drift, so their ratio within a round is fair.
    """
    names = list(candidates)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seen[name].append(candidates[name]())
    return seen


def seconds_per_call(function: Callable[[], Any], calls: int) -> float:
    """Mean wall-clock seconds of `calls` calls; the function blocks until its work is done, or returns JAX arrays."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def speeds_in_turn(
    candidates: Mapping[str, Callable[[], object]], rounds: int, calls: int, count: int
) -> dict[str, list[float]]:
    """The throughput of each candidate, for `count` tokens or texts per call: warmed up, then in turn, `calls` at a time."""
    for function in candidates.values():
        seconds_per_call(function, 2)
    timed = {name: functools.partial(seconds_per_call, function, calls) for name, function in candidates.items()}
    return {name: [count / seconds for seconds in taken] for name, taken in in_turn(timed, rounds).items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and spread of the ratios of two candidates, taken round by round."""
    return summary([a / b for a, b in zip(over, under, strict=True)])


def with_origin(command: str, result: Any) -> dict[str, Any]:
    """A result with its command, date, device and versions."""
    device = jax.devices()[0]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {
            "kind": _cpu_name() if device.platform == "cpu" else device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "versions": versions(),
        "result": result,
    }


def save(
    name: str, command: str, result: dict[str, Any], *, show: bool = True, folder: Path | str | None = None
) -> Path:
    """Write a result with date, device and versions into `folder` (`RESULTS` by default), and print it if `show`."""
    record, platform = with_origin(command, result), jax.devices()[0].platform
    place = RESULTS if folder is None else Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}_{platform}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if show:
        print(json.dumps(result, indent=2))
    print(f"written to {path}")
    return path


def folder_for(directory: str, usual: str, name: str, command: str) -> str | None:
    """Where a result goes whose runs are in `directory`: next to them, or among those on record (None).

    Only the command that is on record, with its runs in the usual folder, replaces the record.
    """
    path = RESULTS / f"{name}_{jax.devices()[0].platform}.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))["command"] if path.exists() else command
    return None if (directory, command) == (usual, recorded) else directory


def report_folder(output: str | None) -> Path:
    """The folder of a report, `plans` by default; created at once, so that an unwritable folder fails before measuring.

    Raises:
        UserError: the folder cannot be created.
    """
    folder = Path(output or "plans")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
