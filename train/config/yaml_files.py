"""YAML for configs: floats as in version 1.2, and no duplicate keys."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from transformer.errors import UserError, nearest

_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
"""YAML 1.2's floats with an exponent; PyYAML's own rule reads 1e-3 as text."""


def read_yaml(path: Path) -> Any:
    """The data of a file. Raises `UserError` for one that cannot be read."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file.{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def parse_yaml(text: str, source: str) -> Any:
    """The data of a YAML text; `source` names it in errors. Raises `UserError` if it is not valid YAML."""
    import yaml

    try:
        return yaml.load(text, functools.partial(_loader(), source=source))
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def as_json(data: Any, source: str) -> Any:
    """The same data as JSON types, without shared objects. Raises `UserError` for a type that JSON lacks, such as a date."""
    try:
        return json.loads(json.dumps(data))
    except TypeError as error:
        raise UserError(f"{source}: a value that is not text, a number, a list or a mapping: {error}") from None


def dump_yaml(data: Any) -> str:
    """Data as YAML, which `parse_yaml` reads back unchanged."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes a text that would be read as a number."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True)


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads YAML 1.2's floats (1e-3 is a number), and refuses duplicate keys."""

        def __init__(self, text: str, source: str) -> None:
            super().__init__(text)
            self._source = source

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            self.flatten_mapping(node)
            keys = [self.construct_object(key) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(f"{self._source}: line {node.start_mark.line + 1}: the key {key!r} appears twice")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    return Loader


def _similar_file(path: Path) -> str:
    folder = path.parent
    return nearest(path.name, (other.name for other in folder.glob("*.yaml"))) if folder.is_dir() else ""
