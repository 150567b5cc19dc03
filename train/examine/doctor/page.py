"""A report on a step as a page that needs nothing else: a bar for the step, and one for each of the model's scopes."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

from train.examine.doctor.operations import ATTENTION as ATTENTION_TIME
from train.examine.doctor.operations import COLLECTIVE, COPY, ELEMENTWISE, MATRIX
from train.examine.doctor.report import ATTENTION, COUNT, OPERATIONS, PARTS, Report, ms
from train.files import writing
from train.report.page import page, table

COLOURS = {
    MATRIX: "#3b6fb6", ATTENTION_TIME: "#8457b8", COLLECTIVE: "#d98a2b", COPY: "#c2504f", ELEMENTWISE: "#4f9d7e",
    "idle": "#cfd4de",
}  # fmt: skip
_WIDTH, _HEIGHT, _BAR, _RIGHT, _LETTER = 1160, 26, 16, 160, 7.4
"""Of a picture, of a row and a bar in it, of the text on its right side and of a letter, in pixels."""


def write_page(report: Report, file: Path) -> None:
    """Write it. Raises `UserError`."""
    b = report.breakdown
    categories = {name: total.seconds for name, total in b.categories().items()} | {"idle": b.idle}
    muted = "".join(f'<p class="muted">{html.escape(note)}</p>' for note in report.notes())
    parts = [
        f"<p>{html.escape(report.headline())}<br>{html.escape(report.utilization())}</p>",
        _legend(categories),
        _picture([_bar(0, 0, _WIDTH, categories, b.step)], 1),
        table(PARTS, [_bold(row) if row[0] == "step" else row for row in report.parts()], text=(0,)),
        muted,
        "<h2>What to change</h2>",
        _changes(report),
        "<h2>By the model’s named scopes</h2>",
        '<p class="muted">The black mark is the roofline of a scope.</p>',
        _scopes(report),
        f"<h2>The {COUNT} most expensive operations</h2>",
        table(OPERATIONS, report.operations(), text=(0, 1, 2, 3)),
    ]
    if rows := report.attention():
        parts += ["<h2>Attention, by kind of layer</h2>", table(ATTENTION, rows, text=(0, 1), long=(2,))]
    with writing(file):
        file.write_text(page(f"{report.config.name}: where a training step goes", parts), encoding="utf-8")


def _changes(report: Report) -> str:
    if not report.advice:
        return "<p>Nothing stands out: no rule expects a gain of 2% of the step.</p>"
    items = (
        f'<li><b>{html.escape(change)}</b>: {html.escape(gain)}<br><span class="muted">{html.escape(reason)}</span></li>'
        for change, gain, reason in report.changes()
    )
    return f"<ol>{''.join(items)}</ol>"


def _scopes(report: Report) -> str:
    """A bar for each scope, of its categories, and a mark at its roofline; the longest is as wide as there is room."""
    b, totals = report.breakdown, report.breakdown.scopes()
    left = _LETTER * max(map(len, totals)) + 20
    longest = max(max(total.seconds, total.least or 0.0) for total in totals.values())
    scale, rows = (_WIDTH - left - _RIGHT) / longest, []
    for number, (scope, total) in enumerate(totals.items()):
        top, width, least = number * _HEIGHT, scale * total.seconds, scale * (total.least or 0.0)
        mark = f'<rect x="{left + least:.1f}" y="{top + 2}" width="2" height="{_HEIGHT - 4}" fill="#1f2430"/>'
        figures = f"{ms(total.seconds)} ms, {b.share(total.seconds):.1%}"
        passes = report.passes(total)
        hint = f"<title>{html.escape(f'{scope}: {figures}' + (f' ({passes})' if passes else ''))}</title>"
        rows.append(
            f'<g class="scope">{hint}{_text(left - 10, top, scope, anchor="end")}'
            f"{_bar(left, top, width, total.by_category, total.seconds)}{mark if total.least else ''}"
            f"{_text(left + max(width, least) + 10, top, figures)}</g>"
        )
    return _picture(rows, len(totals))


def _bar(left: float, top: float, width: float, parts: Mapping[str, float], whole: float) -> str:
    """A bar of coloured parts."""
    pieces, x = [], left
    for name, colour in COLOURS.items():
        if (seconds := parts.get(name, 0.0)) > 0:
            size = width * seconds / whole
            hint = f"{name}: {ms(seconds)} ms"
            pieces.append(
                f'<rect x="{x:.1f}" y="{top + (_HEIGHT - _BAR) / 2:.1f}" width="{max(size, 0.5):.1f}" height="{_BAR}" '
                f'fill="{colour}"><title>{html.escape(hint)}</title></rect>'
            )
            x += size
    return "".join(pieces)


def _text(x: float, top: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{top + _HEIGHT / 2 + 4.5:.1f}" text-anchor="{anchor}" font-size="13" fill="#1f2430">'
        f"{html.escape(text)}</text>"
    )


def _picture(rows: list[str], count: int) -> str:
    size = f'viewBox="0 0 {_WIDTH} {count * _HEIGHT}" width="{_WIDTH}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">{"".join(rows)}</svg>'


def _legend(parts: Mapping[str, float]) -> str:
    square = "display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em"
    items = (
        f'<span style="margin-right:1.2em;white-space:nowrap"><span style="{square};background:{colour}"></span>{name}</span>'
        for name, colour in COLOURS.items()
        if parts.get(name)
    )
    return f"<p>{''.join(items)}</p>"


def _bold(row: list[str]) -> list[str]:
    return [f"**{cell}**" if cell else "" for cell in row]
