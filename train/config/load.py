"""From YAML and flags to a config, and back."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from train.config.complete import FindBase, complete
from train.config.describe import to_data
from train.config.run import RunConfig
from train.config.sections import LogConfig
from train.config.yaml_files import as_json, dump_yaml, read_yaml
from transformer.errors import UserError
from transformer.models.families import inherit

T = TypeVar("T")


def load(path: str | Path, overrides: Sequence[str] = (), *, find_base: FindBase | None = None) -> RunConfig:
    """Read a YAML file, with command-line overrides such as `--model.num-layers 8`.

    Args:
        find_base: finds the run of `init_from`, whose model and tokenizer the config takes over; None: it states them itself.

    Raises:
        UserError: no such file, invalid YAML, an unknown key, a wrong type, a value out of range, values that contradict each
            other, or imported weights, which have no objective.
    """
    config = parse(read_yaml(Path(path)), str(path), overrides, find_base=find_base)
    if config.objective.kind == "none":
        raise UserError(
            f"{path}: objective.kind: got 'none'; this is the config of imported weights: name their folder in the init_from of "
            "a config with an objective"
        )
    return config


def parse(data: Any, source: str, overrides: Sequence[str] = (), *, find_base: FindBase | None = None) -> RunConfig:
    """A config from plain data, with overrides and with what it leaves out (`train.config.complete`).

    Args:
        source: names the data in errors.
        find_base: as in `load`.

    Raises:
        UserError: as `load`.
    """
    return build(RunConfig, data, source, overrides, lambda data: complete(data, find_base))


def parse_stored(data: Any, source: str) -> RunConfig:
    """A config that a run keeps, as `parse`.

    Fields of `log` that no longer exist are passed over: where metrics went is not part of a run, and its files cannot be edited.
    """
    if isinstance(data, dict) and isinstance(log := data.get("log"), dict):
        known = {field.name for field in dataclasses.fields(LogConfig)}
        data = data | {"log": {name: value for name, value in log.items() if name in known}}
    return parse(data, source)


def build(
    config_type: type[T], data: Any, source: str, overrides: Sequence[str] = (),
    complete: Callable[[Any], Any] = lambda data: data,
) -> T:  # fmt: skip
    """A config of any type from plain data, as `parse`; `complete` fills in what the data leaves out."""
    import pydantic

    from train.config import overrides as flags
    from train.config.mistakes import first_mistake
    from train.config.schema import validator

    # As JSON, a list may become a tuple, while every scalar must still have the field's own type.
    data, changed = flags.apply(config_type, as_json(data, source), overrides)
    try:
        data = complete(data)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if isinstance(data, dict) and isinstance(model := data.get("model"), dict):
        data = data | {"model": inherit(model)}
    try:
        adapter: Any = validator(typing.cast(type, config_type))
        return adapter.validate_json(json.dumps(data))
    except pydantic.ValidationError as error:
        mistake = first_mistake(config_type, error.errors(), data)
        from_flag = any(path[: len(mistake.path)] == mistake.path[: len(path)] for path in changed)
        raise UserError(f"{flags.WHERE if from_flag else source}: {mistake}") from None


def dump(config: RunConfig) -> str:
    """The whole config as YAML, defaults included; `load` reads it back to an equal one."""
    return dump_yaml(to_data(config))
