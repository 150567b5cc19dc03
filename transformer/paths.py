"""Paths whose names come from files that somebody else may have written."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

from transformer.errors import UserError, shown


def path_inside(folder: Path, name: object, *, source: object) -> Path:
    """The path of a file in a folder, by a relative name that another file gives.

    Args:
        source: the file that gives the name, for a message.

    Raises:
        UserError: the name is no relative name of a file in the folder, such as `../x`, `/x` or `C:\\\\x`.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    plain = parts and ".." not in parts and not PurePosixPath(str(name)).is_absolute()
    if not plain or any(letter in str(name) for letter in "\\\0") or ":" in parts[0]:
        raise UserError(
            f"{source}: names the file {shown(name)}, which is not inside its folder; the file may be hostile"
        )
    return folder.joinpath(*parts)


def expanded(path: str | Path) -> Path:
    """The path with a home directory in the place of `~` or `~user`. Raises `UserError` for a user that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: there is no home directory for {Path(path).parts[0]!r}; write the path in full"
        ) from None


def check_file(path: Path) -> None:
    """Raise a `UserError` for a path of a device, a socket or a named pipe: reading one may wait, or go on, for ever.

    A pipe that the shell made (`/dev/stdin`, `/dev/fd/63`) has a writer, and is accepted. So is what does not exist, or cannot
    be looked at: opening it fails with a reason.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    if stat.S_ISFIFO(mode) and path.absolute().parts[1:2] in (("dev",), ("proc",)):
        return
    kinds = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for holds, name in kinds if holds(mode)), "a device")
    raise UserError(f"{path}: this is {kind}; name a file")
