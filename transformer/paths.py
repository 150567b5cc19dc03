"""Paths whose names come from files that somebody else may have written."""

from __future__ import annotations

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
