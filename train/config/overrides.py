"""Flags such as `--model.num-layers 8`, set into a config's plain data before it is validated."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, Literal

from train.config.tags import chosen, configs_in, default_of, is_config
from train.config.yaml_files import as_json, parse_yaml
from transformer.errors import UserError, alternatives, field_types, first_line, is_number, shown

WHERE = "command line"

Path = tuple[str, ...]
_TAGS = ("kind", "family")


def apply(config_type: type, data: Any, arguments: Sequence[str]) -> tuple[Any, list[Path]]:
    """The data with `--section.field value`, or `--section.field=value`, set in it; and the paths that were set.

    Values are YAML; a text field takes a word as it is, and a list may be several words. Names may have hyphens in the place
    of underscores.

    Raises:
        UserError: a flag without a value, or with a parent that has no fields. Names are not checked.
    """
    data = {} if data is None and arguments else data
    paths = []
    for path, words in _flags(arguments):
        _assign(config_type, data, path, words)
        paths.append(path)
    return data, paths


def _flags(arguments: Sequence[str]) -> list[tuple[Path, list[str]]]:
    words, found = list(arguments), []
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise UserError(f"{WHERE}: got {shown(word)}; expected --field value, such as --steps 500")
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if not values:
            raise UserError(f"{WHERE}: {word}: a value is missing, such as {word} 3 or {word}=3")
        found.append((tuple(name.replace("-", "_").split(".")), values))
    return found


def _assign(config_type: type, data: Any, path: Path, words: list[str]) -> None:
    """Set one value. Missing parents along the path are created: a mapping, or a list's default."""
    annotation: Any = config_type
    here, default = data, None
    for depth, key in enumerate(path):
        last = depth + 1 == len(path)
        if isinstance(here, list):
            if not is_number(key) or int(key) >= len(here):
                allowed = f"0 to {len(here) - 1}" if here else "none; the list is empty"
                raise UserError(f"{WHERE}: {'.'.join(path[:depth])}: got item {shown(key)}; allowed: {allowed}")
            place: Any = int(key)
            parts = typing.get_args(annotation)
            annotation = (parts[0] if parts[1:] == (...,) else parts[place]) if parts else None
        elif isinstance(here, dict):
            place = key
            owner = chosen(annotation, here, default) if configs_in(annotation) else None
            known = owner is not None and key in field_types(owner)
            if owner is not None and known:
                base = default if type(default) is owner else None
                annotation, default = field_types(owner)[key], default_of(owner, key, base)
            else:
                annotation = default = None
        else:
            raise UserError(f"{WHERE}: {'.'.join(path)}: {'.'.join(path[:depth]) or 'the file'} has no fields")
        if last:
            here[place] = _value(words, annotation, ".".join(path))
        elif isinstance(here, dict) and here.get(place) is None:
            here[place] = _plain(default) if isinstance(default, tuple) else {}
        here = here[place]


def _plain(value: Any) -> Any:
    """A default as data: the tags of its classes, and the fields that differ from the classes' own defaults."""
    kind: type = type(value)
    if is_config(kind):
        given = {name: getattr(value, name) for name in field_types(kind)}
        return {name: _plain(one) for name, one in given.items() if one != default_of(kind, name) or name in _TAGS}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _value(words: list[str], annotation: Any, name: str) -> Any:
    """The value of a field: a list where its items are given as separate words, else one value."""
    items = [typing.get_args(one)[0] for one in alternatives(annotation) if typing.get_origin(one) is tuple]
    if len(words) > 1:
        if not items:
            raise UserError(
                f"{WHERE}: {name}: got {len(words)} values, {first_line(', '.join(words), 80)}; it takes one"
            )
        return [_scalar(word, items[0], name) for word in words]
    value = _scalar(words[0], annotation, name)
    return [value] if str in items and isinstance(value, str) and not _is_named(value, annotation) else value


def _is_named(text: str, annotation: Any) -> bool:
    return any(
        typing.get_origin(one) is Literal and typing.get_args(one) == (text,) for one in alternatives(annotation)
    )


def _scalar(text: str, annotation: Any, name: str) -> Any:
    """A word of the command line, parsed as YAML unless its field holds text."""
    if _is_named(text, annotation):
        return text
    parts = alternatives(annotation)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if str in parts and not quoted:
        return None if text == "null" and type(None) in parts else text
    source = f"{WHERE}: {name}"
    return as_json(parse_yaml(text, source), source)
