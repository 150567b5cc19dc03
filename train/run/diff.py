"""Two runs side by side: what was set, read and installed, and what came of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from train.config import difference, load, to_data
from train.report.display import console
from train.run.run_files import NO_SCORES, Curves, read_metrics, read_origin
from transformer.errors import UserError

_ROWS = 12
"""Steps of a table of curves."""
_OWN = ("name:", "run_dir:")
"""Fields in which two runs always differ."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run's folder tells."""

    folder: Path
    config: dict[str, Any]
    origin: dict[str, Any] | None
    """None for a run that did not write it."""
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
            _print("data, versions", [f"{run.folder} has none on record: it is of an older version"], "")
    if one.origin is not None and other.origin is not None:
        data = [one.origin["data"], other.origin["data"]]
        _print("data", [] if data[0] == data[1] else [" → ".join(data)], f"the same, {data[0]}")
        _print("versions", difference(one.origin["versions"], other.origin["versions"]), "the same")
    for run in runs:
        if not run.curves:
            _print("metrics", [f"{run.folder} has recorded none yet"], "")
    screen.print(_final(one.curves, other.curves))
    names = [name for name in one.curves if name in other.curves and name not in NO_SCORES]
    shown = [name for name in names if name == "train/loss" or name.startswith("eval/")]
    for name in shown:
        if steps := _thinned(sorted(one.curves[name].keys() & other.curves[name].keys())):
            screen.print(_table(name, steps, one.curves[name], other.curves[name]))
    if out is not None:
        _draw(runs, shown, out)


def _read(folder: Path) -> _Run:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no run here (it has no config.yaml)")
    return _Run(folder, to_data(load(path)), read_origin(folder), read_metrics(folder))


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
    """At most `_ROWS` of them, from all over, the last among them."""
    if len(steps) <= _ROWS:
        return steps
    return [steps[(index + 1) * len(steps) // _ROWS - 1] for index in range(_ROWS)]


def _draw(runs: tuple[_Run, _Run], names: list[str], out: Path) -> None:
    from matplotlib.figure import Figure

    if not names:
        raise UserError(f"--out: {runs[0].folder} and {runs[1].folder} have no metric in common to draw")
    figure = Figure(figsize=(6 * min(len(names), 2), 3.2 * -(-len(names) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(names) // 2), min(len(names), 2), squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    for axes, name in zip(grid.flat, names, strict=False):
        for run in runs:
            curve = sorted(run.curves[name].items())
            axes.plot(*zip(*curve, strict=True), marker="." if len(curve) < 40 else "", label=str(run.folder))
        axes.set_title(name)
        axes.set_xlabel("step")
    grid.flat[0].legend()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {out}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    print(f"curves    {out}")
