"""The pictures of the report, as SVG: loss curves, BLEU by length, and each model's alignment.

U target words, R source words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.history.findings import Figures, title
from train.report.page import svg
from transformer.interpret.plot import COLORS, drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": "#8a8f98", "linestyle": "-"},
    "bahdanau": {"color": "#1f5fbf", "linestyle": "-"},
    "luong-dot": {"color": "#0b6b48", "linestyle": "-"},
    "luong-general": {"color": "#2fa36b", "linestyle": "--"},
    "luong-concat": {"color": "#6aa84f", "linestyle": "-."},
    "luong-local-p": {"color": "#93a51f", "linestyle": ":"},
    "hard": {"color": "#d1495b", "linestyle": "-"},
    "linear": {"color": "#e08a1e", "linestyle": "-"},
    "delta": {"color": "#8b4fbf", "linestyle": "-"},
    "transformer": {"color": "#111111", "linestyle": "-"},
}
"""A hue for each family, a dash for each of its members."""
_PANELS = 5
"""Alignments per row of the picture."""


def loss_curves(stages: Sequence[Figures]) -> str:
    """Loss in training and on held-out pairs over the steps, of one task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for axes, kind, name in zip(
        figure.subplots(1, 2, sharey=True), ("training", "held_out"), ("Training", "Held-out"), strict=True
    ):
        for one in stages:
            points = np.array(one["curves"][kind], float).reshape(-1, 2)
            axes.plot(
                points[:, 0], _smoothed(points[:, 1]) if kind == "training" else points[:, 1], label=title(one),
                marker="o" if kind == "held_out" else None, markersize=3, linewidth=1.6, **STYLES[one["model"]],
            )  # fmt: skip
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("nats a token")
    _legend(figure)
    return svg(figure, "curves-" + stages[0]["task"])


def by_length(stages: Sequence[Figures]) -> str:
    """BLEU and chrF over the source's length, of one task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, kind, name in zip(figure.subplots(1, 2), ("bleu", "chrf"), ("BLEU", "chrF"), strict=True):
        for one in stages:
            points = [(bucket["words"], bucket[kind]) for bucket in one["by_length"] if bucket["pairs"]]
            axes.plot(
                *zip(*points, strict=True), label=title(one), marker="o", markersize=4, linewidth=1.6,
                **STYLES[one["model"]],
            )  # fmt: skip
        axes.set(xlabel="words of the source", title=name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure)
    return svg(figure, "length-" + stages[0]["task"])


def alignment_sheet(stages: Sequence[Figures]) -> str:
    """One sentence's weights under each model, side by side; rings mark the true alignment."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure

    columns = min(_PANELS, len(stages))
    rows = -(-len(stages) // columns)
    first = stages[0]["example"]
    U, R = len(first["rows"]), len(first["columns"])
    figure = Figure(figsize=(2.05 * columns + 1.2, rows * (1.15 + 2.0 * U / R)), layout="constrained")
    colors = LinearSegmentedColormap.from_list("attention", COLORS)
    names = {side: drawable(first[side]) for side in ("rows", "columns")}
    text: dict[str, Any] = {"fontsize": 7, "parse_math": False}
    image = None
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if number >= len(stages):
            axes.axis("off")
            continue
        one = stages[number]
        axes.set_title(title(one), fontsize=9)
        weights = one["example"]["weights"]
        weights_UR = np.zeros((U, R)) if weights is None else np.array(weights)
        image = axes.imshow(weights_UR, cmap=colors, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        if weights is None:
            axes.text((R - 1) / 2, (U - 1) / 2, "no weights", ha="center", va="center", color="#6b7280", fontsize=9)
        for read, said in first["gold"] or ():
            axes.plot(read, said, "o", markersize=5, markerfacecolor="none", markeredgecolor="#e08a1e")
        families, labels = names["columns"]
        axes.set_xticks(range(R), labels, rotation=90, family=families, **text)
        families, labels = names["rows"]
        axes.set_yticks(range(U), labels if number % columns == 0 else [""] * U, family=families, **text)
    if image is not None:
        figure.colorbar(image, ax=figure.axes, shrink=0.5, label="weight")
    return svg(figure, "alignment-" + stages[0]["task"])


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of five neighbours, because a batch's loss varies with its length."""
    return np.array([values[max(i - 2, 0) : i + 3].mean() for i in range(len(values))])
