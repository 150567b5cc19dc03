"""A pydantic validator of any tree of config dataclasses, made from their annotations alone.

A union of configs is discriminated by its tag: the field that has a Literal of one value in all of them (`kind`, `family`). A
missing tag is that of the field's default, and so are fields that a mapping leaves out of the default's own kind.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired, Union

import pydantic
from typing_extensions import TypedDict

from transformer.errors import ConfigError, field_types


@functools.cache
def validator(config_type: type) -> pydantic.TypeAdapter[Any]:
    """What makes a config of JSON: strictly, and with no unknown keys."""
    return pydantic.TypeAdapter(_one(config_type, None))


def is_config(kind: Any) -> bool:
    """Whether a type is a config dataclass."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def configs_in(annotation: Any) -> tuple[type, ...]:
    """The config classes that a field itself may hold: one, those of a union, or none."""
    return tuple(part for part in _members(annotation) if is_config(part))


def tag_of(config_types: tuple[type, ...]) -> str:
    """The field that says which of several configs one is."""
    for name in field_types(config_types[0]):
        if all(tag_value(one, name) is not None for one in config_types):
            return name
    raise TypeError(
        f"no field with a Literal of one value distinguishes {', '.join(one.__name__ for one in config_types)}"
    )


def tag_value(config_type: type, name: str) -> str | None:
    """The only value of a tag; None for a field that is none."""
    annotation = field_types(config_type).get(name)
    values = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
    return values[0] if len(values) == 1 else None


def default_of(config_type: type, name: str, base: Any = None) -> Any:
    """A field's value where nothing is given: that of `base`, or the class's own; MISSING for a field that must be given."""
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
    return next((one for one in configs if tag_value(one, tag) == name), None)


def default_tag(config_types: tuple[type, ...], default: Any) -> str | None:
    """The tag of a field's default; where that is no config, of the first of the union."""
    if isinstance(default, tuple):
        default = default[0] if default else None
    chosen_type = type(default) if type(default) in config_types else config_types[0]
    return tag_value(chosen_type, tag_of(config_types))


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(one for part in typing.get_args(annotation) for one in _members(part))
    return (annotation,)


@functools.cache
def _one(config_type: type, base: Any) -> Any:
    """A mapping that becomes a config; `base` has the values of fields that it leaves out."""
    fields: dict[str, Any] = {}
    for name, annotation in field_types(config_type).items():
        default = default_of(config_type, name, base)
        kind = _any(annotation, default)
        fields[name] = kind if default is dataclasses.MISSING else NotRequired[kind]
    make: Any = TypedDict
    shape = make(config_type.__name__, fields)
    shape.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)
    return Annotated[shape, pydantic.AfterValidator(functools.partial(_build, config_type, base))]


def _any(annotation: Any, default: Any) -> Any:
    """An annotation with its configs as mappings."""
    configs = configs_in(annotation)
    if not configs:
        if typing.get_origin(annotation) is tuple:
            return tuple[tuple(part if part is ... else _any(part, default) for part in typing.get_args(annotation))]  # type: ignore[misc]
        return annotation
    shapes = [_one(one, default if type(default) is one else None) for one in configs]
    found = shapes[0]
    if len(configs) > 1:
        tag, usual = tag_of(configs), default_tag(configs, default)

        def choose(value: Any) -> Any:
            return str(value.get(tag, usual)) if isinstance(value, dict) else None

        tagged = [
            Annotated[shape, pydantic.Tag(str(tag_value(one, tag)))] for one, shape in zip(configs, shapes, strict=True)
        ]
        found = Annotated[_union(tagged), pydantic.Discriminator(choose)]
    others = [part for part in _members(annotation) if not is_config(part)]
    return _union([found, *others])


def _union(parts: Sequence[Any]) -> Any:
    return functools.reduce(operator.or_, parts)


def _build(config_type: type, base: Any, given: dict[str, Any]) -> Any:
    names = list(field_types(config_type))
    try:
        return config_type(**given) if base is None else dataclasses.replace(base, **given)
    except ConfigError as error:
        if issubclass(config_type, error.owner):
            raise
        values = {name: given.get(name, default_of(config_type, name, base)) for name in names}
        # The error is of a part that contradicts another one.
        places = list(_places(values, error))
        path = next((path for path, same in places if same), places[0][0] if places else "")
        raise ConfigError(config_type, f"{path}{error.field}", error.given, error.allowed) from None


def _places(values: dict[str, Any], error: ConfigError) -> typing.Iterator[tuple[str, bool]]:
    """Where a config lies that an error may be about (`model.`, `pattern.1.`), and whether it has the value given."""
    for name, value in values.items():
        items = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for index, item in items:
            kind: type = type(item)
            if not is_config(kind):
                continue
            path = f"{name}." if index is None else f"{name}.{index}."
            if isinstance(item, error.owner):
                yield path, getattr(item, error.field, None) == error.given
            inner = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
            yield from ((path + below, same) for below, same in _places(inner, error))
