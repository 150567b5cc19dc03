"""The reference of functions and classes: signatures with their shapes, and docstrings, read from the source by griffe.

Nothing is imported, and annotations are as they are written: `Float[Array, "B T N H"]`.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[2]
_LINE = 88
_HEADINGS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
}


@functools.cache
def _package(name: str) -> Any:
    return griffe.load(name, search_paths=[str(ROOT)])


def api(module: str, *names: str) -> str:
    """Markdown of these functions and classes of a module, or of all that are public."""
    package, _, inner = module.partition(".")
    found = _package(package)[inner] if inner else _package(package)
    chosen = names or [name for name, one in found.members.items() if _is_public(one)]
    return "\n\n".join("\n\n".join(_object(found[name], "###")) for name in chosen)


def _is_public(one: Any) -> bool:
    return not one.is_alias and not one.name.startswith("_") and (one.is_function or one.is_class) and one.has_docstring


def _object(one: Any, level: str) -> Iterator[str]:
    yield f"({one.path.lower().replace('_', '-')})=\n{level} `{one.name if level == '###' else f'{one.parent.name}.{one.name}'}`"
    if one.is_class and (inner := one.members.get("__init__")) is not None and inner.is_function:
        yield _signature(one.name, inner)
    elif one.is_function:
        yield _signature(one.name, one)
    if level == "###":
        yield f"From `{one.parent.path}`."
    yield from _docstring(one)
    if one.is_class:
        yield from _class(one)


def _class(one: Any) -> Iterator[str]:
    fields = [f"`{member.name}: {member.annotation}`\n: {_text(member)}" for member in _fields(one)]
    if fields:
        yield "**Fields**"
        yield from fields
    for member in one.members.values():
        if member.is_alias or not member.has_docstring or (member.name.startswith("_") and member.name != "__call__"):
            continue
        if member.is_function:
            yield from _object(member, "####")
        elif "property" in member.labels:
            yield f"`{member.name}: {member.annotation}`\n: {_text(member)}"


def _fields(one: Any) -> Iterator[Any]:
    for member in one.members.values():
        public = not member.is_alias and member.is_attribute and not member.name.startswith("_")
        if (
            public
            and "property" not in member.labels
            and member.has_docstring
            and "ClassVar" not in str(member.annotation)
        ):
            yield member


def _text(one: Any) -> str:
    return " ".join(inspect.cleandoc(one.docstring.value).split())


def _signature(name: str, function: Any) -> str:
    """A call as it is written, with one parameter a line where it is long."""
    parameters = list(_parameters(function))
    result = f" -> {function.returns}" if function.returns is not None and function.name != "__init__" else ""
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) > _LINE:
        line = "\n".join([f"{name}(", *(f"    {one}," for one in parameters), f"){result}"])
    # griffe writes strings in single quotation marks.
    line = line.replace("'", '"')
    return f"```python\n{line}\n```"


def _parameters(function: Any) -> Iterator[str]:
    starred = False
    for number, one in enumerate(function.parameters):
        if number == 0 and one.name in ("self", "cls"):
            continue
        kind = one.kind.value
        if kind == "keyword-only" and not starred:
            yield "*"
            starred = True
        starred |= kind == "variadic positional"
        mark = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        annotation = f": {one.annotation}" if one.annotation is not None else ""
        default = "" if one.default is None or mark else f"{' = ' if annotation else '='}{one.default}"
        yield f"{mark}{one.name}{annotation}{default}"


def _docstring(one: Any) -> Iterator[str]:
    """Its text, with the entries of `Args:` and the like as lists."""
    text = inspect.cleandoc(one.docstring.value) if one.has_docstring else ""
    before = ""
    for part in re.split(r"^(Args|Attributes|Returns|Yields|Raises):$", text, flags=re.M):
        if before == "":
            yield part.strip()
        elif before in _HEADINGS:
            yield f"**{_HEADINGS[before]}**"
            block, _, rest = re.sub(r"^\n", "", part).partition("\n\n")
            yield _entries(block) if before in ("Args", "Attributes", "Raises") else " ".join(block.split())
            # What follows the entries and is not indented is text again.
            yield rest.strip()
        before = part if part in _HEADINGS else "-"


def _entries(block: str) -> str:
    """`name: text` with continuation lines further in, as a Markdown list."""
    found = re.split(r"^ {4}(?! )", textwrap.indent(textwrap.dedent(block), " " * 4), flags=re.M)
    pairs = (" ".join(entry.split()).partition(": ") for entry in found if entry.strip())
    return "\n".join(f"- `{name}`: {text}" for name, _, text in pairs)
