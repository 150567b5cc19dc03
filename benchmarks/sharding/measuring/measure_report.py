"""Report of measured strategies: a table in the terminal, and a page with the table, pictures and communication."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.sharding.predict.least import SYMBOLS
from benchmarks.units import amount
from train.report.page import page, svg, table

HEADS = (
    "strategy", "mesh", "loss error", "gradient error", "ms a step", "min–max", "tokens/s", "MFU", "compile", "state",
    "temporary", "sent", "minimum", "sent ÷ minimum",
)  # fmt: skip
VIRTUAL = "These devices are virtual, parts of one CPU: compare bytes, not milliseconds."


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table, the fastest strategy first, and the strategies that were not possible."""
    title = f"{result['config']}: {result['parameters']:,} parameters on {result['devices']} devices"
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for head in HEADS:
        grid.add_column(head, justify="left" if head in ("strategy", "mesh") else "right")
    for cells in _rows(result):
        grid.add_row(*cells)
    console.print(grid)
    if result["platform"] == "cpu":
        console.print(VIRTUAL, highlight=False)
    for name, why in result["refused"].items():
        console.print(f"{name}: not measured: {why}", highlight=False)


def write(result: dict[str, Any], path: Path) -> None:
    """Write the page."""
    intro = (
        f"{result['parameters']:,} parameters, {result['batch_size']} sequences of {result['length']} tokens a step, on "
        f"{result['devices']} devices. Losses over 5 steps and the first gradient are compared with one device's; times are "
        "medians over rounds; bytes are per device; the minimum is what the strategy must send in theory."
        + (f" {VIRTUAL}" if result["platform"] == "cpu" else "")
    )
    parts = [
        f"<p>{html.escape(intro)}</p>",
        picture(result),
        "<h2>All strategies</h2>",
        table(HEADS, _rows(result), text=(0, 1)),
        f"<p>{html.escape(SYMBOLS)}</p>",
    ]
    heads = ("strategy", "collective", "numbers", "devices", "times a step", "sent by a device")
    rows = [
        [name, one["kind"], one["dtype"], str(one["devices"]), str(one["count"]), amount(one["bytes"])]
        for name, figures in result["strategies"].items()
        for one in figures["collectives"]
    ]
    parts.append("<h2>Communication</h2>" + table(heads, rows, text=(0, 1, 2)))
    rows = [
        [name, one["axis"], one["formula"], amount(one["bytes"])]
        for name, figures in result["strategies"].items()
        for one in figures["least"]
    ]
    parts.append("<h2>Theoretical minimum</h2>" + table(("strategy", "axis", "formula", "bytes"), rows, text=(0, 1, 2)))
    if result["refused"]:
        parts.append(
            "<h2>Not here</h2>" + table(("strategy", "why"), list(result["refused"].items()), text=(0,), long=(1,))
        )
    path.write_text(page(f"{result['config']} under every strategy", parts), encoding="utf-8")


def picture(result: dict[str, Any]) -> str:
    """Time and memory of every strategy, side by side."""
    from matplotlib.figure import Figure

    names = _fastest_first(result)
    figures = [result["strategies"][name] for name in names]
    figure = Figure(figsize=(11, 0.9 + 0.32 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    times = [one["seconds"]["median"] * 1e3 for one in figures]
    spread = [
        [(one["seconds"]["median"] - one["seconds"]["min"]) * 1e3 for one in figures],
        [(one["seconds"]["max"] - one["seconds"]["median"]) * 1e3 for one in figures],
    ]
    left.barh(names, times, xerr=spread, color="#1f5fbf", height=0.65, error_kw={"elinewidth": 1, "ecolor": "#5a6273"})
    left.set(xlabel="ms a step")
    left.invert_yaxis()
    start = [0.0] * len(names)
    for part, color in (("state", "#0b6b48"), ("temporary", "#93c5a5")):
        sizes = [one["memory"][part] / 1e6 for one in figures]
        right.barh(names, sizes, left=start, color=color, height=0.65, label=part)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    right.set(xlabel="MB a device")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def _fastest_first(result: dict[str, Any]) -> list[str]:
    strategies = result["strategies"]
    return sorted(strategies, key=lambda name: strategies[name]["seconds"]["median"])


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name in _fastest_first(result):
        one = result["strategies"][name]
        seconds, least, sent = one["seconds"], one["least_bytes"], one["sent_bytes"]
        rows.append(
            [
                name, " × ".join(f"{axis} {size}" for axis, size in one["mesh"].items()) or "one device",
                f"{one['loss_difference']:.0e}", f"{one['gradient_difference']:.0e}", f"{seconds['median'] * 1e3:.1f}",
                f"{seconds['min'] * 1e3:.1f}–{seconds['max'] * 1e3:.1f}", f"{one['tokens_per_second']:,.0f}",
                "–" if one["mfu"] is None else f"{one['mfu']:.1%}", f"{one['compile_seconds']:.1f} s",
                amount(one["memory"]["state"]), amount(one["memory"]["temporary"]), amount(sent),
                amount(least), f"{sent / least:.2f}" if least else "–",
            ]
        )  # fmt: skip
    return rows
