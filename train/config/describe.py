"""A config as text and as plain data: its fields with their meanings, and the differences between two configs."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from train.config.tags import configs_in, default_of, tag_of, tag_values
from transformer.errors import field_types


def to_data(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`field: old → new` for each field in which two configs, as plain data, differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{path}.")
        elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after) and before != after:
            items = [{str(number): item for number, item in enumerate(one)} for one in (before, after)]
            lines += difference(items[0], items[1], f"{path}.")
        elif before != after:
            lines.append(f"{path}: {before!r} → {after!r}")
    return lines


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config, as text."""

    path: str
    value: Any
    default: Any
    meaning: str


def fields(config: Any, prefix: str = "", kinds: Sequence[type] = ()) -> Iterator[Field]:
    """Every field of a config, including those of its sections.

    Args:
        prefix: of the fields' paths.
        kinds: the classes that the config might be of; the meaning of its tag names them.
    """
    config_type: type = type(config)
    texts = meanings(config_type)
    tag = tag_of(tuple(kinds)) if len(kinds) > 1 else None
    # The tag decides which fields there are, so it comes first.
    for field in sorted(dataclasses.fields(config), key=lambda field: field.name != tag):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        annotation = field_types(config_type)[field.name]
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{path}.", configs_in(annotation))
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from fields(item, f"{path}.{index}.", configs_in(typing.get_args(annotation)[0]))
        else:
            meaning = texts.get(field.name, "")
            if field.name == tag:
                meaning += f" One of {', '.join(value for one in kinds for value in tag_values(one, field.name))}."
            yield Field(path, value, default_of(config_type, field.name), meaning)


@functools.cache
def meanings(config_type: type) -> dict[str, str]:
    """Field name → the docstring under it; for a tag, the docstring of its class."""
    found = {}
    for owner in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    for name, annotation in field_types(config_type).items():
        if typing.get_origin(annotation) is Literal and len(typing.get_args(annotation)) == 1 and config_type.__doc__:
            found[name] = " ".join(config_type.__doc__.split())
    return found
