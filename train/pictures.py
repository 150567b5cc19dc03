"""Writes matplotlib's figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from train.files import whole_file, writing
from transformer.errors import UserError, first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the name of the file ends with, whole or not at all; folders are made.

    Raises:
        UserError: it cannot be written, or no format has that ending.
    """
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                figure.savefig(partial, format=path.suffix.removeprefix(".") or "png")
    except ValueError as error:
        raise UserError(f"{path}: cannot be written: {first_line(error)}") from None
