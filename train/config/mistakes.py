"""A mistake in a config's data as one line: the field's path, the value given, what is allowed, the nearest name."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass
from typing import Any

from train.config.moved import MOVED
from train.config.tags import chosen, configs_in, default_of, default_tag, tag_of, tag_values
from transformer.errors import ConfigError, field_types, nearest, shown, what_fits

_NO_MAPPING = ("dict_type", "union_tag_not_found")
_LONGEST = 80
"""The most characters of a value that a message shows."""
_SHOWN = 12
"""The most fields that a message lists when no name is similar."""


@dataclass(frozen=True)
class Mistake:
    """One mistake."""

    path: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path) or 'the file'}: {self.message}"


@dataclass(frozen=True)
class _Place:
    """Where an error of pydantic's is, in terms of the data."""

    path: tuple[str, ...]
    annotation: Any
    """Of the field there; None for a key that the config does not have."""
    value: Any
    owner: Any = None
    """The config class around it."""
    siblings: tuple[type, ...] = ()
    """The other classes that the config might be of."""
    tag: str = ""
    """The value of the tag that selects among them."""


def first_mistake(config_type: type, errors: typing.Sequence[Any], data: Any) -> Mistake:
    """The mistake to name first: a field that has moved, a key that is unknown, then the first of the others.

    Args:
        errors: pydantic's, of validating `data`.
    """
    found = [(error, _locate(config_type, list(error["loc"]), data)) for error in errors]
    moved = [
        (place, MOVED[key])
        for error, place in found
        if (error["type"] == "extra_forbidden" or error["type"] in _NO_MAPPING)
        and (key := _general(place.path)) in MOVED
        # A field that is a section now was a single value.
        and not (MOVED[key].startswith(f"{key}.") and isinstance(place.value, dict | list))
    ]
    if moved:
        (first, to), *others = moved
        more = "".join(f"; {'.'.join(place.path)} is now {where}" for place, where in others)
        return Mistake(first.path, f"this field has moved: it is now {to}{more}")
    error, place = next((one for one in found if one[0]["type"] == "extra_forbidden"), found[0])
    return _mistake(error, place, config_type)


def with_path(config_type: type, error: ConfigError) -> str:
    """The message of an error in an existing config, with the path of the first field that it may concern."""

    def search(kind: type, prefix: str) -> typing.Iterator[str]:
        if issubclass(kind, error.owner):
            yield prefix
        for name, annotation in field_types(kind).items():
            items = typing.get_args(annotation)[0] if typing.get_origin(annotation) is tuple else annotation
            index = "*." if items is not annotation else ""
            for inner in configs_in(items):
                yield from search(inner, f"{prefix}{name}.{index}")

    return next(search(config_type, ""), "") + str(error)


def _general(path: tuple[str, ...]) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path)


def _mistake(error: Any, place: _Place, config_type: type) -> Mistake:
    kind, path, value = error["type"], place.path, place.value
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return Mistake((*path, *cause.field.split(".")), f"got {shown(cause.given, _LONGEST)}; {cause.allowed}")
    if kind == "missing":
        return Mistake(path, "it is missing, and has no default")
    if kind == "extra_forbidden":
        return Mistake(path, _unknown(place, config_type))
    configs = configs_in(place.annotation)
    if kind == "union_tag_invalid" and len(configs) > 1:
        tag = tag_of(configs)
        names = [value for one in configs for value in tag_values(one, tag)]
        given = value.get(tag)
        near = nearest(given, names) if isinstance(given, str) else ""
        return Mistake(
            (*path, tag), f"got {shown(given, _LONGEST)}; allowed: {', '.join(names)}" + (f".{near}" if near else "")
        )
    if len(configs) > 1 and isinstance(value, str):
        names = [value for one in configs for value in tag_values(one, tag_of(configs))]
        return Mistake(
            path,
            f"got {shown(value, _LONGEST)}; allowed: {', '.join(names)}, or a mapping of field: value.{nearest(value, names)}",
        )
    if configs:
        return Mistake(path, f"got {shown(value, _LONGEST)}; expected a mapping of field: value")
    return Mistake(path, f"got {shown(value, _LONGEST)}; {what_fits(place.annotation, value)}")


def _unknown(place: _Place, config_type: type) -> str:
    """The message about a key that its config, a part of a `config_type`, does not have."""
    key, names = place.path[-1], list(field_types(place.owner))
    if place.siblings:
        tag = tag_of(place.siblings)
        having = [value for one in place.siblings if key in field_types(one) for value in tag_values(one, tag)]
        if having:
            section = "one" if len(place.path) < 2 or place.path[-2].isdecimal() else place.path[-2]
            plural = "families" if tag == "family" else f"{tag}s"
            return f"{key} is a field of {plural} {', '.join(having)}; this {section} is {place.tag}"
    under, anywhere = _in_sections(place.owner, place.path[:-1]), _in_sections(config_type, ())
    if where := under.get(key) or anywhere.get(key):
        return f"no such field. Did you mean {where!r}?"
    if near := nearest(key, names):
        return f"no such field.{near}"
    for fields in (under, anywhere):
        if similar := difflib.get_close_matches(key, fields, n=1, cutoff=0.6):
            return f"no such field. Did you mean {fields[similar[0]]!r}?"
    listed = f"; allowed: {', '.join(names)}" if len(names) <= _SHOWN else ""
    return f"no such field{listed}"


def _in_sections(config_type: type, path: tuple[str, ...]) -> dict[str, str]:
    """The fields of a config at `path` and of its sections: name → where the first of that name is.

    A section's fields come before those of its own sections, and the default of several classes before the others.
    """
    found = {name: ".".join((*path, name)) for name in field_types(config_type)}
    for name, annotation in field_types(config_type).items():
        is_list = typing.get_origin(annotation) is tuple
        inside = (*path, name, "0") if is_list else (*path, name)
        for inner in configs_in(typing.get_args(annotation)[0] if is_list else annotation):
            found = _in_sections(inner, inside) | found
    return found


def _locate(config_type: type, loc: list[Any], data: Any) -> _Place:
    """Follow pydantic's location through annotations and data; tags of unions are not part of the path."""
    path: list[str] = []
    annotation: Any = config_type
    value, default = data, None
    while loc:
        configs = configs_in(annotation)
        if configs:
            owner = chosen(annotation, value, default)
            if len(configs) > 1:
                loc.pop(0)
                if not loc:
                    break
            name = str(loc.pop(0))
            path.append(name)
            base = default if type(default) is owner else None
            tag = ""
            if len(configs) > 1:
                given = value if isinstance(value, dict) else {}
                tag = str(given.get(tag_of(configs)) or default_tag(configs, default))
            value = value.get(name) if isinstance(value, dict) else None
            assert owner is not None
            if name not in field_types(owner):
                return _Place(tuple(path), None, value, owner, configs if len(configs) > 1 else (), tag)
            annotation, default = field_types(owner)[name], default_of(owner, name, base)
        elif typing.get_origin(annotation) is tuple:
            index = int(loc.pop(0))
            path.append(str(index))
            value = value[index] if isinstance(value, list) and index < len(value) else None
            parts = typing.get_args(annotation)
            annotation = parts[0] if parts[1:] == (...,) else parts[index]
        else:
            # What follows are pydantic's names of the members of a union.
            break
    return _Place(tuple(path), annotation, None if value is dataclasses.MISSING else value)
