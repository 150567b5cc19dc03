"""The reference of configs: every class that a config may hold, with the fields' types, defaults and docstrings."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from train.config import RunConfig
from train.config.changes import rule_of
from train.config.describe import meanings
from train.config.tags import configs_in, default_of, tag_of, tag_values
from transformer.errors import field_types
from transformer.resume import OnResume

_ON_RESUME = {
    OnResume.FREE: "may change on resume",
    OnResume.UPWARDS: "may grow on resume, or change with `--allow-changed`",
    OnResume.BY_CONTENT: "may change on resume if the data stays the same",
    OnResume.ASK: "may change on resume with `--allow-changed`",
    OnResume.NEVER: "another value is another run",
}
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}


@dataclasses.dataclass(frozen=True)
class Section:
    """A config class, and the first place in a config that may hold it."""

    config_type: type
    path: str
    tags: tuple[str, ...] = ()
    """`kind: softmax`, ...: what a config says to choose this class."""
    within: tuple[str, ...] = ()
    """The tags of the classes that have the field, where only some of those at its place have it."""

    @property
    def title(self) -> str:
        """Its heading."""
        place = f"`{self.path}`" if self.path else "The whole config"
        chosen = f" with `{'` or `'.join(self.tags)}`" if self.tags else ""
        return place + chosen

    @property
    def anchor(self) -> str:
        """The target of links to it."""
        return f"config-{self.config_type.__name__.lower()}"


def every_field() -> str:
    """Markdown with a section for each config class, each field in it once."""
    found = {section.config_type: section for section in sections()}
    return "\n\n".join(_section(section, found) for section in found.values())


def sections() -> list[Section]:
    """Every config class that a `RunConfig` may hold, each at the first place that may hold it, from the outside in."""
    found: dict[type, Section] = {RunConfig: Section(RunConfig, "")}
    waiting = [RunConfig]
    while waiting:
        owner = waiting.pop(0)
        inner = []
        for name, annotation in field_types(owner).items():
            held = list(_configs(annotation))
            tag = tag_of(tuple(held)) if len(held) > 1 else None
            path = f"{found[owner].path}.{name}".lstrip(".") + (".N" if _is_list(annotation) else "")
            for one in held:
                if one not in found:
                    tags = () if tag is None else tuple(f"{tag}: {value}" for value in tag_values(one, tag))
                    found[one] = Section(one, path, tags)
                    inner.append(one)
        waiting += inner
    placed = [dataclasses.replace(section, within=_within(section, list(found.values()))) for section in found.values()]
    # Together with the section that holds them.
    return sorted(placed, key=lambda section: _place(section.path))


def _within(section: Section, every: list[Section]) -> tuple[str, ...]:
    """The tags of those classes at the place of the section's owner that may hold it; none where all of them may."""
    outer, _, name = section.path.removesuffix(".N").rpartition(".")
    owners = [one for one in every if one.path == outer and one is not section]
    holding = [
        one for one in owners
        if section.config_type in _configs(field_types(one.config_type).get(name, type(None)))
    ]  # fmt: skip
    return tuple(tag for one in holding for tag in one.tags) if len(holding) < len(owners) else ()


def _place(path: str) -> tuple[Any, ...]:
    first = path.split(".")[0]
    names = ["", *field_types(RunConfig)]
    return names.index(first), path.count("."), path


def _configs(annotation: Any) -> Iterator[type]:
    for part in _members(annotation):
        if typing.get_origin(part) is tuple:
            for one in typing.get_args(part):
                yield from _configs(one)
        else:
            yield from configs_in(part)


def _is_list(annotation: Any) -> bool:
    return any(typing.get_origin(part) is tuple for part in _members(annotation))


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _section(section: Section, found: dict[type, Section]) -> str:
    level = "##" if section.path.count(".") == 0 else "###"
    about = " ".join((section.config_type.__doc__ or "").split())
    parts = [f"({section.anchor})=\n{level} {section.title}", about]
    if section.within:
        parts.append(f"Only within `{'`, `'.join(section.within)}`.")
    texts = meanings(section.config_type)
    for name, annotation in field_types(section.config_type).items():
        default = default_of(section.config_type, name)
        # A single value is what chose the class.
        if f"{name}: {default}" in section.tags and len(section.tags) == 1:
            continue
        kind = " or ".join(dict.fromkeys(_kinds(annotation, found)))
        facts = [kind, *_default(default, found), _ON_RESUME[rule_of(section.config_type, name)]]
        parts.append(f"`{name}`\n: {texts.get(name, '')}\n\n  *{'; '.join(facts)}*")
    return "\n\n".join(parts)


def _kinds(annotation: Any, found: dict[type, Section]) -> Iterator[str]:
    """What a field may hold, in words."""
    held = configs_in(annotation)
    if len(held) == 1:
        yield f"[fields](#{found[held[0]].anchor})"
    elif held:
        tag = tag_of(held)
        links = [f"[{', '.join(tag_values(one, tag))}](#{found[one].anchor})" for one in held]
        yield f"fields of a {tag}: " + ", ".join(links)
    for part in _members(annotation):
        if typing.get_origin(part) is Literal:
            yield ", ".join(f"`{json.dumps(value)}`".replace('"', "") for value in typing.get_args(part))
        elif typing.get_origin(part) is tuple:
            inner = [one for one in typing.get_args(part) if one is not ...]
            yield "a list of " + ", ".join(dict.fromkeys(kind for one in inner for kind in _kinds(one, found)))
        elif part not in held:
            yield _NAMES.get(part, "any value")


def _default(default: Any, found: dict[type, Section]) -> list[str]:
    if default is dataclasses.MISSING:
        return ["required"]
    if type(default) in found:
        section = found[type(default)]
        return [f"by default {section.tags[0]}"] if section.tags else []
    if isinstance(default, tuple):
        inner = [
            found[type(one)].tags[0] if type(one) in found and found[type(one)].tags else str(one) for one in default
        ]
        return [f"by default `[{', '.join(inner)}]`"]
    plain = isinstance(default, str) and default.isprintable() and default.strip() == default != ""
    return [f"by default `{default if plain else json.dumps(default, ensure_ascii=False)}`"]
