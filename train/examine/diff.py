"""Comparison of two runs: config, data, package versions, and results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from train.config import difference, load, to_data
from train.examine.curves import draw, shared_curves
from train.report.display import console
from train.run.run_files import Curves, config_file, read_metrics, read_origin

_ROWS = 12
"""The most steps in a table of curves."""
_OWN = ("name:", "run_dir:")
"""Fields that always differ between runs."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """The records of a run's folder."""

    folder: Path
    config: dict[str, Any]
    origin: dict[str, Any] | None
    """Data fingerprint and versions; None for a run that did not write them."""
    curves: Curves


def diff(first: Path, second: Path, out: Path | None = None) -> None:
    """Print where two runs differ: config, data, versions of packages, final metrics, and metrics at steps of both.

    Args:
        out: a picture to write, with the curves of both.

    Raises:
        UserError: no such run, curves with no step in common, or a picture that cannot be written.
    """
    runs = _read(first), _read(second)
    one, other = runs
    screen = console()
    screen.print(f"A  {first}\nB  {second}\n", markup=False)
    changed = [line for line in difference(one.config, other.config) if not line.startswith(_OWN)]
    _print("config", changed, "the same")
    for run in runs:
        if run.origin is None:
            _print("data, versions", [f"{run.folder} has no record of them: an older version made it"], "")
    if one.origin is not None and other.origin is not None:
        data = [one.origin["data"], other.origin["data"]]
        _print("data", [] if data[0] == data[1] else [" → ".join(data)], f"the same, {data[0]}")
        _print("versions", difference(one.origin["versions"], other.origin["versions"]), "the same")
    for run in runs:
        if not run.curves:
            _print("metrics", [f"{run.folder} has none yet"], "")
    screen.print(_final(one.curves, other.curves))
    shown = shared_curves([run.curves for run in runs])
    for name in shown:
        if steps := _thinned(sorted(one.curves[name].keys() & other.curves[name].keys())):
            screen.print(_table(name, steps, one.curves[name], other.curves[name]))
    if out is not None:
        draw([(str(run.folder), run.curves) for run in runs], out)


def _read(folder: Path) -> _Run:
    return _Run(folder, to_data(load(config_file(folder))), read_origin(folder), read_metrics(folder))


def _print(what: str, lines: list[str], none: str) -> None:
    console().print(f"{what:10}{f'{chr(10)}{chr(32) * 10}'.join(lines) or none}", markup=False, soft_wrap=True)


def _final(one: Curves, other: Curves) -> Table:
    """The last value of each metric that either run has."""
    table = Table(title="last values", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for column in ("A", "B", "B - A"):
        table.add_column(column, justify="right")
    for name in dict.fromkeys([*one, *other]):
        values = [curve[name][max(curve[name])] if name in curve else None for curve in (one, other)]
        a, b = values
        table.add_row(name, _number(a), _number(b), "" if a is None or b is None else f"{b - a:+.4g}")
    return table


def _table(name: str, steps: list[int], one: dict[int, float], other: dict[int, float]) -> Table:
    table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("step", "A", "B", "B - A"):
        table.add_column(column, justify="right")
    for step in steps:
        a, b = one[step], other[step]
        table.add_row(str(step), _number(a), _number(b), f"{b - a:+.4g}")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def _thinned(steps: list[int]) -> list[int]:
    """At most `_ROWS` of the steps, evenly spaced, the last included."""
    if len(steps) <= _ROWS:
        return steps
    return [steps[(index + 1) * len(steps) // _ROWS - 1] for index in range(_ROWS)]
