"""Configs as a user's program makes them, and ones that differ a little from another."""

from __future__ import annotations

import dataclasses
import inspect


def built(config_type, **fields):
    """The config, made without the checks of types that only the tests have: those of its own are all that a user has."""
    config = object.__new__(config_type)
    inspect.unwrap(config_type.__init__)(config, **fields)
    return config


def changed(config, **changes):
    """The config with other fields; a dict changes fields of the config that is there: `attention={"window": 3}`."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    made = {
        name: changed(fields[name], **value) if isinstance(value, dict) else value for name, value in changes.items()
    }
    return built(type(config), **fields | made)
