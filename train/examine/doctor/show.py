"""Prints a report on a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from train.examine.doctor.report import ATTENTION, COUNT, OPERATIONS, PARTS, Report
from train.report.display import console


def show(report: Report) -> None:
    """Print it."""
    out = console()
    out.print(report.headline(), markup=False, soft_wrap=True)
    out.print(report.utilization(), markup=False, soft_wrap=True)
    out.print()
    out.print(_table("where a step goes", PARTS, report.parts(), text=(0,), last_is_total=True))
    for note in report.notes():
        out.print(f"  {note}", markup=False, soft_wrap=True)
    out.print()
    if rows := report.attention():
        heads = ATTENTION if any(row[2] for row in rows) else ATTENTION[:2]
        out.print(_table("attention, by kind of layer", heads, [row[: len(heads)] for row in rows], text=(0, 1, 2)))
    title = f"the {COUNT} most expensive operations, by the model's named scopes"
    out.print(_table(title, OPERATIONS, report.operations(), text=(0, 1, 2, 3)))
    out.print("what to change", style="italic")
    changes = report.changes()
    for number, (change, gain, reason) in enumerate(changes, 1):
        out.print(Text.assemble(f"  {number}. ", (change, "bold"), f": {gain}"), soft_wrap=True)
        out.print(f"     {reason}", markup=False, soft_wrap=True)
    if not changes:
        out.print("  nothing stands out: no rule expects a gain of 2% of the step")


def _table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    text: Collection[int],
    *,
    last_is_total: bool = False,
) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index in text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if last_is_total and row is rows[-1] else None)
    return table
