"""A config from its own plain data, without pydantic: for a process of ours that does not have it."""

from __future__ import annotations

import typing
from typing import Any, TypeVar

from train.config.tags import chosen, configs_in, default_of
from transformer.errors import alternatives, field_types

T = TypeVar("T")


def restore(config_type: type[T], data: dict[str, Any]) -> T:
    """The config that `to_data` turned into `data`. Raises `ConfigError` for a value that is not valid."""
    types = field_types(typing.cast(type, config_type))
    return config_type(**{name: _value(types[name], value, config_type, name) for name, value in data.items()})


def _value(annotation: Any, value: Any, owner: type, name: str) -> Any:
    if isinstance(value, list):
        items = [typing.get_args(one)[0] for one in alternatives(annotation) if typing.get_origin(one) is tuple]
        return tuple(_value(items[0], item, owner, name) if items else item for item in value)
    if isinstance(value, dict) and configs_in(annotation):
        kind = chosen(annotation, value, default_of(owner, name))
        assert kind is not None
        return restore(kind, value)
    return value
