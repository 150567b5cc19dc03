"""What differs between the config of a checkpoint and that of the run which resumes from it, and whether it may."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from train.config.describe import fields
from train.config.run import RunConfig
from transformer.errors import UserError, nearest, shown
from transformer.resume import OnResume

DATA = "data"
"""Permits other data, in addition to fields of the section."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One field with another value."""

    path: str
    before: Any
    after: Any
    rule: OnResume

    @property
    def is_free(self) -> bool:
        """Whether a run may resume with it without being asked to. What is compared by content is compared elsewhere."""
        if self.rule is OnResume.UPWARDS:
            return self.after > self.before
        return self.rule in (OnResume.FREE, OnResume.BY_CONTENT)

    def __str__(self) -> str:
        return f"{self.path}: {shown(self.before, 80)} → {shown(self.after, 80)}"


def changes(before: Any, after: Any, prefix: str = "") -> Iterator[Change]:
    """Every field in which two configs of one class differ; of sections of different kinds, the section as a whole."""
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        path, rule = f"{prefix}{field.name}", rule_of(before.__class__, field.name)
        pairs = [(path, old, new)]
        if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
            pairs = [(f"{path}.{number}", *pair) for number, pair in enumerate(zip(old, new, strict=True))]
        if all(dataclasses.is_dataclass(one) and type(one) is type(other) for _, one, other in pairs):
            for place, one, other in pairs:
                yield from changes(one, other, f"{place}.")
        elif old != new:
            yield Change(path, old, new, rule)


def check_changes(before: RunConfig, after: RunConfig, allowed: Sequence[str], owner: str) -> list[Change]:
    """The changes that the user allowed.

    Args:
        allowed: paths of fields or sections, such as `optimizer.learning_rate`.
        owner: the checkpoint, for a message.

    Raises:
        UserError: a change that makes it another run, or one that has to be allowed and is not; all are named.
    """
    found = [change for change in changes(before, after) if not change.is_free]
    if never := [change.path for change in found if change.rule is OnResume.NEVER]:
        raise UserError(
            f"{owner} has a different config: {'; '.join(map(str, found))}. Another {', '.join(never)} makes it another run: "
            "undo the change, or start a new run with --run-dir FOLDER"
        )
    if asked := [change for change in found if not is_allowed(change.path, allowed)]:
        raise UserError(
            f"{owner} has a different config: {'; '.join(map(str, asked))}. Undo the change, allow it with "
            f"--allow-changed {','.join(change.path for change in asked)}, or start a new run with --run-dir FOLDER"
        )
    return found


def is_allowed(path: str, allowed: Sequence[str]) -> bool:
    """Whether a path, or a section that it belongs to, is among `allowed`."""
    return any(path == one or path.startswith(f"{one}.") for one in allowed)


def check_allowed(config: RunConfig, allowed: Sequence[str]) -> None:
    """Raise a `UserError` for a path that no field or section of the config has."""
    paths = {field.path for field in fields(config)}
    known = {path.rsplit(".", depth)[0] for path in paths for depth in range(path.count(".") + 1)}
    for path in allowed:
        if path not in known:
            raise UserError(
                f"--allow-changed: got {path!r}; allowed: fields and sections of the config.{nearest(path, known)}"
            )


@functools.cache
def rule_of(config_type: type, name: str) -> OnResume:
    """What a field's own type says, or else its class."""
    annotation = typing.get_type_hints(config_type, include_extras=True)[name]
    marks = [mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, OnResume)]
    return marks[0] if marks else getattr(config_type, "on_resume", OnResume.NEVER)
