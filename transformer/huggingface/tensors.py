"""Tensors in safetensors files: read lazily, one slice at a time; written in files of a bounded size.

The format is a length, a JSON header, and the tensors' bytes one after the other. Files are read through a memory map, so that
slices of any type of weights, including bfloat16, can be read with no more memory than they need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from transformer.errors import UserError
from transformer.paths import path_inside

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
"""Supported types of weights."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
"""Types of tensors that are not weights, such as positions, and their sizes."""


def open_folder(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint's folder by name, each a view of its file, in one file or in several with an index.

    Raises:
        UserError: no safetensors there, pickled weights instead, a file that is truncated or damaged, or an index that
            names a file outside the folder.
    """
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / INDEX}: no index of tensors can be read here: {error}") from None
        paths = [path_inside(folder, name, source=folder / INDEX) for name in names]
        if absent := [name for name, path in zip(names, paths, strict=True) if not path.exists()]:
            raise UserError(
                f"{folder}: {len(absent)} of {len(names)} files of the index are missing: {', '.join(absent)}"
            )
        files = paths
    else:
        single = folder / SINGLE
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(_nothing(folder))
    found: dict[str, np.ndarray] = {}
    for file in files:
        found |= dict(open_file(file))
    return found


def open_file(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one file, as views of it; of tensors with a type other than those of weights only the shape is kept."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"it has {size} bytes, and its header alone should have {length}")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a mapping")
        data = (
            np.asarray(np.memmap(path, np.uint8, "r", offset=8 + length))
            if size > 8 + length
            else np.zeros(0, np.uint8)
        )
        for name, about in header.items():
            if name != "__metadata__":
                yield name, _view(name, about, data)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}; get it again") from None


def _view(name: str, about: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    kind, shape, (first, last) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
    if kind not in _OTHERS and kind not in DTYPES:
        raise UserError(f"tensor {name} is of type {kind}; supported: {', '.join(DTYPES)}")
    itemsize = _OTHERS[kind] if kind in _OTHERS else np.dtype(DTYPES[kind]).itemsize
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * itemsize:
        raise ValueError(f"{name}, {kind} {list(shape)}, should be at bytes {first} to {last} of {len(data)}")
    if kind in _OTHERS:
        return np.broadcast_to(np.zeros((), np.int64), shape)
    return data[first:last].view(DTYPES[kind]).reshape(shape)


def _nothing(folder: Path) -> str:
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if not pickled:
        return f"{folder}: no *.safetensors in this folder"
    return (
        f"{folder}: its weights are in {', '.join(pickled)}, and such files can run code when they are read; convert them "
        "where you trust them: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
    )


def write_folder(
    folder: Path, shapes: Mapping[str, Any], tensors: Iterator[tuple[str, np.ndarray]], limit: int
) -> None:
    """Write tensors as they arrive, in files of at most `limit` bytes each, except for a single tensor that is larger than that.

    Args:
        shapes: of all the tensors, in the order in which they arrive: descriptions with a shape and a dtype.

    Raises:
        OSError: any error while writing.
    """
    from safetensors.numpy import save_file

    groups: list[list[str]] = [[]]
    room = limit
    for name, about in shapes.items():
        size = math.prod(about.shape) * np.dtype(about.dtype).itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    files = [SINGLE] if len(groups) == 1 else [_numbered(number, len(groups)) for number in range(len(groups))]
    for file, names in zip(files, groups, strict=True):
        held = {name: np.asarray(next(tensors)[1], order="C") for name in names}
        save_file(held, str(folder / file), metadata={"format": "pt"})
    if len(files) > 1:
        total = sum(math.prod(about.shape) * np.dtype(about.dtype).itemsize for about in shapes.values())
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _numbered(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
