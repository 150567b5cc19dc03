"""Tensors in safetensors files: read lazily, one slice at a time; written in files of a bounded size.

The format is a length, a JSON header, and the tensors' bytes one after the other. Files are read through a memory map, so that
slices of any type of weights, including bfloat16, can be read with no more memory than they need.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from transformer.errors import UserError, first_line, shown
from transformer.paths import check_file, path_inside

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
        check_file(folder / INDEX)
        try:
            index = json.loads((folder / INDEX).read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{folder / INDEX}: no index of tensors can be read here: {first_line(error)}") from None
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{folder / INDEX}: no index of tensors: weight_map should name the file of each tensor")
        names = sorted(set(places.values()))
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
    check_file(path)
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
        header.pop("__metadata__", None)
        views = {name: _view(name, about, data) for name, about in header.items()}
        _check_contiguous(header, len(data))
        yield from views.items()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {first_line(error)}; get it again") from None


def _view(name: str, about: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    if not _is_described(about):
        raise ValueError(f"{shown(name)} has no dtype, shape and data_offsets as the format has them")
    kind, shape, (first, last) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
    if kind not in _OTHERS and kind not in DTYPES:
        raise UserError(f"tensor {name} is of type {kind}; supported: {', '.join(DTYPES)}")
    itemsize = _OTHERS[kind] if kind in _OTHERS else np.dtype(DTYPES[kind]).itemsize
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * itemsize:
        raise ValueError(f"{name}, {kind} {list(shape)}, should be at bytes {first} to {last} of {len(data)}")
    if kind in _OTHERS:
        return np.broadcast_to(np.zeros((), np.int64), shape)
    return data[first:last].view(DTYPES[kind]).reshape(shape)


def _check_contiguous(header: Mapping[str, Any], size: int) -> None:
    """Raise a `ValueError` for tensors that share bytes, and for bytes that do not belong to a tensor: the format has neither."""
    end = 0
    for (first, last), name in sorted((tuple(about["data_offsets"]), name) for name, about in header.items()):
        if first != end:
            raise ValueError(f"{shown(name)} begins at byte {first}, and the tensor before it ends at {end}")
        end = last
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of {size}")


def _is_described(about: Any) -> bool:
    """Whether a tensor's part of the header has a type, a shape, and where it begins and ends."""
    if not isinstance(about, dict) or not isinstance(about.get("dtype"), str):
        return False
    shape, offsets = about.get("shape"), about.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(one) is int and one >= 0 for one in (*shape, *offsets))


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
        save_file(folder / file, held)
    if len(files) > 1:
        total = sum(math.prod(about.shape) * np.dtype(about.dtype).itemsize for about in shapes.values())
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def save_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as one file. Raises `OSError`."""
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    try:
        safetensors.save_file(dict(tensors), str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        # The library has errors of its own for what the system refuses.
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def _numbered(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
