"""Report of a plan: a table in the terminal, and a page with the table and a picture of time over memory."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.sharding.planning import largest, timeline_report
from benchmarks.sharding.planning.legend import NARROW, NARROWEST, TEXT, heads, legend, ties, times_of, verdict
from benchmarks.units import amount, duration
from train.report.page import DARK, LIGHT_AND_DARK, page, svg, table
from transformer.interpret.capture import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
WIDE = 144
"""Terminal width from which a table has all of its columns."""
SLIM = 78
"""Terminal width below which it has only the fewest."""


def show(result: dict[str, Any], console: Console, most: int = 12) -> None:
    """Print the best layouts, what the columns mean, the bound of the first layout, and the layouts that are too large."""
    grid = Table(
        title=f"{result['config']} on {result['target']}", title_justify="left", box=box.SIMPLE_HEAD,
        padding=(0, 1) if console.width >= WIDE else (0, 0, 0, 1), pad_edge=False,
    )  # fmt: skip
    # If not all columns fit, only the most important ones are shown.
    names = heads(result)
    kept = names if console.width >= WIDE else NARROW if console.width >= SLIM else NARROWEST
    shown = [index for index, head in enumerate(names) if head in kept]
    for index in shown:
        head = names[index]
        wraps = head == "layout"
        grid.add_column(
            head,
            justify="left" if head in TEXT else "right",
            overflow="fold",
            no_wrap=not wraps,
            ratio=1 if wraps else None,
        )
    good = [row for row in result["layouts"] if row["fits"]]
    for number, row in enumerate(good[:most], 1):
        cells = cells_of(result, number, row)
        grid.add_row(*(cells[index] for index in shown))
    if good:
        console.print(grid)
        for head, text in legend(result).items():
            if head in {names[index] for index in shown}:
                console.print(f"{head}: {text}", highlight=False)
        console.print(ties(result), highlight=False)
    if len(good) > most:
        console.print(f"{len(good) - most} more layouts that fit are in the report.")
    for line in sentences(result):
        console.print(line, highlight=False)
    if explained := result.get("explained"):
        console.print()
        for line in explained["sentences"]:
            console.print(line, highlight=False)
        if explained["stages"]:
            stages = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
            for index, head in enumerate(["stage", *explained["heads"][1:]]):
                stages.add_column(head, justify="right" if index else "left", overflow="fold")
            for row in explained["stages"]:
                stages.add_row(*row)
            console.print(stages)


def sentences(result: dict[str, Any]) -> list[str]:
    """The figures in sentences."""
    good = [row for row in result["layouts"] if row["fits"]]
    large = [row for row in result["layouts"] if not row["fits"] and (row["compiled"] or {}).get("over", 1)]
    lines = []
    source = f"{result['compiled']} of {result['considered']} layouts compiled by the target's compiler"
    if kept := result.get("kept_from_before"):
        source += f", {kept} of them cached"
    source += f", in {result['seconds']:.0f} s"
    if not result["compiled"]:
        source = f"{result['considered']} layouts. Formula estimate only; never checked on this hardware"
    lines.append(source + ("; stopped early" if result["stopped"] else "") + ".")
    if failed := result["failed"]:
        lines.append(f"{len(failed)} layouts failed to compile; the first error: {failed[0]}")
    if not good:
        nearest = min(large, key=lambda row: row["memory"] or float("inf"), default=None)
        lines.append("No layout fits." + (f" Nearest: {nearest['layout']}, {memory_of(nearest)}." if nearest else ""))
        return lines
    best = good[0]
    lines.append(
        f"Best: {best['layout']}: {duration(best['seconds'])} a step, {best['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {best['mfu']:.1%}, {readable(int(best['memory']))} of {readable(int(result['device_memory']))} a device; "
        f"bound by {bound_of(best)}."
    )
    if best["compiled"] and best["compiled"]["prediction"].get("uncounted_loops"):
        count = best["compiled"]["prediction"]["uncounted_loops"]
        lines.append(
            f"The program has {count} loops of unknown length, each counted once, so it takes longer than predicted."
        )
    if "training" in result:
        training = result["training"]
        days, hours = training["days"], training["device_hours"]
        took = (
            f"{days:.1f} days, {hours:,.0f} device-hours"
            if days >= 1
            else f"{24 * days:.2g} hours, {hours:.2g} device-hours"
        )
        cost = "" if training.get("cost") is None else f", and cost {training['cost']:,.2f}"
        lines.append(f"{training['tokens']:.3g} tokens take {took}{cost}.")
    lines += [f"Too large: {row['layout']}, {memory_of(row)}." for row in large[:3]]
    if "largest" in result:
        lines += largest.sentences(result["largest"])
    if basis := result.get("basis"):
        lines.append(f"Times rest on {basis}.")
    return [*lines, verdict(result)]


def memory_of(row: dict[str, Any]) -> str:
    """The memory that a layout needs which does not fit, and its largest part."""
    estimate, compiled = row["estimate"], row["compiled"]
    parts = {name: estimate[name] for name in ("parameters", "gradients", "optimizer", "activations", "gathered")}
    most = max(parts, key=lambda part: parts[part])
    over = f", {readable(int(compiled['over']))} too much" if compiled and compiled["over"] else ""
    return f"{readable(int(row['memory']))}{over}, most of it {most} ({readable(int(parts[most]))} by formula)"


def bound_of(row: dict[str, Any]) -> str:
    """What a layout's time is bound by."""
    if row["compiled"] and row["compiled"]["prediction"]:
        return row["compiled"]["prediction"]["bound"]
    times = times_of(row)
    parts = {"matmul": times["matmul"], "memory": times["memory-bound"], "links": times["exposed"]}
    return max(parts, key=lambda part: parts[part])


def cells_of(result: dict[str, Any], number: int, row: dict[str, Any]) -> list[str]:
    """A layout's cells, one for each of `heads`."""
    parts = times_of(row)
    times = [parts[name] for name in ("matmul", "memory-bound", "sent", "exposed")]
    cells = [
        str(number), row["layout"], duration(row["seconds"]), f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}",
        readable(int(row["memory"])), *map(duration, times), bound_of(row),
    ]  # fmt: skip
    return [*cells, f"{row['cost']:,.2f}"] if result.get("price") else cells


def write(result: dict[str, Any], path: Path) -> None:
    """Write the page."""
    good = [row for row in result["layouts"] if row["fits"]]
    bad = [row for row in result["layouts"] if not row["fits"]]
    parts = [DARK, "".join(f"<p>{html.escape(line)}</p>" for line in sentences(result)), picture(result)]
    if good:
        cells, names = [cells_of(result, number, row) for number, row in enumerate(good, 1)], heads(result)
        text = [names.index(head) for head in TEXT]
        of = f" (of {fitting} by formula)" if (fitting := result.get("fitting", 0)) > len(good) else ""
        parts.append(f"<h2>{len(good)} layouts that fit{of}</h2>" + table(names, cells, text=text, long=(1,)))
        terms = "".join(
            f"<li><b>{html.escape(head)}</b>: {html.escape(what)}</li>" for head, what in legend(result).items()
        )
        parts.append(f"<ul>{terms}</ul><p>{html.escape(ties(result))}</p>")
    if explained := result.get("explained"):
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in explained["sentences"])
        title = "Layouts {} and {} compared".format(*explained["numbers"])
        parts.append(f"<h2>{title}</h2>{lines}" + table(explained["heads"], explained["rows"], text=(0,)))
        if explained["stages"]:
            parts.append(
                "<h3>By stage of the step</h3>"
                + table(["stage", *explained["heads"][1:]], explained["stages"], text=(0,))
            )
    parts.append(timeline_report.steps(result))
    if bad:
        rows = [
            [row["layout"], memory_of(row) if row["memory"] else "", (row["compiled"] or {}).get("error") or ""]
            for row in bad
        ]
        columns = ["layout", "memory", "message"][: 3 if any(message for *_, message in rows) else 2]
        cells = [row[: len(columns)] for row in rows]
        parts.append("<h2>Layouts that do not fit</h2>" + table(columns, cells, text=(0,), long=(1, 2)))
    best = good[0]["compiled"] if good else None
    if best and best["collectives"]:
        rows = [
            [one["kind"], one["dtype"], str(one["devices"]), str(one["count"]), amount(one["bytes"])]
            for one in best["collectives"]
        ]
        columns = ["collective", "numbers", "devices", "times a step", "sent by a device"]
        parts.append("<h2>Communication of the best layout</h2>" + table(columns, rows, text=(0, 1)))
    path.write_text(page(f"{result['config']} on {result['target']}", parts), encoding="utf-8")


def picture(result: dict[str, Any]) -> str:
    """Step time over memory, one dot per layout, with the device's limit."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LIGHT_AND_DARK):
        return svg(_scattered(result, Figure(figsize=(9, 3.8), layout="constrained")))


def _scattered(result: dict[str, Any], figure: Figure) -> Figure:
    axes = figure.subplots()
    for fits, color, label in ((True, "#1f5fbf", "fits"), (False, "#d1495b", "too large")):
        rows = [row for row in result["layouts"] if row["memory"] and row["fits"] == fits]
        if rows:
            memory, seconds = ([row[name] for row in rows] for name in ("memory", "seconds"))
            axes.scatter(
                [one / GIB for one in memory], [one * 1e3 for one in seconds], color=color, alpha=0.75, label=label
            )
    if max(row["memory"] or 0 for row in result["layouts"]) > 0.2 * result["device_memory"]:
        limit = result["device_memory"] / GIB
        axes.axvline(limit, color="#d1495b", linestyle="--", linewidth=1, label="the device's memory")
    axes.set(xlabel="GiB a device", ylabel="ms a step")
    axes.margins(0.06, 0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
