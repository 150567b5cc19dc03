"""The search of a plan: every mesh by a bound of its time, and every choice on those that can be among the fastest."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable
from typing import Any

from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.planning.candidates import batch_sizes, choices, meshes, neighbours
from benchmarks.sharding.planning.entry import Entry, ranked
from benchmarks.sharding.planning.objective import Objective
from benchmarks.sharding.predict.analytic import Analysis
from train.config import RunConfig
from train.parallel.mesh import MESH_AXES, MeshConfig
from transformer.errors import UserError

ENOUGH = 240
"""Layouts that fit, none of which a mesh can beat that is passed over: ten for each that a plan compiles."""
ROUNDS = 3
_TIGHT = 1.4
"""An estimate of memory above a device's by this factor means that the compiled step does not fit either."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search."""

    entries: list[Entry]
    """The layouts that were estimated, best first."""
    passed_over: int
    """Meshes none of whose layouts can be among the `ENOUGH` fastest."""
    stopped: bool
    """Whether it was stopped from the keyboard, and not all layouts were estimated."""
    analysis: Analysis


def search(config: RunConfig, target: Target, objective: Objective = "time") -> Found:
    """The layouts of a config on a target with their estimates, the best that fits first.

    Branch and bound (Land and Doig 1960) by formula: a mesh's bound is the time of its fastest choice, whether it fits or not
    (`_bound`).
    Meshes are taken in the order of their bounds, until `ENOUGH` layouts that fit are faster than the next bound. If memory is
    to be least, all are taken.

    Raises:
        UserError: there is none.
    """
    analysis = Analysis(config)
    bounded: list[tuple[float, int, MeshConfig]] = []
    for mesh in meshes(config, target):
        if (bound := _bound(config, mesh, target, analysis)) is not None:
            bounded.append((bound, len(bounded), mesh))
    if not bounded:
        _refuse(config, target)
    entries: list[Entry] = []
    # The largest of the `ENOUGH` smallest times, negative since a heap's first is its smallest.
    fastest: list[float] = []
    passed_over, stopped = 0, False
    try:
        for bound, _, mesh in sorted(bounded):
            if objective != "memory" and len(fastest) == ENOUGH and -fastest[0] < bound:
                passed_over += 1
                continue
            for one in choices(config, mesh, target):
                entry = Entry(one, analysis.estimate(one, target))
                entries.append(entry)
                if entry.fits(target):
                    push = heapq.heappush if len(fastest) < ENOUGH else heapq.heappushpop
                    push(fastest, -entry.seconds)
    except KeyboardInterrupt:
        if not entries:
            raise
        stopped = True
    return Found(ranked(entries, target, objective), passed_over, stopped, analysis)


def _bound(config: RunConfig, mesh: MeshConfig, target: Target, analysis: Analysis) -> float | None:
    """Seconds that no choice on the mesh is faster than, by formula: the least of those in one microbatch and with all logits at
    once, as more of either take longer. None if no choice divides the batch."""
    whole = dataclasses.replace(config, loss=dataclasses.replace(config.loss, chunk=None))
    found = list(choices(whole, mesh, target))
    least = min((one.microbatches for one in found), default=0)
    return min((analysis.estimate(one, target).seconds for one in found if one.microbatches == least), default=None)


def _refuse(config: RunConfig, target: Target) -> None:
    sizes = " and ".join(map(str, batch_sizes(config, target)))
    if not sizes:
        raise UserError(
            f"plan: no layout over {target.num_devices} devices divides the model; sequence_length {config.sequence_length} "
            "has to be even"
        )
    raise UserError(
        f"plan: no layout over {target.num_devices} devices divides batch_size {config.batch_size}; "
        f"the nearest that one divides: {sizes}"
    )


def promising(
    entries: list[Entry], target: Target, number: int, objective: Objective = "time", *, compiled: bool = True
) -> list[Entry]:
    """The `number` layouts to compile, or to show if nothing is compiled, best first: those that may fit, at most two settings
    of one mesh before others, and at most a sixth of them pipelines, whose many schedules would otherwise fill the list."""
    likely = [entry for entry in entries if entry.estimate.memory <= _TIGHT * target.chip.memory] or entries
    # By time alone: a formula knows little of what microbatches cost, and the compiler decides between settings of one mesh.
    if compiled and objective != "memory":
        likely = sorted(
            likely, key=lambda entry: (entry.seconds * (1 if entry.fits(target) else 1.2), entry.config.microbatches)
        )
    first: list[Entry] = []
    later: list[Entry] = []
    seen: dict[Any, int] = {}
    for entry in likely:
        mesh, most = entry.config.mesh, 2
        key: Any = mesh
        if (mesh.pipeline or 1) > 1:
            key, most = "pipeline", max(number // 6, 1)
        seen[key] = seen.get(key, 0) + 1
        (first if seen[key] <= most else later).append(entry)
    chosen = [*first, *later][:number]
    # The reference for every other layout, whatever its rank by formula.
    plain = next((entry for entry in likely if is_plain(entry.config)), None)
    if plain is not None and plain not in chosen and number > 1:
        chosen[-1] = plain
    return chosen


def improved(
    entries: list[Entry],
    analysis: Analysis,
    target: Target,
    objective: Objective,
    examine: Callable[[list[Entry]], bool],
) -> list[Entry]:
    """The layouts, and the neighbours of the best of them, as long as one of those is better, for up to `ROUNDS` rounds.

    Args:
        examine: compiles layouts, or leaves them at their estimates, and returns whether to stop.
    """
    entries = list(entries)
    for _ in range(ROUNDS):
        best = ranked(entries, target, objective)[0]
        known = {entry.config for entry in entries}
        near = [
            Entry(one, analysis.estimate(one, target)) for one in neighbours(best.config, target) if one not in known
        ]
        near = [entry for entry in near if entry.estimate.memory <= _TIGHT * target.chip.memory]
        if not near or examine(near):
            return [*entries, *near]
        entries += near
        if ranked(entries, target, objective)[0] is best:
            break
    return entries


def is_plain(config: RunConfig) -> bool:
    """Whether every device has the whole model, and its share of the batch."""
    return all((getattr(config.mesh, axis) or 1) == 1 for axis in MESH_AXES if axis != "data")
