"""`manyheads-bench plan --regret`: how much slower a plan's pick is than the best of all layouts that were measured.

For each model and number of devices, the plan is made as for any target; then the layouts that fit run in turn, round by round,
in one process. A layout's time is the median of its quiet rounds.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import record
from benchmarks.sharding.devices.chips import chip_name
from benchmarks.sharding.devices.targets import Target, at_hand
from benchmarks.sharding.planning.candidates import describe
from benchmarks.sharding.planning.entry import Entry, ranked
from benchmarks.sharding.planning.search import improved, is_plain, promising, search
from benchmarks.sharding.predict.ahead import compile_step, examined
from benchmarks.sharding.validation.apart import answer_of, task_at_hand
from benchmarks.sharding.validation.cases import Case, regret_cases
from benchmarks.sharding.validation.quiet import Timing, in_quiet_turns, quiet_rounds
from benchmarks.units import duration
from benchmarks.workload import program_of
from train.parallel.mesh import shard_batch, use_mesh
from transformer.errors import UserError, first_line, nearest

LAYOUTS = 16
"""The most layouts that are measured of one case."""
COMPILED = 8
"""Layouts that the plan of a case compiles; those near the best of them come on top."""
_PATIENCE = 30.0
"""Seconds to wait for rounds that other processes do not disturb."""


def run(
    only: list[str] | None = None, layouts: int = LAYOUTS, rounds: int = 6, output: str | None = None
) -> dict[str, Any]:
    """Plan, measure and compare each case; print and record each pick's loss against the best layout.

    Args:
        only: titles of cases, or beginnings of them; all by default.
        layouts: the most that are measured of a case: those that the plan compiled, and others drawn at random.
        rounds: turns of each layout.
        output: folder of the record; by default that of the published ones, where all cases ran.

    Raises:
        UserError: no such case, the CPU has no profile, or a case failed.
    """
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    kind = "cpu" if on_cpu else chip_name(device)
    cases = {case.title: case for case in regret_cases(device.platform, jax.device_count())}
    chosen = _chosen(list(cases), only)
    found = []
    for title in chosen:
        case = cases[title]
        target = dataclasses.replace(at_hand(kind, case.devices), dtype=case.config.model.dtype)
        task = {"title": title, "target": dataclasses.asdict(target), "layouts": layouts, "rounds": rounds}
        one = answer_of("regret", task, title)
        found.append(one)
        print(sentence(one), flush=True)
    result = {"regret": {"kind": kind, "basis": at_hand(kind, 1).basis, "cases": found} | summed(found)}
    print(total(result["regret"]))
    command = shlex.join(["manyheads-bench", "plan", "--regret", *(["--only", *only] if only else [])])
    folder = record.report_folder(output) if only or output else None
    record.save("regret", command, result, show=False, folder=folder)
    return result


def _chosen(titles: list[str], only: list[str] | None) -> list[str]:
    if only is None:
        return titles
    for name in only:
        if not any(title.startswith(name) for title in titles):
            raise UserError(f"--only: got {name!r}; allowed: {'; '.join(titles)}.{nearest(name, titles)}")
    return [title for title in titles if any(title.startswith(name) for name in only)]


def summed(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst loss, how many are within 5%, and the worst of plain data parallelism in the plan's place."""
    losses = sorted(one["regret"] for one in cases)
    return {
        "worst": losses[-1],
        "within_5_percent": sum(loss <= 0.05 for loss in losses),
        "plain_worst": max((one["plain_regret"] for one in cases if one["plain_regret"] is not None), default=None),
    }


def sentence(case: dict[str, Any]) -> str:
    """One case in words."""
    return (
        f"{case['title']} on {case['devices']} devices: the plan's pick ({case['pick']}) takes {duration(case['pick_seconds'])}, "
        f"the best of {case['measured']} layouts ({case['best']}) {duration(case['best_seconds'])}: {case['regret']:+.1%}; "
        f"rank correlation {case['rank_correlation']:.2f}"
    )


def total(regret: dict[str, Any]) -> str:
    """All cases in words."""
    worst = regret["plain_worst"]
    plain = "" if worst is None else f"; data parallelism that recomputes nothing: at worst {worst:.0%}"
    return (
        f"within 5% of the best layout in {regret['within_5_percent']} of {len(regret['cases'])} cases, at worst "
        f"{regret['worst']:.1%} slower" + plain
    )


def answer() -> None:
    """Plan and measure the case in the input, in this process, and print what was found as JSON."""
    task, case, target = task_at_hand(regret_cases)
    print(json.dumps(measured(case, target, task["layouts"], task["rounds"])))


def measured(case: Case, target: Target, layouts: int, rounds: int, number: int = COMPILED) -> dict[str, Any]:
    """The plan's pick for a case, and the measured time of it and of others.

    Args:
        number: of layouts that the plan compiles.
    """
    found = search(case.config, target)
    # On a CPU the steps take turns later; an accelerator hardly knows other work, and has memory for the state of one.
    on_cpu = target.chip.platform == "cpu"
    steps: dict[str, tuple[Entry, Callable[[], None]]] = {}
    timings: dict[str, Timing] = {}
    devices = jax.devices()[: target.num_devices]

    def examine(entries: list[Entry]) -> bool:
        for entry in entries:
            if (step := _step(entry, case, target, devices)) is not None:
                name = describe(entry.config)
                steps[name] = (entry, step)
                if not on_cpu:
                    timings[name] = quiet_rounds(step, rounds, 1.0)
                    steps[name] = (entry, _nothing)
        return False

    planned = promising(found.entries, target, number)
    examine(planned)
    if not steps:
        raise UserError(f"plan --regret: no layout of {case.title} runs on {target.name}")
    improved([entry for entry, _ in steps.values()], found.analysis, target, "time", examine)
    pick = describe(ranked([entry for entry, _ in steps.values()], target)[0].config)
    rest = [entry for entry in found.entries if describe(entry.config) not in steps and entry.fits(target)]
    # What most people would run without a plan.
    plain = [entry for entry in found.entries if is_plain(entry.config) and entry.config.model.remat == "none"][:1]
    examine([entry for entry in plain if entry in rest])
    order = np.random.default_rng(0).permutation(len(rest))[: max(layouts - len(steps), 0)]
    examine([rest[index] for index in order if describe(rest[index].config) not in steps])
    if on_cpu:
        timings = in_quiet_turns({name: step for name, (_, step) in steps.items()}, rounds, patience=_PATIENCE)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    best = min(seconds, key=lambda name: seconds[name])
    names = [describe(entry.config) for entry in plain]
    predicted = [steps[name][0].seconds for name in seconds]
    return {
        "title": case.title,
        "devices": target.num_devices,
        "feasible": sum(entry.fits(target) for entry in found.entries),
        "measured": len(seconds),
        "pick": pick,
        "pick_seconds": seconds[pick],
        "best": best,
        "best_seconds": seconds[best],
        "regret": seconds[pick] / seconds[best] - 1,
        "plain_regret": next((seconds[name] / seconds[best] - 1 for name in names if name in seconds), None),
        "rank_correlation": _rank_correlation(predicted, list(seconds.values())),
        "layouts": [
            {"layout": name, "measured_seconds": seconds[name], "predicted_seconds": steps[name][0].seconds}
            for name in sorted(seconds, key=lambda name: seconds[name])
        ],
    }


def _step(entry: Entry, case: Case, target: Target, devices: list[Any]) -> Callable[[], None] | None:
    """A function that runs a step of the layout; None if it does not compile, fit or run. The entry gets its compiled figures."""
    config = entry.config
    try:
        program = program_of(config, devices)
        step, seconds = compile_step(program)
        entry.compiled = examined(step, seconds, program.mesh, target)
        if not entry.compiled.fits:
            return None
        with use_mesh(program.mesh, config.mesh.rules):
            batch = shard_batch(case.batch(), program.batch_sharding)
            state = program.init_for_step()

            def take() -> None:
                nonlocal state
                state, _ = step(state, batch)
                jax.block_until_ready(state)

            take()
    except Exception as error:
        # The plan, too, passes over a layout that is refused.
        print(f"{describe(config)}: {first_line(error)}", file=sys.stderr)
        return None
    return take


def _nothing() -> None:
    """In the place of a step whose state was given back."""


def _rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, of two lists of equal length."""
    if len(first) < 2:
        return 1.0
    one, other = (np.argsort(np.argsort(values)).astype(float) for values in (first, second))
    return float(np.corrcoef(one, other)[0, 1])
