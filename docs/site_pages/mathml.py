"""Equations as MathML, by docutils' own translator from LaTeX: browsers show it without a script or a font."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def inline_math(writer: Any, node: Any) -> None:
    """Write an equation within a line. Raises `nodes.SkipNode`, since all of it is written."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(writer: Any, node: Any) -> None:
    """Write an equation of its own. Raises `nodes.SkipNode`, since all of it is written."""
    writer.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode
