"""What was found inside a model as one HTML file that needs nothing else: tables, heat maps and bars, without a script.

T position, L layers, N query heads.

Its style is that of the page of attention maps. Every text is displayed as text, and tokens have to be made `visible` by the
caller; a policy in the page allows nothing to be loaded or to run.
"""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable, Sequence

import numpy as np

from transformer.interpret.page import hash_of, visible_line

_LEVELS = 10
_SHADES = "".join(
    f".{sign}{level} {{ background: color-mix(in srgb, var({color}) {level * 55 // _LEVELS}%, transparent); }}\n"
    for sign, color in (("p", "--accent"), ("n", "--against"))
    for level in range(1, _LEVELS + 1)
)
_STYLE = f"""
:root {{ --against: #c2571a; }}
@media (prefers-color-scheme: dark) {{ :root {{ --against: #f0a35c; }} }}
h2 {{ margin: 2rem 0 .3rem; font-size: 1.1rem; }} h3 {{ margin: 1.1rem 0 .4rem; font-size: .95rem; }}
.cells {{ cursor: auto; box-shadow: none; }} .cells td, .cells th {{ padding: .2rem .45rem; text-align: right; }}
.cells th:first-child {{ position: sticky; left: 0; background: var(--panel); text-align: left; z-index: 1; }}
.cells tbody tr:hover {{ background: none; }} .cells thead th {{ font-weight: 500; color: var(--soft); }}
.words td {{ text-align: left; font: 12px/1.3 ui-monospace, monospace; }} .words small {{ color: var(--soft); }}
.maps {{ display: flex; flex-wrap: wrap; gap: .5rem 2rem; align-items: start; }} .maps > div {{ max-width: 100%; }}
svg {{ display: block; width: clamp(5rem, 30vw, 16rem); height: .7rem; }} .for {{ fill: var(--accent); }}
.against {{ fill: var(--against); }} .axis {{ stroke: var(--line); }}
{_SHADES}"""


def document(title: str, summary: str, sections: Iterable[str]) -> str:
    """The whole file, around sections in HTML."""
    shared = importlib.resources.files("transformer.interpret").joinpath("page.css").read_text("utf-8")
    style, name = shared + _STYLE, html.escape(visible_line(title))
    policy = f"default-src 'none'; style-src '{hash_of(style)}'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark"><title>{name}</title><style>{style}</style></head>\n'
        f'<body><header><h1>{name}</h1><p id="summary">{html.escape(summary)}</p></header><main>\n'
        f"{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, hint: str, *parts: str) -> str:
    """A section with its heading, one sentence about how to read it, and its parts in HTML."""
    return f'<section><h2>{html.escape(title)}</h2><p class="hint">{html.escape(hint)}</p>{"".join(parts)}</section>\n'


def side_by_side(maps: Iterable[str]) -> str:
    """Small maps next to each other, as far as there is room."""
    return f'<div class="maps">{"".join(maps)}</div>'


def heat_map(
    title: str, values: np.ndarray, columns: Sequence[str], rows: Sequence[str], *, largest: float | None = None,
    digits: int = 2, corner: str = "layer",
) -> str:  # fmt: skip
    """A table [rows, columns] of numbers whose backgrounds show them; nan is left empty.

    Args:
        largest: the absolute value of the strongest shade; by default the largest of the table.
    """
    known = np.abs(values[~np.isnan(values)])
    most = largest or float(known.max(initial=0.0)) or 1.0

    def cell(value: float) -> str:
        if np.isnan(value):
            return "<td></td>"
        level = min(round(_LEVELS * abs(value) / most), _LEVELS)
        shade = f' class="{"p" if value > 0 else "n"}{level}"' if level else ""
        # A zero has no sign.
        return f"<td{shade}>{round(float(value), digits) + 0.0:.{digits}f}</td>"

    lines = [
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(map(cell, line))}</tr>'
        for name, line in zip(rows, values, strict=True)
    ]
    return f"<div><h3>{html.escape(title)}</h3>{_table(corner, columns, lines)}</div>"


def word_table(words: Sequence[Sequence[str]], shares: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> str:
    """A table [rows, columns] of words, each with its probability."""

    def cell(word: str, share: float) -> str:
        level = min(round(_LEVELS * share), _LEVELS)
        shade = f' class="p{level}"' if level else ""
        return f"<td{shade}>{html.escape(word)} <small>{share:.2f}</small></td>"

    lines = [
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(map(cell, line, of_line))}</tr>'
        for name, line, of_line in zip(rows, words, shares, strict=True)
    ]
    return _table("after layer", columns, lines, "words")


def bars(rows: Sequence[tuple[str, float]]) -> str:
    """Names with their values, as bars to both sides of zero."""
    most = max((abs(value) for _, value in rows), default=0.0) or 1.0

    def line(name: str, value: float) -> str:
        width = 100 * abs(value) / most
        start = 100 - width if value < 0 else 100
        side = "against" if value < 0 else "for"
        bar = (
            f'<svg viewBox="0 0 200 10" preserveAspectRatio="none" aria-hidden="true"><rect class="{side}" x="{start:.1f}" y="0" '
            f'width="{width:.1f}" height="10"/><line class="axis" x1="100" x2="100" y1="0" y2="10"/></svg>'
        )
        return f'<tr><th scope="row">{html.escape(name)}</th><td>{value:+.3f}</td><td>{bar}</td></tr>'

    return _table("", ["logits", ""], [line(*row) for row in rows])


def paragraph(text: str) -> str:
    """A sentence from outside."""
    return f"<p>{html.escape(text)}</p>"


def _table(corner: str, columns: Sequence[str], lines: Iterable[str], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{html.escape(name) if name else ""}</th>' for name in columns)
    name = f'"cells {kind}"' if kind else '"cells"'
    return (
        f'<div class="panel table"><table class={name}><thead><tr><th scope="col">{html.escape(corner)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
