"""Checks of the arguments of decoding, before any program is compiled.

Each error names the prompt, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from transformer.errors import UserError, shown

MAX_SEED = 2**32 - 1


def check_rows(name: str, rows: Any, vocab_size: int | None) -> None:
    """Raise a `UserError` unless `rows` are lists of token ids, none of them empty.

    Args:
        name: what a row is called in messages: a prompt, a source.
        vocab_size: vocabulary size of the model that reads them; None: any whole number of 0 or more is an id.
    """
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence | np.ndarray | jax.Array):
        raise UserError(f"{name}s: got {shown(rows)}; expected a list of {name}s, each a list of token ids")
    for number, row in enumerate(rows, start=1):
        where = f"{name} {number}"
        if isinstance(row, str | bytes):
            raise UserError(
                f"{where}: got the text {shown(row)}; expected token ids: encode it with the model's tokenizer"
            )
        ids = _ids(row)
        if ids is None:
            raise UserError(
                f"{where}: got {shown(row)}; expected a list of token ids (a batch of one is a list in a list)"
            )
        if not len(ids):
            raise UserError(f"{where} is empty; expected at least one token id")
        for place, token in enumerate(ids, start=1):
            if isinstance(token, bool | np.bool_) or not isinstance(token, int | np.integer):
                raise UserError(
                    f"{where}: token {place} is {shown(token)}, of type {type(token).__name__}; expected a whole number"
                )
            if token < 0 or (vocab_size is not None and token >= vocab_size):
                allowed = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
                size = "" if vocab_size is None else f" of {vocab_size}"
                raise UserError(
                    f"{where}: token {place}: token id {token} is outside the model's vocabulary{size}; allowed: {allowed}"
                )


def check_count(name: str, value: Any) -> None:
    """Raise a `UserError` unless `value` is a whole number of 1 or more."""
    if not _is_whole(value) or value < 1:
        raise UserError(f"{name}: got {shown(value)}; allowed: a whole number, 1 or more")


def check_seed(value: Any) -> None:
    """Raise a `UserError` unless `value` is a valid seed; JAX would map other values to valid ones."""
    if not _is_whole(value) or not 0 <= value <= MAX_SEED:
        raise UserError(f"seed: got {shown(value)}; allowed: a whole number, 0 to 2**32 - 1")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _ids(row: Any) -> Sequence[Any] | None:
    """The row as a sequence; None if it is not one."""
    if isinstance(row, list | tuple | range):
        return row
    try:
        array = np.asarray(row)
    except (TypeError, ValueError):
        return None
    # A set or a generator becomes an array with no dims.
    return list(array) if array.ndim == 1 else None
