"""What the site adds to Sphinx: pages that are made from the code, and equations as MathML.

A page says `<!-- generate: WHAT ARGUMENTS -->` where a part of it is made at each build:

    fields                  every field of a config
    commands PROGRAM        every command of `manyheads` or `manyheads-bench`
    api MODULE NAMES...     functions and classes of a module; all that are public where no names are given
    sharding STRATEGY ...   a drawing of who holds what
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sphinx.errors import ExtensionError

from site_pages.api import api
from site_pages.commands import commands
from site_pages.fields import every_field
from site_pages.mathml import block_math, inline_math
from site_pages.sharding import drawing

_MARKER = re.compile(r"^<!-- generate: (\w+) ?(.*?) -->$", re.M)
_MAKERS: dict[str, Callable[..., str]] = {
    "fields": every_field, "commands": commands, "api": api, "sharding": drawing,
}  # fmt: skip


def fill(text: str) -> str:
    """A page's Markdown with its markers replaced. Raises `ExtensionError` for a marker that names nothing."""

    def made(found: re.Match[str]) -> str:
        if found[1] not in _MAKERS:
            raise ExtensionError(f"{found[0]}: there are {', '.join(_MAKERS)}")
        return _MAKERS[found[1]](*found[2].split())

    return _MARKER.sub(made, text)


def _fill_page(app: Any, name: str, content: list[str]) -> None:
    content[0] = fill(content[0])


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _fill_page)
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
