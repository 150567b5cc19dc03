"""From YAML and flags to a config, and back."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from train.config.describe import to_data
from train.config.run import RunConfig
from train.config.yaml_files import as_json, dump_yaml, read_yaml
from transformer.errors import UserError
from transformer.models.families import inherit

T = TypeVar("T")


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, with command-line overrides such as `--model.num-layers 8`.

    Raises:
        UserError: no such file, invalid YAML, an unknown key, a wrong type, a value out of range, values that contradict each
            other, or imported weights, which have no objective.
    """
    config = parse(read_yaml(Path(path)), str(path), overrides)
    if config.objective.kind == "none":
        raise UserError(
            f"{path}: objective.kind: got 'none'; this is the config of imported weights: name their folder in the init_from of "
            "a config with an objective"
        )
    return config


def parse(data: Any, source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A config from plain data, with overrides; `source` names the data in errors.

    Raises:
        UserError: as `load`.
    """
    return build(RunConfig, data, source, overrides)


def build(config_type: type[T], data: Any, source: str, overrides: Sequence[str] = ()) -> T:
    """A config of any type from plain data, as `parse`."""
    import pydantic

    from train.config import overrides as flags
    from train.config.mistakes import first_mistake
    from train.config.schema import validator

    # As JSON, a list may become a tuple, while every scalar must still have the field's own type.
    data, changed = flags.apply(config_type, as_json(data, source), overrides)
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
