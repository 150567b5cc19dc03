"""A report as a self-contained page: its style, tables and pictures."""

from __future__ import annotations

import html
import io
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; color: #1f2430; background: #fff; max-width: 1240px; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { margin-top: 2.4rem; border-top: 1px solid #dde1ea; padding-top: 1.3rem; }
h3 { margin: 1.8rem 0 .5rem; font-size: 1rem; } li { margin: .25rem 0; } li, p { max-width: 60rem; } p { margin: .5rem 0; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .84rem; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #e6e9f0; white-space: nowrap; }
th { color: #5a6273; font-weight: 600; } .text { text-align: left; } .best { font-weight: 700; }
td.long { text-align: left; white-space: normal; }
svg { max-width: 100%; height: auto; } .muted { color: #5a6273; }
"""

DARK = """<style>
:root { color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  body { background: #14171d; color: #dde2ec; } th, .muted { color: #98a1b3; }
  h2 { border-color: #2c3340; } th, td { border-color: #262c38; } img { background: #fff; border-radius: 6px; }
}
</style>"""
"""A part of a page that also has dark colours, for readers who prefer them."""

_INK = "#7c8496"
LIGHT_AND_DARK: Any = {
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.titlecolor": _INK, "grid.color": _INK, "font.size": 9.0,
    "figure.facecolor": "none", "axes.facecolor": "none",
    # A name may hold dollar signs.
    "text.parse_math": False,
}  # fmt: skip
"""matplotlib's settings of pictures that are readable on light and dark pages."""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document around parts in HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], text: Collection[int] = (), long: Collection[int] = ()
) -> str:
    """A table. Columns in `text` are left-aligned, those in `long` also wrap; `**` around a cell makes it bold."""

    def cell(index: int, content: str, tag: str) -> str:
        best = len(content) > 4 and content.startswith("**") and content.endswith("**")
        names = [("text", index in text), ("long", index in long), ("best", best)]
        kinds = " ".join(name for name, holds in names if holds)
        attribute = f' class="{kinds}"' if kinds else ""
        return f"<{tag}{attribute}>{html.escape(content[2:-2] if best else content)}</{tag}>"

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(cell(index, content, tag) for index, content in enumerate(cells))}</tr>"

    return f'<div class="table"><table>{line(heads, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def svg(figure: Figure, salt: str = "manyheads") -> str:
    """A picture as part of a page; the same figure always gives the same text.

    Args:
        salt: makes the ids inside unique among the pictures of a page.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
