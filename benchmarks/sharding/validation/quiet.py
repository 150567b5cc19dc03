"""Timing on a machine that others use too: rounds are kept in which other processes took least of the processors."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

DISTURBED = 0.08
"""Part of the processors' time that others may take of an undisturbed round."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a round."""

    seconds: float
    """Median of the rounds that were kept."""
    fastest: float
    slowest: float
    """Of all rounds."""
    rounds: int
    kept: int
    others: float
    """Part of the processors' time that other processes took in the kept rounds; 0 where the system does not say."""


def quiet_rounds(take: Callable[[], object], rounds: int, seconds: float, patience: float = 0.0) -> Timing:
    """Time `take`, which blocks until its work is done, and keep the rounds in which others took least: a third of them.

    Args:
        rounds: at least.
        seconds: to go on for, if so many rounds take less.
        patience: seconds to go on for while fewer than `rounds` / 2 rounds were undisturbed.
    """
    seen: list[tuple[float, float]] = []
    began = time.perf_counter()
    while True:
        seen.append(watched(take))
        passed, quiet = time.perf_counter() - began, sum(share < DISTURBED for share, _ in seen)
        if len(seen) >= rounds and passed >= seconds and (quiet >= rounds / 2 or passed >= patience):
            break
    return _kept(seen)


def in_quiet_turns(takes: Mapping[str, Callable[[], object]], rounds: int, patience: float = 0.0) -> dict[str, Timing]:
    """The same for several functions that take turns, round by round, in changing order.

    Args:
        patience: seconds to go on for while some function had fewer than `rounds` / 2 undisturbed rounds.
    """
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in takes}
    began, names, turn = time.perf_counter(), list(takes), 0
    while True:
        start = turn % len(names)
        for name in [*names[start:], *names[:start]]:
            seen[name].append(watched(takes[name]))
        turn += 1
        quiet = min(sum(share < DISTURBED for share, _ in one) for one in seen.values())
        if turn >= rounds and (quiet >= rounds / 2 or time.perf_counter() - began >= patience):
            return {name: _kept(one) for name, one in seen.items()}


def _kept(seen: list[tuple[float, float]]) -> Timing:
    """The median of the rounds in which others took least.

    Args:
        seen: (others' part of the processors, seconds) of each round.
    """
    most = max(len(seen) // 3, 3)
    quiet = sum(share < DISTURBED for share, _ in seen)
    kept = [one for one in seen if one[0] < DISTURBED] if quiet >= most else sorted(seen)[:most]
    times = [taken for _, taken in seen]
    return Timing(
        statistics.median(taken for _, taken in kept), min(times), max(times), len(seen), len(kept),
        statistics.mean(share for share, _ in kept),
    )  # fmt: skip


def fastest_quiet(take: Callable[[], object], rounds: int, patience: float) -> float:
    """Seconds of the fastest of some rounds, repeated for up to `patience` seconds until half of them were undisturbed."""
    seen: list[tuple[float, float]] = []
    end = time.perf_counter() + patience
    while len(seen) < rounds or (
        sum(share < DISTURBED for share, _ in seen) < rounds / 2 and time.perf_counter() < end
    ):
        seen.append(watched(take))
    return min(taken for _, taken in seen)


def watched(take: Callable[[], object]) -> tuple[float, float]:
    """(part of the processors' time that other processes took, seconds) of a call."""
    before, began = _others_seconds(), time.perf_counter()
    take()
    taken = time.perf_counter() - began
    return max(_others_seconds() - before, 0.0) / (taken * (os.cpu_count() or 1)), taken


def _others_seconds() -> float:
    """Seconds of processors that others than this process and its ended children have taken since the system started."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, line[1:9])
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system
