"""Tables and pictures of a task's scores by class. C classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.pictures import save_figure

_MOST_NUMBERED = 30
"""With more classes than this, the cells of a confusion matrix are too small for numbers."""


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class."""

    name: str
    precision: float
    recall: float
    f1: float
    count: int
    """How many examples have this gold class."""


def class_table(classes: Sequence[ClassScores]) -> str:
    """A header line, and a line for each class."""
    width = max(len("class"), *(len(one.name) for one in classes))
    lines = [f"{'class':{width}}  precision  recall      f1   count"]
    lines += [
        f"{one.name:{width}}  {one.precision:9.2%} {one.recall:7.2%} {one.f1:7.2%} {one.count:7,}" for one in classes
    ]
    return "\n".join(lines)


def draw_confusion(counts_CC: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Write the confusion matrix as a picture: gold classes as rows, predicted ones as columns, coloured by share of the row.

    Raises `UserError` if it cannot be written.
    """
    from matplotlib.figure import Figure

    size = float(np.clip(2.5 + 0.5 * len(names), 4, 16))
    figure = Figure(figsize=(size + 1, size), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    shares_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    image = axes.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 4 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    if len(names) <= _MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(counts_CC):
            color = "white" if shares_CC[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the gold class")
    save_figure(figure, path)


def draw_classes(classes: Sequence[ClassScores], path: Path) -> None:
    """Write precision, recall and F1 of each class as a picture of a table. Raises `UserError` if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.6 + 0.3 * (len(classes) + 1)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    cells = [
        [one.name, f"{one.precision:.2%}", f"{one.recall:.2%}", f"{one.f1:.2%}", f"{one.count:,}"] for one in classes
    ]
    table = axes.table(cells, colLabels=["class", "precision", "recall", "F1", "count"], loc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    save_figure(figure, path)
