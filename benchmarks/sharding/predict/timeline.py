"""A predicted training step over time, as plain data: what is computed when, what is sent, and what is in memory.

A timeline has these entries; times are seconds from the start of the step, and memory is bytes of one device:

- `seconds`: of the step
- `segments`: what is computed, without gaps or overlaps. Each has the `stage` of the model and the `phase` (forward, recomputed,
  backward, optimiser), `start`, `end`, seconds by `parts`, the `trips` of a loop (0: it is none), and the `turn` of the
  loop over microbatches in which it is ("" outside)
- `stages`: seconds by part of each stage and phase, before small segments are merged
- `communication`: each with `kind`, `link`, `start`, `end`, `seconds`, of which `exposed`, and the `count` of executions
- `memory`: `times`, the bytes by kind from each of them on (`kinds`), those `at_peak`, the `peak`, and the `compiler`'s figure
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks.sharding.predict.array_kinds import KINDS, phase_of
from benchmarks.sharding.predict.liveness import Frame, lifetimes
from benchmarks.sharding.predict.roofline import Costs
from train.program.hlo import Instruction, Module, pass_of, scopes_of

PARTS = ("matrix products", "memory-bound", "gaps", "exposed communication")
MOST = 60
"""Segments of a step, and entries of its communication, at most."""
SAMPLES = 120
"""Intervals of the step of which the memory is kept."""
_SMALL = 0.002
"""Segments shorter than this fraction of the step are merged into a neighbour."""
_TURNS = 4
"""Turns of a loop over microbatches that are shown one by one; of a longer one the first."""
_BOTH = 0.05
"""A loop of which both the forward and the backward pass take this fraction is a loop over microbatches."""
_NAMES = {"embed": "embedding", "optimizer": "optimiser"}
_START = "first touch of memory"


@dataclasses.dataclass
class _Piece:
    """An instruction's part of the step, or several that follow each other."""

    stage: str
    phase: str
    turn: str
    trips: float
    parts: np.ndarray
    """Seconds, [parts]."""
    memory: np.ndarray
    """Bytes at its peak, [kinds]."""

    @property
    def key(self) -> tuple[str, str, str, float]:
        return self.turn, self.stage, self.phase, self.trips

    @property
    def seconds(self) -> float:
        return float(self.parts.sum())


def timeline_of(module: Module, costs: Costs, *, compiler: float, platform: str = "gpu") -> dict[str, Any]:
    """The timeline of a compiled step.

    Args:
        costs: the predicted times of its instructions.
        compiler: the compiler's figure of the step's memory, arguments and temporary memory, in bytes.
        platform: of the target. A TPU's arrays may be in memory on the chip, which is not counted.
    """
    walk = _Walk(module, costs)
    frame = lifetimes(module, (1, 2, 3, 4, 5) if platform == "tpu" else (5,))
    pieces = _named(list(walk.pieces(module.entry, frame, np.zeros(len(KINDS)), "")))
    if costs.first_touch:
        parts = np.zeros(len(PARTS))
        parts[1] = costs.first_touch
        pieces.insert(0, _Piece(_START, "forward", "", 0, parts, np.zeros(len(KINDS))))
    stages: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(len(PARTS)))
    for one in pieces:
        stages[title(one.stage, one.phase)] += one.parts
    segments = _merged([one for one in pieces if one.seconds > 0])
    ends = list(itertools.accumulate(one.seconds for one in segments))
    total = ends[-1] if ends else 0.0
    peak = frame.peak()
    return {
        "seconds": total,
        "segments": [
            {
                "stage": one.stage, "phase": one.phase, "turn": one.turn, "trips": one.trips, "start": end - one.seconds,
                "end": end, "parts": dict(zip(PARTS, one.parts.tolist(), strict=True)),
            }
            for one, end in zip(segments, ends, strict=True)
        ],
        "stages": {
            name: dict(zip(PARTS, parts.tolist(), strict=True)) for name, parts in stages.items() if parts.sum() > 0
        },
        "communication": _fewer(walk.sent(costs.first_touch), total),
        "memory": _sampled(pieces, total)
        | {"at_peak": _by_kind(peak), "peak": float(peak.sum()), "compiler": float(compiler)},
    }  # fmt: skip


def title(stage: str, phase: str) -> str:
    """A stage of the model in a pass, in words."""
    return stage if phase == "optimiser" or stage == _START else f"{stage} {phase}"


class _Walk:
    """Goes through a program in the order of its execution, with a clock."""

    def __init__(self, module: Module, costs: Costs) -> None:
        self.module, self.costs = module, costs
        self.clock = 0.0
        self.waits: dict[tuple[str, str], list[Any]] = collections.defaultdict(list)
        self.starts: dict[tuple[str, str], list[Any]] = collections.defaultdict(list)
        for number, transfer in enumerate(costs.transfers):
            self.starts[transfer.where, transfer.span[0]].append(number)
            self.waits[transfer.where, transfer.span[1]].append(number)
        self._begun: dict[int, float] = {}
        self._sent: list[dict[str, Any]] = []

    def pieces(self, where: str, frame: Frame, base: np.ndarray, turn: str) -> Iterator[_Piece]:
        """A piece for each instruction of a computation; loops over microbatches and calls are gone into."""
        for index, one in enumerate(self.module.computations[where].values()):
            inner = frame.inner.get(index)
            around = base + frame.own[index]
            if one.opcode == "call" and inner is not None:
                yield from self.pieces(one.called or "", inner, around, turn)
            elif one.opcode == "while" and inner is not None and self._has_both_passes(one, where):
                trips = self.module.trips(one)
                shown = int(trips) if trips <= _TURNS and trips == int(trips) else 1
                for number in range(shown):
                    yield from self.pieces(one.called or "", inner, around, f"{number + 1} of {trips:g}")
                if trips > shown:
                    rest = f"{shown + 1} to {trips:g} of {trips:g}"
                    yield self._closed(where, one, frame.at(index) + base, rest, (trips - shown) / trips)
            else:
                yield self._closed(where, one, frame.at(index) + base, turn, 1.0)

    def _closed(self, where: str, one: Instruction, memory: np.ndarray, turn: str, fraction: float) -> _Piece:
        """An instruction with all that it executes; of a loop this fraction of its trips."""
        loop = one.opcode == "while"
        parts = np.zeros(len(PARTS))
        inside: dict[tuple[str, str], np.ndarray] = collections.defaultdict(lambda: np.zeros(3))
        ended = []
        for times, place, each in self.module.expanded(where, one, fraction):
            if (cost := self.costs.operations.get((place, each.name))) is not None:
                parts[0 if cost.product else 1] += times * cost.seconds
                parts[2] += times * cost.gap
            for number in self.starts.get((place, each.name), ()):
                self._begun[number] = self.clock
            for number in self.waits.get((place, each.name), ()):
                sent = self.costs.transfers[number]
                share = times / sent.count
                parts[3] += share * sent.exposed
                if place == where and not loop:
                    ended.append((sent, number))
                else:
                    inside[sent.kind, sent.link] += np.array([share * sent.seconds, share * sent.exposed, times])
        start, self.clock = self.clock, self.clock + float(parts.sum())
        for sent, number in ended:
            begun, seconds = self._begun[number], sent.seconds / sent.count
            # What is hidden whole ends before it is waited for.
            end = self.clock if sent.exposed else min(begun + seconds, self.clock)
            self._sent.append(_sending(sent.kind, sent.link, begun, end, seconds, sent.exposed / sent.count, 1))
        for (kind, link), (seconds, exposed, count) in inside.items():
            self._sent.append(_sending(kind, link, start, self.clock, seconds, exposed, count))
        trips = self.module.trips(one) * fraction if loop else 0.0
        scopes = scopes_of(one)
        phase = phase_of(one)
        stage = _NAMES.get(scopes[0], scopes[0].replace("_", " ")) if scopes and phase else ""
        return _Piece(stage, phase or "", turn, trips, parts, memory)

    def sent(self, offset: float) -> list[dict[str, Any]]:
        """All communication that was met, by its start."""
        found = [one | {"start": one["start"] + offset, "end": one["end"] + offset} for one in self._sent]
        return sorted(found, key=lambda one: one["start"])

    def _has_both_passes(self, loop: Instruction, where: str) -> bool:
        """Whether a loop is over microbatches: not inside a stage of the model, but around all of them."""
        seconds: dict[str, float] = collections.defaultdict(float)
        for times, place, each in self.module.expanded(where, loop):
            if (cost := self.costs.operations.get((place, each.name))) is not None:
                seconds[pass_of(each) if scopes_of(each) else ""] += times * cost.seconds
        whole = sum(seconds.values())
        return min(seconds["forward"], seconds["backward"]) > _BOTH * whole and "layers" not in scopes_of(loop)


def _sending(
    kind: str, link: str, start: float, end: float, seconds: float, exposed: float, count: float
) -> dict[str, Any]:
    return {
        "kind": kind, "link": link, "start": start, "end": max(end, start), "seconds": float(seconds),
        "exposed": float(exposed), "count": float(count),
    }  # fmt: skip


def _named(pieces: list[_Piece]) -> list[_Piece]:
    """Pieces whose origin the compiler does not name are counted with those before them, the first with those after."""
    known = next((one for one in pieces if one.phase and one.stage), None)
    for one in pieces:
        if one.phase and one.stage:
            known = one
        else:
            one.stage = one.stage or (known.stage if known and (not one.phase or one.phase == known.phase) else "other")
            one.phase = one.phase or (known.phase if known else "forward")
    return pieces


def _merged(pieces: Iterable[_Piece]) -> list[_Piece]:
    """Neighbours of one stage as one, and small ones as part of a neighbour."""
    found: list[_Piece] = []

    def put(one: _Piece) -> None:
        if found and found[-1].key == one.key and not one.trips:
            found[-1] = _joined(found[-1], one, found[-1])
        else:
            found.append(one)

    for one in pieces:
        put(one)
    total = sum(one.seconds for one in found)
    while len(found) > 1:
        smallest = min(range(len(found)), key=lambda index: found[index].seconds)
        if len(found) <= MOST and found[smallest].seconds >= _SMALL * total:
            break
        near = [index for index in (smallest - 1, smallest + 1) if 0 <= index < len(found)]
        beside = max(near, key=lambda index: (found[index].turn == found[smallest].turn, found[index].seconds))
        first = min(smallest, beside)
        joined = _joined(found[first], found[first + 1], found[beside])
        rest = found[first + 2 :]
        del found[first:]
        for one in (joined, *rest):
            put(one)
    return found


def _joined(one: _Piece, other: _Piece, name: _Piece) -> _Piece:
    memory = max(one.memory, other.memory, key=lambda bytes_: bytes_.sum())
    return dataclasses.replace(name, parts=one.parts + other.parts, memory=memory)


def _fewer(sent: list[dict[str, Any]], total: float) -> list[dict[str, Any]]:
    """At most `MOST` entries: of those that follow each other with the shortest pauses and are of one kind, one."""
    by_lane: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for one in sent:
        by_lane[one["kind"], one["link"]].append(one)
    pause = 0.0
    while True:
        found = []
        for ones in by_lane.values():
            lane: list[dict[str, Any]] = []
            for one in ones:
                if lane and one["start"] - lane[-1]["end"] <= pause and pause:
                    last = lane[-1]
                    sums = {name: last[name] + one[name] for name in ("seconds", "exposed", "count")}
                    lane[-1] = last | sums | {"end": max(last["end"], one["end"])}
                else:
                    lane.append(one)
            found += lane
        if len(found) <= MOST or pause >= total:
            return sorted(found, key=lambda one: one["start"])
        pause = 2 * pause or 1e-4 * total


def _sampled(pieces: list[_Piece], total: float) -> dict[str, Any]:
    """Memory over time: in each of `SAMPLES` intervals the peak."""
    most: dict[int, np.ndarray] = {}
    clock = 0.0
    for one in pieces:
        first = int(SAMPLES * clock / total) if total else 0
        clock += one.seconds
        last = int(SAMPLES * clock / total * (1 - 1e-9)) if total else 0
        for index in range(min(first, SAMPLES - 1), min(max(first, last), SAMPLES - 1) + 1):
            if index not in most or most[index].sum() < one.memory.sum():
                most[index] = one.memory
    # An interval like the one before it is left out.
    kept = [
        index for index in sorted(most) if index - 1 not in most or not np.array_equal(most[index], most[index - 1])
    ]
    return {
        "times": [index * total / SAMPLES for index in kept],
        "kinds": {name: [float(most[index][number]) for index in kept] for number, name in enumerate(KINDS)},
    }


def _by_kind(bytes_: np.ndarray) -> dict[str, float]:
    return dict(zip(KINDS, bytes_.tolist(), strict=True))
