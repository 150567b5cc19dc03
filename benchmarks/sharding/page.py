"""A page that needs nothing else: style, and tables."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; color: #1f2430; background: #fff; max-width: 1180px; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { margin-top: 2.2rem; border-top: 1px solid #dde1ea; padding-top: 1.2rem; }
p { max-width: 60rem; margin: .5rem 0; } .table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e6e9f0; white-space: nowrap; }
th { color: #5a6273; font-weight: 600; } .text { text-align: left; } svg { max-width: 100%; height: auto; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document around parts that are HTML already."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table; the columns of `text` are set to the left."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="text"' if index in text else "" for index in range(len(cells))]
        return (
            "<tr>"
            + "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
            + "</tr>"
        )

    return f'<div class="table"><table>{line(heads, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def svg(figure: Figure) -> str:
    """A picture as part of a page; the same figure always gives the same text."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "manyheads"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
