"""A pydantic validator of any tree of config dataclasses, made from their annotations alone.

A union of configs is discriminated by its tag: the field that has a Literal in all of them, of values that no two share (`kind`,
`family`). A missing tag is that of the field's default, and so are fields that a mapping leaves out of the default's own kind.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NotRequired

import pydantic
from typing_extensions import TypedDict

from train.config.tags import configs_in, default_of, default_tag, is_config, members, tag_of, tag_values
from transformer.errors import ConfigError, field_types


@functools.cache
def validator(config_type: type) -> pydantic.TypeAdapter[Any]:
    """Builds a config from JSON, strictly; unknown keys are errors."""
    return pydantic.TypeAdapter(_one(config_type, None))


@functools.cache
def _one(config_type: type, base: Any) -> Any:
    """A mapping that becomes a config; fields that it leaves out take their values from `base`."""
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
        owners = {value: one.__name__ for one in configs for value in tag_values(one, tag)}

        def choose(value: Any) -> Any:
            if not isinstance(value, dict):
                return None
            name = value.get(tag, usual)
            return owners.get(name, name) if isinstance(name, str) else str(name)

        tagged = [Annotated[shape, pydantic.Tag(one.__name__)] for one, shape in zip(configs, shapes, strict=True)]
        found = Annotated[_union(tagged), pydantic.Discriminator(choose)]
    others = [part for part in members(annotation) if not is_config(part)]
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
        # The error is about one part that contradicts another.
        places = list(_places(values, error))
        path = next((path for path, same in places if same), places[0][0] if places else "")
        raise ConfigError(config_type, f"{path}{error.field}", error.given, error.allowed) from None


def _places(values: dict[str, Any], error: ConfigError) -> typing.Iterator[tuple[str, bool]]:
    """The path of a config that an error may concern (`model.`, `pattern.1.`), and whether it has the value given."""
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
