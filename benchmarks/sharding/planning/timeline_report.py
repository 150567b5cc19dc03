"""Pictures of predicted steps for a plan's page: what is computed and sent when, and what is in memory.

Lengths are percentages of the width and texts keep their size, so that a picture fits a phone; colours suit light and dark pages.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.sharding.predict.array_kinds import KINDS
from benchmarks.sharding.predict.timeline import PARTS, title
from benchmarks.units import duration
from transformer.interpret.capture import readable

STYLE = """<style>
figure { margin: .6rem 0 1.2rem; } figure svg { display: block; width: 100%; height: auto; max-width: none; overflow: visible; }
figure svg svg { overflow: hidden; } figure text { font: 12px system-ui, sans-serif; fill: currentColor; }
figure text.inside { fill: #fff; pointer-events: none; } figure line, figure .rim { stroke: currentColor; }
figcaption { font-size: .84rem; margin: .25rem 0; } .key { display: inline-block; white-space: nowrap; margin-right: 1.1em; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
</style>"""
_PART_COLOURS = dict(zip(PARTS, ("#3b6fb6", "#4f9d7e", "#9aa3b5", "#d98a2b"), strict=True))
_HIDDEN = "#8e7cc3"
_KIND_COLOURS = dict(
    zip(KINDS, ("#3b6fb6", "#6d9fd8", "#9aa3b5", "#2fa3a0", "#d98a2b", "#c2504f", "#8e7cc3"), strict=True)
)
_BAR, _LANE, _AXIS, _AREA, _GAP = 64, 30, 22, 150, 20
"""Heights in pixels: of what is computed, of a lane of communication, of an axis, of the memory, and above each."""
_WORDED = 9.0
"""Percentage of the width from which a segment has its name in it."""


def chosen(layouts: list[dict[str, Any]]) -> dict[int, str]:
    """Layouts whose steps are drawn: their index in the ranking, and why.

    They are the best, the best of another mesh, plain data parallelism, and of those that do not fit the nearest.
    """
    known = [index for index, row in enumerate(layouts) if (row["compiled"] or {}).get("timeline")]
    good = [index for index in known if layouts[index]["fits"]]
    found: dict[int, str] = {}
    if good:
        found[good[0]] = "the best"
        mesh = _mesh(layouts[good[0]])
        other = next((index for index in good if _mesh(layouts[index]) != mesh), None)
        plain = next((index for index in good if layouts[index]["plain"]), None)
        for index, why in ((other, "the best of another mesh"), (plain, "plain data parallelism")):
            if index is not None and index not in found:
                found[index] = why
    large = [index for index in known if not layouts[index]["fits"]]
    if large:
        found[min(large, key=lambda index: layouts[index]["memory"])] = "the nearest of those that do not fit"
    return found


def _mesh(row: Mapping[str, Any]) -> str:
    return row["layout"].partition(";")[0]


def steps(result: dict[str, Any]) -> str:
    """The part of a plan's page with the steps of the layouts of interest; empty if nothing was compiled."""
    layouts, parts = result["layouts"], []
    good = [row for row in layouts if row["fits"]]
    for index, why in chosen(layouts).items():
        row = layouts[index]
        number = f"layout {good.index(row) + 1}, " if row["fits"] else ""
        head = html.escape(f"{why[0].upper()}{why[1:]}: {number}{row['layout']}")
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in sentences(row, result["device_memory"]))
        step = row["compiled"]["timeline"]
        parts.append(
            f"<h3>{head}</h3>{time_picture(step)}{memory_picture(step, result['device_memory'])}<ul>{lines}</ul>"
        )
    return f"{STYLE}<h2>Steps over time, as predicted</h2>{''.join(parts)}" if parts else ""


def time_picture(step: dict[str, Any]) -> str:
    """What is computed and what is sent over a step, as HTML: a bar of segments, and a lane for each kind of link."""
    total, top = step["seconds"], _GAP
    parts = [_text("0%", 13, "computes"), *(_segment(one, total, top) for one in step["segments"])]
    top += _BAR
    for link in dict.fromkeys(one["link"] for one in step["communication"]):
        top += _GAP
        parts.append(_text("0%", top - 6, f"sends over {link}"))
        parts += [_sent(one, total, top) for one in step["communication"] if one["link"] == link]
        parts.append(f'<line x1="0" x2="100%" y1="{top + _LANE}" y2="{top + _LANE}" stroke-opacity=".3"/>')
        top += _LANE
    parts.append(_axis(total, top))
    used = [part for part in PARTS if any(one["parts"][part] > 0 for one in step["segments"])]
    keys = {part: _PART_COLOURS[part] for part in used}
    if any(one["seconds"] > one["exposed"] for one in step["communication"]):
        keys["communication that overlaps"] = _HIDDEN
    about = f"A step of {duration(total)}: what is computed and what is sent, over time"
    caption = "Heights are shares of a segment's time; a loop is one segment. Point at a segment for its figures."
    return _figure(about, "".join(parts), top + _AXIS, keys, f"{about}. {caption}")


def memory_picture(step: dict[str, Any], limit: float) -> str:
    """What is in a device's memory over a step, stacked by kind, with the device's limit, as HTML."""
    memory, total = step["memory"], step["seconds"]
    times = [*memory["times"], total]
    near = limit <= 4 * memory["peak"]
    most = 1.05 * max(memory["peak"], limit if near else 0.0)
    below = [0.0] * (len(times) - 1)
    shapes = []
    for kind in KINDS:
        above = [low + more for low, more in zip(below, memory["kinds"][kind], strict=True)]
        if max(memory["kinds"][kind], default=0.0) > 0:
            outline = [*_stairs(times, above, total, most), *reversed(_stairs(times, below, total, most))]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
            hint = f"{kind}: {readable(int(memory['at_peak'][kind]))} at the peak"
            shapes.append(
                f'<polygon points="{points}" fill="{_KIND_COLOURS[kind]}"><title>{html.escape(hint)}</title></polygon>'
            )
        below = above
    parts = [
        _text("0%", 13, "memory of a device"),
        f'<svg x="0" y="{_GAP}" width="100%" height="{_AREA}" style="height:{_AREA}px" viewBox="0 0 1000 {_AREA}" '
        f'preserveAspectRatio="none">{"".join(shapes)}</svg>',
    ]
    unit, name = next(
        ((2.0**power, name) for power, name in ((30, "GiB"), (20, "MiB")) if most >= 2**power), (1024.0, "KiB")
    )
    mark = _round(most / unit / 4) * unit
    for number in range(1, int(most / mark) + 1):
        y = _GAP + _AREA * (1 - number * mark / most)
        parts.append(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" stroke-opacity=".2"/>')
        parts.append(_text("2", y + 13, f"{number * mark / unit:g} {name}"))
    about = f"Memory of a device over the step, {readable(int(memory['peak']))} at its peak"
    if near:
        y = _GAP + _AREA * (1 - limit / most)
        parts.append(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" stroke-dasharray="6 4"/>')
        parts.append(_text("100%", y - 5, f"the device's {readable(int(limit))}", "end"))
    else:
        about += f"; the device's {readable(int(limit))} are beyond the picture"
    parts.append(_axis(total, _GAP + _AREA))
    keys = {kind: _KIND_COLOURS[kind] for kind in KINDS if max(memory["kinds"][kind], default=0.0) > 1e-3 * most}
    return _figure(about, "".join(parts), _GAP + _AREA + _AXIS, keys, f"{about}.")


def sentences(row: dict[str, Any], limit: float) -> list[str]:
    """What bounds a step, where its memory is at the peak, and what would change them."""
    step = row["compiled"]["timeline"]
    total, memory, change = step["seconds"], step["memory"], step["what_if"]
    sums = {part: sum(one["parts"][part] for one in step["segments"]) for part in PARTS}
    parts = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in sums.items() if seconds >= 0.005 * total)
    stages = sorted(step["stages"].items(), key=lambda one: -sum(one[1].values()))[:3]
    longest = ", ".join(f"{name} {sum(by_part.values()) / total:.0%}" for name, by_part in stages)
    kinds = {kind: count for kind, count in memory["at_peak"].items() if count > 0.01 * memory["peak"]}
    lines = [
        f"Bound by {row['compiled']['prediction']['bound']}: {parts}. The longest stages: {longest}.",
        f"Memory at its peak: {', '.join(f'{kind} {_gib(count)}' for kind, count in kinds.items())}; together "
        f"{_gib(memory['peak'])} by what is alive, {_gib(memory['compiler'])} as the compiler places it "
        f"({memory['peak'] / memory['compiler']:.2f} of it).",
    ]
    if "link" in change:
        lines.append(f"With {change['link']['name']} twice as fast: {_step(change['link']['seconds'], total)}.")
    lines.append(f"With memory of twice the bandwidth: {_step(change['memory']['seconds'], total)}.")
    fits = "which fits" if change["batch"]["bytes"] <= limit else f"of {_gib(limit)}, which does not fit"
    lines.append(
        f"With twice the batch: up to {duration(change['batch']['seconds'])} a step, and about "
        f"{_gib(change['batch']['bytes'])} of memory with twice the activations and temporaries, {fits}."
    )
    return lines


def _step(seconds: float, before: float) -> str:
    return f"{duration(seconds)} a step, {1 - seconds / before:.1%} less"


def _gib(count: float) -> str:
    return readable(int(count))


def _segment(one: dict[str, Any], total: float, top: float) -> str:
    """A segment: as wide as it is long, its parts on top of each other."""
    seconds = one["end"] - one["start"]
    x, width = 100 * one["start"] / total, 100 * seconds / total
    name = title(one["stage"], one["phase"])
    turn = f"; turn {one['turn']}" if one["turn"] else ""
    trips = f", {one['trips']:g} times" if one["trips"] else ""
    figures = ", ".join(f"{part} {duration(one['parts'][part])}" for part in PARTS if one["parts"][part] > 0)
    hint = html.escape(f"{name}{trips}{turn}: {duration(seconds)} ({figures})")
    y, rects = float(top), []
    for part in PARTS:
        height = _BAR * one["parts"][part] / seconds
        if height > 0:
            rects.append(
                f'<rect x="{x:.3f}%" y="{y:.2f}" width="{width:.3f}%" height="{height:.2f}" fill="{_PART_COLOURS[part]}"/>'
            )
        y += height
    rim = f'<line class="rim" x1="{x:.3f}%" x2="{x:.3f}%" y1="{top}" y2="{top + _BAR}" stroke-opacity=".35"/>'
    words = ""
    lines = [
        one["stage"],
        one["phase"] if one["phase"] != one["stage"] else "",
        f"× {one['trips']:g}" if one["trips"] else "",
    ]
    if width >= _WORDED:
        words = (
            f'<svg x="{x:.3f}%" y="{top}" width="{width:.3f}%" height="{_BAR}" style="width:{width:.3f}%;height:{_BAR}px">'
            + "".join(
                f'<text class="inside" x="5" y="{16 + 15 * number}">{html.escape(line)}</text>'
                for number, line in enumerate(lines)
            )
            + "</svg>"
        )
    return f"<g><title>{hint}</title>{''.join(rects)}{rim}{words}</g>"


def _sent(one: dict[str, Any], total: float, top: float) -> str:
    """What is sent: over the time in which it may be, as high as its share of that, the exposed part at the bottom."""
    span = max(one["end"] - one["start"], 1e-12 * total)
    x, width = 100 * one["start"] / total, max(100 * span / total, 0.15)
    high = min(one["seconds"] / span, 1.0) * _LANE
    low = high * one["exposed"] / one["seconds"] if one["seconds"] else 0.0
    times = "once" if one["count"] == 1 else f"{one['count']:g} times"
    hint = html.escape(
        f"{one['kind']} over {one['link']}, {times}: {duration(one['seconds'])}, {duration(one['exposed'])} of it exposed"
    )
    base = top + _LANE
    bars = [
        f'<rect x="{x:.3f}%" y="{base - end:.2f}" width="{width:.3f}%" height="{end - start:.2f}" fill="{colour}"/>'
        for start, end, colour in ((low, high, _HIDDEN), (0.0, low, _PART_COLOURS[PARTS[3]]))
        if end > start
    ]
    return f"<g><title>{hint}</title>{''.join(bars)}</g>"


def _stairs(times: list[float], values: list[float], total: float, most: float) -> list[tuple[float, float]]:
    corners = []
    for start, end, value in zip(times, times[1:], values, strict=False):
        y = _AREA * (1 - value / most)
        corners += [(1000 * start / total, y), (1000 * end / total, y)]
    return corners


def _axis(total: float, top: float) -> str:
    """Times in ms, about five of them."""
    step = _round(1e3 * total / 6)
    marks, at = [], 0.0
    while at <= 1e3 * total:
        x = 100 * at / (1e3 * total)
        anchor = "start" if at == 0 else "end" if x > 96 else "middle"
        label = f"{at:g}" + (" ms" if at == 0 else "")
        marks.append(f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{top}" y2="{top + 4}"/>')
        marks.append(_text(f"{x:.2f}%", top + 17, label, anchor))
        at = round(at + step, 9)
    return "".join(marks)


def _round(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below."""
    return next(size * 10.0**power for power in range(-9, 9) for size in (1, 2, 5) if size * 10.0**power >= least)


def _text(x: str, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _figure(about: str, body: str, height: float, keys: Mapping[str, str], caption: str) -> str:
    return (
        f'<figure><svg role="img" aria-label="{html.escape(about)}" height="{height}" style="height:{height}px">{body}</svg>'
        f"<figcaption>{_legend(keys.items())}<br>{html.escape(caption)}</figcaption></figure>"
    )


def _legend(keys: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f'<span class="key"><i style="background:{colour}"></i>{html.escape(name)}</span>' for name, colour in keys
    )
