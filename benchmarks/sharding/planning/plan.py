"""`manyheads-bench plan`: ranks shardings for accelerators that need not be available, and checks that they fit.

Every layout is estimated by formulas; the most promising are compiled by the target's own compiler, and ranked by the
compiled programs.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from benchmarks import record
from benchmarks.environments import compilers
from benchmarks.sharding.devices.targets import Target, parse_target
from benchmarks.sharding.planning import plan_report, timeline_report
from benchmarks.sharding.planning.candidates import describe
from benchmarks.sharding.planning.compiling import compile_all
from benchmarks.sharding.planning.entry import Entry, ranked
from benchmarks.sharding.planning.explain import explained
from benchmarks.sharding.planning.largest import largest
from benchmarks.sharding.planning.objective import Goal
from benchmarks.sharding.planning.search import improved, is_plain, promising, search
from benchmarks.sharding.predict.ahead import require_any
from benchmarks.sharding.predict.analytic import basis
from benchmarks.units import duration
from train.config import RunConfig, dump, load, to_data
from train.files import writing
from train.report.display import console
from transformer.errors import UserError
from transformer.interpret.capture import readable
from transformer.models.families import flops_per_token

CANDIDATES = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How a plan is made."""

    number: int = CANDIDATES
    """How many layouts to compile."""
    python: str | None = None
    """Interpreter of an environment with the target's compiler; the one installed before by default."""
    install: bool = False
    """Make that environment if there is none."""
    analytic: bool = False
    """Compile nothing."""
    workers: int | None = None
    """Number of processes that compile concurrently."""


AS_USUAL, FASTEST = How(), Goal()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A ranking of layouts."""

    result: dict[str, Any]
    """As plain data."""
    best: Entry
    target: Target
    """With the config's type, and the profile of its kind of device."""
    compiler: str | None
    """The interpreter that has the target's compiler."""


def run(
    path: str,
    target_name: str,
    *,
    overrides: tuple[str, ...] = (),
    how: How = AS_USUAL,
    goal: Goal = FASTEST,
    explain: tuple[int, int] | None = None,
    look_for_largest: bool = False,
    output: str | None = None,
) -> dict[str, Any]:
    """Rank layouts of a config on a target, print them, and write a report, the figures and the best config.

    Args:
        path: of a config, whose batch size is kept.
        explain: the numbers of two layouts of the ranking, whose difference is explained.
        look_for_largest: also find the largest batch and the longest context of the best layout.
        output: folder of the report and the config; `plans` by default.

    Raises:
        UserError: no such target, no layout that divides the model's sizes, no compiler at the given path, or every compile
            failed.
    """
    target, config = parse_target(target_name), load(path, overrides)
    goal = with_price(goal, target)
    if (how.install or how.python) and not how.analytic and not compilers.covers(target.chip.platform, target.kind):
        raise UserError(
            f"{target.name}: no compiler's figures are known for {target.kind}: leave out --install and --compiler-python, and "
            "the plan is by formula"
        )
    folder = record.report_folder(output)
    plan = planned(config, target, how, goal)
    result, best = plan.result, plan.best
    if explain is not None:
        result["explained"] = explained(result, *explain)
    if look_for_largest and result["layouts"][0]["fits"]:
        try:
            result["largest"] = largest(best.config, plan.target, plan.compiler)
        except KeyboardInterrupt:
            # What was found before is written.
            result["stopped"] = True
    name = f"{config.name}_{target.name.replace(':', '_')}"
    fits = result["layouts"][0]["fits"]
    with writing(folder):
        if fits:
            (folder / f"{name}.yaml").write_text(dump(best.config), encoding="utf-8")
        plan_report.write(result, folder / f"{name}.html")
    plan_report.show(result, console())
    written = f"best config: {folder / name}.yaml; " if fits else ""
    print(f"{written}report: {folder / name}.html")
    if result["compiled"]:
        command = " ".join([f"manyheads-bench plan {path} --target {target_name}", *overrides])
        record.save(f"plan_{name}", command, slim(result), show=False, folder=folder)
    return result


def slim(result: dict[str, Any]) -> dict[str, Any]:
    """The result without the timelines of layouts whose steps the report does not draw."""
    drawn = timeline_report.chosen(result["layouts"])
    rows = [
        row if index in drawn or row["compiled"] is None else row | {"compiled": row["compiled"] | {"timeline": None}}
        for index, row in enumerate(result["layouts"])
    ]
    return result | {"layouts": rows}


def with_price(goal: Goal, target: Target) -> Goal:
    """The goal with the price of the target's own file of figures, where none is given.

    Raises:
        UserError: the objective is cost, and there is no price.
    """
    goal = dataclasses.replace(goal, price=goal.price or target.chip.price or None)
    if goal.objective == "cost" and goal.price is None:
        raise UserError(
            f"--objective cost: there is no price for {target.kind}; give one for a device and hour: --price 2.5"
        )
    return goal


def planned(config: RunConfig, target: Target, how: How, goal: Goal) -> Plan:
    """The layouts of a config on a target, by formula, the most promising also by the target's compiler.

    Raises:
        UserError: as `run`.
    """
    target = dataclasses.replace(target, dtype=config.model.dtype).profiled()
    compiler, why = compiler_of(target, how)
    start = time.monotonic()
    found = search(config, target, goal.objective)
    entries = found.entries
    chosen = promising(entries, target, how.number, goal.objective, compiled=compiler is not None)
    fitting = sum(entry.fits(target) for entry in entries)
    first = entries[0]
    slower = f" ({found.passed_over:,} meshes are slower in any case)" if found.passed_over else ""
    print(
        f"{config.name} on {target.name}: {len(entries):,} layouts by formula in {time.monotonic() - start:.1f} s{slower}, "
        f"{fitting:,} of them fit; the best is {describe(first.config)}: "
        f"{duration(first.seconds)}, {readable(int(first.memory))} a device",
        flush=True,
    )
    if why and not found.stopped:
        print(f"this plan is by formula only: {why}", flush=True)
    stopped, kept = found.stopped, 0

    def examine(some: list[Entry]) -> bool:
        nonlocal stopped, kept
        if compiler is not None:
            stopped, before = compile_all(
                some, target, compiler, how.workers or min(os.cpu_count() or 1, 4), goal.objective
            )
            kept += before
        return stopped

    if not stopped and not examine(chosen):
        if compiler is not None:
            require_any((entry.compiled for entry in chosen), target)
        chosen = improved(chosen, found.analysis, target, goal.objective, examine)
    considered = len({entry.config for entry in (*entries, *chosen)})
    seconds = time.monotonic() - start
    result = summarised(config, target, chosen, goal, considered, seconds, stopped, kept)
    result["fitting"] = fitting
    if compiler is not None:
        result["compiler"] = compilers.versions_of(compiler)
    return Plan(result, ranked(chosen, target, goal.objective)[0], target, compiler)


def compiler_of(target: Target, how: How) -> tuple[str | None, str]:
    """The interpreter of the target's compiler, or why there is none; neither if nothing is to be compiled.

    Raises:
        UserError: the interpreter that is given does not run, or has no compiler, or none could be installed.
    """
    if how.analytic:
        return None, ""
    if not compilers.covers(target.chip.platform, target.kind):
        return None, f"no compiler's figures are known for {target.kind}"
    found = compilers.find(target.chip.platform, how.python, make=how.install)
    return found, "" if found else compilers.absent(target.chip.platform)


def summarised(
    config: RunConfig, target: Target, entries: list[Entry], goal: Goal, considered: int, seconds: float, stopped: bool,
    kept: int,
) -> dict[str, Any]:  # fmt: skip
    """The ranking as plain data."""
    per_step = config.batch_size * config.sequence_length
    flops = 3 * flops_per_token(config.model, config.sequence_length) * per_step
    rows: list[dict[str, Any]] = []
    has_compiled = any(entry.compiled is not None for entry in entries)
    for entry in ranked(entries, target, goal.objective):
        if has_compiled and entry.compiled is None:
            continue
        compiled = dataclasses.asdict(entry.compiled) if entry.compiled is not None else None
        rows.append(
            {
                "layout": describe(entry.config),
                "mesh": {name: value for name, value in to_data(entry.config)["mesh"].items() if value is not None},
                "remat": entry.config.model.remat,
                "plain": is_plain(entry.config),
                "scan_layers": getattr(entry.config.model, "scan_layers", None),
                "chunk": entry.config.loss.chunk,
                "microbatches": entry.config.microbatches,
                "fits": entry.fits(target),
                "seconds": entry.seconds,
                "tokens_per_second": per_step / entry.seconds,
                "mfu": flops / entry.seconds / (target.num_devices * target.peak_flops),
                "cost": goal.cost(1e9 / per_step * entry.seconds, target.num_devices),
                "memory": entry.memory,
                "estimate": dataclasses.asdict(entry.estimate) | {"memory": entry.estimate.memory},
                "compiled": compiled,
            }
        )
    result: dict[str, Any] = {
        "config": config.name,
        "target": target.name,
        "devices": target.num_devices,
        "device_memory": target.chip.memory,
        "objective": goal.objective,
        "price": goal.price,
        "basis": target.basis if has_compiled else basis(target),
        "tokens_per_step": per_step,
        "considered": considered,
        "compiled": sum(entry.compiled is not None and not entry.compiled.failed for entry in entries),
        "failed": [entry.compiled.error for entry in entries if entry.compiled is not None and entry.compiled.failed],
        "seconds": seconds,
        "stopped": stopped,
        "kept_from_before": kept,
        "layouts": rows,
    }
    if goal.tokens is not None and rows:
        took = goal.tokens / float(rows[0]["tokens_per_second"])
        result["training"] = {
            "tokens": goal.tokens, "days": took / 86400, "device_hours": took / 3600 * target.num_devices,
            "cost": goal.cost(took, target.num_devices),
        }  # fmt: skip
    return result
