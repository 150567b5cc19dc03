"""YAML for configs: floats as in version 1.2, and no duplicate keys."""

from __future__ import annotations

import collections
import functools
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from train.text_files import read_text
from transformer.errors import UserError, first_line, nearest, shown
from transformer.paths import check_file

_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
"""YAML 1.2's floats with an exponent; PyYAML's own rule reads 1e-3 as text."""
_MERGE = "tag:yaml.org,2002:merge"

_MOST_VALUES = 1_000_000
"""The most values in a config: a few aliases of aliases are many more than any memory holds."""


def read_yaml(path: Path) -> Any:
    """The data of a file. Raises `UserError` for one that cannot be read."""
    check_file(path)
    try:
        return parse_yaml(read_text(path), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file.{_similar_file(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def parse_yaml(text: str, source: str) -> Any:
    """The data of a YAML text; `source` names it in errors. Raises `UserError` if it is not valid YAML."""
    import yaml

    try:
        return yaml.load(text, functools.partial(_loader(), source=source))
    except UserError:
        raise
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {_without_jargon(error)}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: too many collections inside each other") from None
    except Exception:  # PyYAML reads tagged values, dates and numbers with no check of its own
        raise UserError(
            f"{source}: not valid YAML: a number, a date or a value with a tag (!!) that cannot be read; put text in quotes"
        ) from None


def as_json(data: Any, source: str) -> Any:
    """The same data as JSON types, without shared objects.

    Raises `UserError` for a type that JSON lacks, such as a date, and for aliases that repeat data endlessly or nearly so.
    """
    try:
        if _count(data, {}) > _MOST_VALUES:
            raise UserError(f"{source}: its aliases (&, *) repeat data until there are over {_MOST_VALUES:,} values")
        return json.loads(json.dumps(data))
    except TypeError as error:
        raise UserError(f"{source}: a value that is not text, a number, a list or a mapping: {error}") from None
    except ValueError as error:
        raise UserError(f"{source}: a value that JSON cannot hold: {first_line(error)}") from None
    except RecursionError:
        raise UserError(f"{source}: too many collections inside each other") from None


def _count(data: Any, known: dict[int, int | None]) -> int:
    """How many values data has once shared ones are copies. Raises `ValueError` for data that holds itself.

    Args:
        known: counts of the collections that were seen, by identity; None for one that is being counted.
    """
    if not isinstance(data, dict | list):
        return 1
    if id(data) in known:
        if (found := known[id(data)]) is None:
            raise ValueError("an alias (*) inside of what it names")
        return found
    known[id(data)] = None
    known[id(data)] = total = 1 + sum(_count(one, known) for one in (data.values() if isinstance(data, dict) else data))
    return total


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
            self._checked: set[int] = set()

        def flatten_mapping(self, node: Any) -> None:
            # Once, and before it is merged (<<): a mapping's own keys replace those of what it merges.
            if id(node) not in self._checked:
                self._checked.add(id(node))
                keys = collections.Counter(
                    key
                    for one, _ in node.value
                    if isinstance(key := "<<" if one.tag == _MERGE else self.construct_object(one), Hashable)
                )
                for key, count in keys.items():
                    if count > 1:
                        raise UserError(
                            f"{self._source}: line {node.start_mark.line + 1}: the key {shown(key)} appears twice"
                        )
            super().flatten_mapping(node)
            # A mapping that merges this one must not see what was replaced.
            last = {
                (one.tag, one.value) if isinstance(one.value, str) else id(one): (one, two) for one, two in node.value
            }
            node.value = list(last.values())

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    return Loader


def _without_jargon(error: Exception) -> str:
    text = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
    return first_line(text.replace("found unhashable key", "a key that is a list or a mapping"))


def _similar_file(path: Path) -> str:
    folder = path.parent
    return nearest(path.name, (other.name for other in folder.glob("*.yaml"))) if folder.is_dir() else ""
