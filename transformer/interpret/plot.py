"""Attention maps as pictures: one head with its tokens on both axes, and all layers × heads on one sheet.

L layers, N query heads, T query position, S key position.

matplotlib is imported only when a picture is requested, and only by this module.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer.interpret.capture import AttentionMaps
from transformer.interpret.labels import code_point, visible
from transformer.types import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLORS = ("#f3f5fc", "#c3cff3", "#8a9de6", "#5563cb", "#372f96", "#1c1450")
"""From almost nothing to 1; a weight of exactly 0, such as a masked one, stays white."""
MAX_LABELS = 64
"""More labels than this on an axis are thinned to every second, fifth, tenth ..."""
MAX_LETTERS = 16
DPI = 120


def plot_head(maps: AttentionMaps, layer: int, head: int) -> Figure:
    """Heat map of one head: a row for each query, a column for each key.

    Raises:
        ValueError: a layer or head that `maps` does not hold.
    """
    from matplotlib.figure import Figure

    weights_TS = maps.weights_LNTS[maps.layers.index(layer), maps.heads.index(head)]
    width, height = (min(3 + 0.2 * min(len(names), MAX_LABELS), 14) for names in (maps.columns, maps.rows))
    figure = Figure(figsize=(width + 1, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    image = _image(axes, weights_TS)
    _name(axes.xaxis, maps.columns, rotation=90)
    _name(axes.yaxis, maps.rows)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(f"layer {layer}, head {head}")
    figure.colorbar(image, ax=axes, shrink=0.6, label="weight")
    return figure


def plot_grid(maps: AttentionMaps) -> Figure:
    """All heads on one sheet: a row for each layer. Each picture's colours reach up to its own largest weight."""
    from matplotlib.figure import Figure

    rows, columns = len(maps.layers), len(maps.heads)
    side = max(0.5, min(1.6, 24 / max(rows, columns)))
    figure = Figure(figsize=(side * columns + 1.2, side * rows + 0.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for row, layer in enumerate(maps.layers):
        for column, head in enumerate(maps.heads):
            axes: Axes = panels[row, column]
            _image(axes, maps.weights_LNTS[row, column], aspect="auto")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"head {head}", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
    return figure


def save_plots(maps: AttentionMaps, folder: str | Path) -> list[Path]:
    """Write `heads.png`, the sheet, and `layer-0-head-0.png` and so on into a folder, made if need be. Raises `OSError`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "heads.png"]
    plot_grid(maps).savefig(written[0])
    for layer in maps.layers:
        for head in maps.heads:
            written.append(folder / f"layer-{layer}-head-{head}.png")
            plot_head(maps, layer, head).savefig(written[-1])
    return written


def thinned(count: int, most: int = MAX_LABELS) -> range:
    """Which of `count` positions get a label, at most `most`: all, every 2nd, 5th, 10th, 20th ..."""
    steps = (base * 10**power for power in range(12) for base in (1, 2, 5))
    return range(0, count, next(step for step in steps if -(-count // step) <= most))


def _image(axes: Axes, weights_TS: Float[np.ndarray, "T S"], **options: Any) -> AxesImage:
    """The colour scale is the square root of the weight, so that faint weights are visible next to strong ones."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    top = max(float(weights_TS.max()), 1e-9)
    colors = LinearSegmentedColormap.from_list("attention", COLORS).with_extremes(bad="white")
    shown = np.ma.masked_equal(weights_TS, 0)
    return axes.imshow(shown, cmap=colors, norm=PowerNorm(0.5, 0, top), interpolation="nearest", **options)


def _name(axis: Any, tokens: Sequence[str], **text: Any) -> None:
    shown = thinned(len(tokens))
    labels = [visible(tokens[position]) for position in shown]
    labels = [label if len(label) <= MAX_LETTERS else label[: MAX_LETTERS - 1] + "…" for label in labels]
    if shown.step > 1:
        labels = [f"{label}  {position}" for label, position in zip(labels, shown, strict=True)]
    families, labels = drawable(labels)
    # A dollar sign is a plain character, not the start of mathematics.
    axis.set_ticks(shown, labels, fontsize=8, family=families, parse_math=False, **text)


def drawable(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """The fonts that together cover the labels' letters, and the labels, with what no font covers written as ‹U+1F600›."""
    files = _fonts()
    families, have = ["DejaVu Sans"], _letters(files["DejaVu Sans"])
    missing = {letter for label in labels for letter in label} - have
    for family, file in files.items() if missing else ():
        if found := missing & _letters(file):
            families.append(family)
            missing -= found
        if not missing:
            break
    return families, [
        "".join(code_point(letter) if letter in missing else letter for letter in label) for label in labels
    ]


@functools.cache
def _fonts() -> dict[str, str]:
    """Every installed family's upright file, sans-serif ones first; not the family that draws any letter as a box."""
    from matplotlib.font_manager import fontManager

    upright = [font for font in fontManager.ttflist if font.weight in (400, "normal") and font.style == "normal"]
    files = {font.name: font.fname for font in upright if "Last Resort" not in font.name}
    return dict(sorted(files.items(), key=lambda entry: ("Sans" not in entry[0], "Mono" in entry[0], entry[0])))


@functools.cache
def _letters(file: str) -> frozenset[str]:
    """The characters that a font draws; none for one that only has pictures of fixed size (colour emoji)."""
    from matplotlib.font_manager import get_font

    font = get_font(file)
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
