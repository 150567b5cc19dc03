"""Draws the curves of one run, or of several in the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.pictures import save_figure
from train.run.run_files import NO_SCORES, Curves, config_file, read_metrics
from transformer.errors import UserError


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw the training loss and the held-out scores that all runs have.

    Raises:
        UserError: no such run, no metric that all of them have, or a picture that cannot be written.
    """
    for run in runs:
        config_file(run)
    draw([(str(run), read_metrics(run)) for run in runs], out)


def shared_curves(curves: Sequence[Curves]) -> list[str]:
    """The metrics to show that all runs have: the training loss and the held-out scores."""
    first, *others = curves
    names = [name for name in first if name not in NO_SCORES and all(name in other for other in others)]
    return [name for name in names if name == "train/loss" or name.startswith("eval/")]


def draw(runs: Sequence[tuple[str, Curves]], out: Path) -> None:
    """Write a picture of runs, each with its name. Raises `UserError`."""
    from matplotlib.figure import Figure

    names = shared_curves([curves for _, curves in runs])
    if not names:
        raise UserError(f"{' and '.join(name for name, _ in runs)}: no common metric to draw")
    figure = Figure(figsize=(6 * min(len(names), 2), 3.2 * -(-len(names) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(names) // 2), min(len(names), 2), squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    for axes, name in zip(grid.flat, names, strict=False):
        for label, curves in runs:
            curve = sorted(curves[name].items())
            axes.plot(*zip(*curve, strict=True), marker="." if len(curve) < 40 else "", label=label)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].legend(frameon=False)
    save_figure(figure, out)
    print(f"curves    {out}")
