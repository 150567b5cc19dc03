"""Reads configs' annotations: the classes that a field may hold, the tag field of a union, and the defaults."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, Union

from transformer.errors import field_types


def is_config(kind: Any) -> bool:
    """Whether a type is a config dataclass."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def configs_in(annotation: Any) -> tuple[type, ...]:
    """The config classes that a field may hold: one, the members of a union, or none."""
    return tuple(part for part in members(annotation) if is_config(part))


def tag_of(config_types: tuple[type, ...]) -> str:
    """The field that distinguishes several configs: a Literal in all of them, with values that no two share."""
    for name in field_types(config_types[0]):
        values = [tag_values(one, name) for one in config_types]
        if all(values) and len({value for own in values for value in own}) == sum(map(len, values)):
            return name
    raise TypeError(f"no Literal field distinguishes {', '.join(one.__name__ for one in config_types)}")


def tag_values(config_type: type, name: str) -> tuple[str, ...]:
    """The values of a tag; none for a field that is not a Literal."""
    annotation = field_types(config_type).get(name)
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def default_of(config_type: type, name: str, base: Any = None) -> Any:
    """A field's default: its value in `base`, or the class's own default; MISSING for a required field."""
    if base is not None:
        return getattr(base, name)
    field = config_type.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def chosen(annotation: Any, given: Any, default: Any) -> type | None:
    """The config class that a mapping is for, by its tag or the default's; None where there is none of that name."""
    configs = configs_in(annotation)
    if len(configs) < 2:
        return configs[0] if configs else None
    tag = tag_of(configs)
    name = given.get(tag) if isinstance(given, dict) and tag in given else default_tag(configs, default)
    return next((one for one in configs if name in tag_values(one, tag)), None)


def default_tag(config_types: tuple[type, ...], default: Any) -> str | None:
    """The tag of a field's default; if the default is not a config, the tag of the union's first member."""
    if isinstance(default, tuple):
        default = default[0] if default else None
    tag = tag_of(config_types)
    return getattr(default, tag) if type(default) in config_types else tag_values(config_types[0], tag)[0]


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; for any other annotation, the annotation itself."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(one for part in typing.get_args(annotation) for one in members(part))
    return (annotation,)
