"""`manyheads-bench plan --compare A,B,...`: the best layout of each of several targets, in one table.

All targets are estimated by formula first, then compiled where a compiler is at hand.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.sharding.devices.targets import Target, parse_target
from benchmarks.sharding.planning.legend import verdict
from benchmarks.sharding.planning.objective import Goal, in_order
from benchmarks.sharding.planning.plan import AS_USUAL, FASTEST, How, compiler_of, planned, with_price
from benchmarks.units import duration
from train.config import RunConfig, load
from train.files import writing
from train.report.display import console
from train.report.page import page, table
from transformer.errors import UserError
from transformer.interpret.capture import readable

LEGEND = {
    "target": "kind and number of devices",
    "layout": "the best one, as in the target's own plan",
    "step": "predicted time of a training step",
    "tokens/s": "of all devices together",
    "MFU": "the model's FLOPs, without recomputation, as a fraction of the devices' peak",
    "memory": "peak on one device, and what a device has",
    "source": "compiled by the target's compiler, or by formula; a formula's times tend to be shorter than a compiled program's",
    "cost": "of a billion tokens, by --price",
}
NARROW = ("", "target", "step", "tokens/s", "source", "cost")
WIDE = 130
"""Terminal width from which a table has all of its columns."""


def run(
    path: str,
    names: list[str],
    *,
    overrides: tuple[str, ...] = (),
    how: How = AS_USUAL,
    goal: Goal = FASTEST,
    prices: Mapping[str, float] | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Compare targets by their best layouts; print the table, and write a page and the figures.

    Args:
        names: of targets.
        prices: of a device-hour, by kind of device.
        output: folder of the report; `plans` by default.

    Raises:
        UserError: no such target, or no price of one where the objective is cost.
    """
    config = load(path, overrides)
    targets = [parse_target(name) for name in names]
    goals = {
        one.name: with_price(dataclasses.replace(goal, price=(prices or {}).get(one.kind)), one) for one in targets
    }  # fmt: skip
    folder = record.report_folder(output)
    rows: dict[str, dict[str, Any]] = {}
    stopped = False
    try:
        for target in targets:
            rows[target.name] = row_of(config, target, dataclasses.replace(how, analytic=True), goals[target.name])
        ready = [target for target in targets if _at_hand(target, how, rows[target.name])]
        if ready:
            show(_result(config, goal, rows, stopped), console())
        for target in ready:
            rows[target.name] = row_of(config, target, how, goals[target.name])
            stopped = stopped or rows[target.name].get("stopped", False)
            if stopped:
                break
    except KeyboardInterrupt:
        if not rows:
            raise
        stopped = True
    result = _result(config, goal, rows, stopped)
    show(result, console())
    file = folder / f"compare_{config.name}.html"
    with writing(file):
        write(result, file)
    print(f"report: {file}")
    command = " ".join([f"manyheads-bench plan {path} --compare {','.join(names)}", *overrides])
    record.save(f"compare_{config.name}", command, result, show=False, folder=folder)
    return result


def row_of(config: RunConfig, target: Target, how: How, goal: Goal) -> dict[str, Any]:
    """The best layout of a target, or why there is none."""
    row: dict[str, Any] = {"target": target.name, "devices": target.num_devices, "device_memory": target.chip.memory}
    try:
        plan = planned(config, target, how, goal)
    except UserError as error:
        return row | {"error": str(error), "layouts": 0}
    best = plan.result["layouts"][0]
    if not best["fits"]:
        return row | {"error": f"no layout fits; the nearest needs {readable(int(best['memory']))} a device"}
    kept = {name: best[name] for name in ("layout", "seconds", "tokens_per_second", "mfu", "memory", "cost")}
    return row | kept | {
        "compiled": best["compiled"] is not None, "verdict": verdict(plan.result), "compiler": plan.result.get("compiler"),
        "training": plan.result.get("training"), "stopped": plan.result["stopped"],
    }  # fmt: skip


def _at_hand(target: Target, how: How, row: Mapping[str, Any]) -> bool:
    """Whether a target can be compiled here; says why not."""
    if row.get("layouts") == 0:
        return False
    compiler, why = compiler_of(target, how)
    if why:
        print(f"{target.name}: by formula only: {why}", flush=True)
    return compiler is not None


def _result(config: RunConfig, goal: Goal, rows: Mapping[str, dict[str, Any]], stopped: bool) -> dict[str, Any]:
    good = [row for row in rows.values() if "error" not in row]
    if goal.objective == "cost":
        good = in_order(good, "time", lambda row: row["cost"], lambda row: row["seconds"])
    else:
        good = in_order(good, goal.objective, lambda row: row["seconds"], lambda row: row["memory"])
    bad = [row for row in rows.values() if "error" in row]
    return {"config": config.name, "objective": goal.objective, "stopped": stopped, "targets": [*good, *bad]}


def table_of(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: the cost only with a price, the cost of a training only with its tokens."""
    good = [row for row in result["targets"] if "error" not in row]
    priced = any(row["cost"] is not None for row in good)
    training = any(row["training"] for row in good)
    heads = ["", *(head for head in LEGEND if head != "cost" or priced), *(["training"] if training else [])]
    cells = []
    for number, row in enumerate(good, 1):
        cost = "–" if row["cost"] is None else f"{row['cost']:,.2f}"
        line = [
            str(number), row["target"], row["layout"], duration(row["seconds"]), f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}", f"{readable(int(row['memory']))} of {readable(int(row['device_memory']))}",
            "compiled" if row["compiled"] else "formula", *([cost] if priced else []),
        ]  # fmt: skip
        if training:
            whole = row["training"]
            line.append(f"{whole['days']:,.1f} days" + (f", {whole['cost']:,.0f}" if whole["cost"] is not None else ""))
        cells.append(line)
    return heads, cells


def legend_of(heads: list[str]) -> dict[str, str]:
    """What the columns mean."""
    whole = {"training": "time, and cost if there is a price, of all tokens of --tokens"}
    return {head: text for head, text in (LEGEND | whole).items() if head in heads}


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the table does not say."""
    good = [row for row in result["targets"] if "error" not in row]
    what = {"time": "the time of a step", "cost": "the cost of a token", "memory": "the memory of a device"}
    lines = [f"Targets are ordered by {what[result['objective']]}."]
    lines += [f"{row['target']}: {row['error']}." for row in result["targets"] if "error" in row]
    verdicts: dict[str, list[str]] = {}
    for row in good:
        verdicts.setdefault(row["verdict"], []).append(row["target"])
    lines += [f"{', '.join(targets)}: {text[0].lower()}{text[1:]}" for text, targets in verdicts.items()]
    return lines + (["Stopped early: what was found so far."] if result["stopped"] else [])


def show(result: Mapping[str, Any], out: Console) -> None:
    """Print the table and its legend."""
    heads, cells = table_of(result)
    grid = Table(
        title=f"{result['config']}: targets compared", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    shown = [index for index, head in enumerate(heads) if out.width >= WIDE or head in NARROW]
    for index in shown:
        left = heads[index] in ("target", "layout", "source")
        grid.add_column(heads[index], justify="left" if left else "right", overflow="fold")
    for line in cells:
        grid.add_row(*(line[index] for index in shown))
    if cells:
        out.print(grid)
        for head, text in legend_of([heads[index] for index in shown]).items():
            out.print(f"{head}: {text}", highlight=False)
    for note in notes(result):
        out.print(note, highlight=False)


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write the page."""
    heads, cells = table_of(result)
    parts = ["".join(f"<p>{html.escape(line)}</p>" for line in notes(result))]
    if cells:
        terms = "".join(f"<li><b>{head}</b>: {html.escape(text)}</li>" for head, text in legend_of(heads).items())
        parts += [table(heads, cells, text=(1, 2, 7), long=(2,)), f"<ul>{terms}</ul>"]
    path.write_text(page(f"{result['config']}: targets compared", parts), encoding="utf-8")
