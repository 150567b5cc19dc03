"""The pictures of a run's page: curves over steps, and the lengths of documents. They are readable on light and dark pages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from train.examine.run_report.read import RecordedRun
from train.report.page import LIGHT_AND_DARK, svg
from train.run.run_files import NO_SCORES
from transformer.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#3b7ddd", "#e0663f", "#2fa36b", "#a566d6", "#c99a1e", "#d3538f", "#2ba3b5", "#8a7a5c")
_HUGE = 1e30
"""Values beyond it, and those that are not finite, are not drawn."""
_MOST_POINTS = 1500
"""The most points of a curve in a picture."""
_PROGRESS = {
    "train/learning_rate": "learning rate", "train/grad_norm": "gradient norm",
    "train/tokens_per_second": "tokens, or rows, per second",
    "run/step_seconds": "seconds a step", "run/peak_memory_bytes": "peak memory, GiB", "train/mfu": "MFU",
}  # fmt: skip


def loss_picture(runs: Sequence[RecordedRun]) -> str:
    """Training loss and held-out loss over steps, as SVG; empty if no run has either."""
    names = {"train/loss": "-", "eval/loss": "o-"}
    drawn = [(run, name) for run in runs for name in names if run.curves.get(name)]
    if not drawn:
        return ""

    def draw(axes: Axes) -> None:
        for run, name in drawn:
            color = _COLORS[runs.index(run) % len(_COLORS)]
            what = "training" if name == "train/loss" else "held out"
            label = what if len(runs) == 1 else f"{_label(run.title)}, {what}"
            pale = name == "train/loss" and len(names) > 1
            _curve(axes, run.curves[name], names[name], label, color, alpha=0.45 if pale else 1.0)
        axes.set_title("loss", loc="left")
        axes.legend(frameon=False)

    return _figure(draw, (11.0, 3.6))


def score_pictures(runs: Sequence[RecordedRun]) -> list[str]:
    """A picture of each score of the held-out documents, and of how the steps went, as SVG."""
    found = dict.fromkeys(name for run in runs for name in run.curves)
    scores = [name for name in found if name.startswith("eval/") and name not in (*NO_SCORES, "eval/loss")]
    shown = {name: name.removeprefix("eval/").replace("_", " ") for name in scores}
    shown |= {name: title for name, title in _PROGRESS.items() if name in found}

    def drawing(name: str, title: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            unit = 2**30 if name.endswith("_bytes") else 1
            for number, run in enumerate(runs):
                if curve := run.curves.get(name):
                    scaled = {step: value / unit for step, value in curve.items()}
                    _curve(axes, scaled, "-", _label(run.title), _COLORS[number % len(_COLORS)])
            axes.set_title(title, loc="left")

        return draw

    return [_figure(drawing(*one), (3.7, 2.3)) for one in shown.items()]


def length_picture(sources: Sequence[dict[str, Any]]) -> str:
    """How many documents have up to 1, 2, 4, ... tokens, by source, as SVG; empty without documents."""
    some = [one for one in sources if one["split"] == "train" and any(one["lengths"]["histogram"])]
    if not some:
        return ""

    def draw(axes: Axes) -> None:
        size = max(len(one["lengths"]["histogram"]) for one in some)
        first = min(next(i for i, count in enumerate(one["lengths"]["histogram"]) if count) for one in some)
        width = 0.8 / len(some)
        for number, one in enumerate(some):
            counts = one["lengths"]["histogram"]
            places = [place + number * width for place in range(first, len(counts))]
            axes.bar(
                places,
                counts[first:],
                width,
                align="edge",
                color=_COLORS[number % len(_COLORS)],
                label=_label(printable(one["name"])),
            )
        axes.set_xticks(range(first, size), [f"≤ {_short(2**power)}" for power in range(first, size)])
        axes.set_xlabel("tokens of a document")
        axes.set_ylabel("documents")
        if len(some) > 1:
            axes.legend(frameon=False)

    return _figure(draw, (11.0, 2.6))


def _figure(draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # The page's font has what the one that measures the texts may lack.
    with matplotlib.rc_context(LIGHT_AND_DARK), warnings.catch_warnings(action="ignore", category=UserWarning):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        return svg(figure, "report")


def _label(name: str) -> str:
    """A name in a legend, from which matplotlib leaves out those that begin with an underscore."""
    return f"./{name}" if name.startswith("_") else name


def _curve(axes: Axes, curve: dict[int, float], style: str, label: str, color: str, *, alpha: float = 1.0) -> None:
    kept = [(step, value) for step, value in sorted(curve.items()) if math.isfinite(value) and abs(value) < _HUGE]
    points = list(_thinned(kept))
    if not points:
        return
    marker = "." if len(points) < 40 or "o" in style else ""
    axes.plot(*zip(*points, strict=True), "-", marker=marker, label=label, color=color, alpha=alpha, linewidth=1.4)


def _thinned(points: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    """At most `_MOST_POINTS` of the points: of each stretch the mean."""
    size = -(-len(points) // _MOST_POINTS)
    for first in range(0, len(points), max(size, 1)):
        some = points[first : first + size]
        yield some[-1][0], sum(value for _, value in some) / len(some)


def _short(number: int) -> str:
    return f"{number // 2**20}M" if number >= 2**20 else f"{number // 1024}k" if number >= 1024 else str(number)
