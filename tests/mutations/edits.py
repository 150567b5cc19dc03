"""Changes that make good data bad: of the values in a tree of data, and of the bytes in a file."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from random import Random
from typing import Any

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.5, 1e-320, 1e30, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "text", "null", "true", "3", "nan", "1e400", "é", "漢字", "\u202e",
    "a\tb", "a\nb", "\x1b[31m", "\x07", "../../x", "/nowhere/x", "C:\\x", "~", "~nosuchuser/x", "*", "[", "%s{}", "a" * 5_000,
    "\x00", "\ud800",
)  # fmt: skip
"""Values that few fields expect."""
NESTED: tuple[Any, ...] = (
    [], {}, [[]], [None], [1, 2], ["a", "b"], [{}], {"a": 1}, {"kind": "text"}, {"": None}, [[[[[[1]]]]]], [0] * 1_000,
    {"kind": []}, {"kind": None}, {"family": {}},
)  # fmt: skip
"""Collections that few fields expect."""


def put(path: Path, kind: str, target: str = "nothing") -> None:
    """Put a `folder`, a `pipe`, or a link to `target` (`link`), to nothing (`dangling`) or itself (`loop`) where no file is."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "loop" else target)


def value(random: Random) -> Any:
    """One of these values."""
    return copy.deepcopy(random.choice(SCALARS if random.random() < 0.75 else NESTED))


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def edited(data: Any, random: Random) -> tuple[Any, str]:
    """A tree with one value changed, and what was changed."""
    data = copy.deepcopy(data)
    known = places(data)
    if not known or random.random() < 0.02:
        new = value(random)
        return new, f"replaced by {new!r:.60}"
    *above, key = path = random.choice(known)
    holder = data
    for part in above:
        holder = holder[part]
    name = ".".join(map(str, path))[:120]
    how = random.choice(("replace", "replace", "replace", "remove", "rename", "wrap", "scale", "text", "double"))
    old = holder[key]
    if how == "remove":
        del holder[key]
        return data, f"{name} removed"
    if how == "rename" and isinstance(holder, dict):
        new_key = random.choice((str(key)[:-1], str(key).upper(), f"{key}s", f" {key}", "", "é", "kind", "a\x1b[0m"))
        del holder[key]
        holder[new_key] = old
        return data, f"{name} renamed to {new_key!r}"
    if how == "wrap":
        holder[key] = random.choice(([old], {"value": old}, [old, old], [[old]]))
        return data, f"{name} wrapped"
    if how == "scale" and isinstance(old, int | float) and not isinstance(old, bool):
        factor = random.choice((-1, 0, 1_000, 10**9, 0.5, 1e-9, 1 / 3))
        holder[key] = old * factor
        return data, f"{name} times {factor}"
    if how == "text":
        holder[key] = str(old)
        return data, f"{name} as text"
    if how == "double" and isinstance(holder, list):
        holder.append(copy.deepcopy(old))
        return data, f"{name} twice"
    holder[key] = new = value(random)
    return data, f"{name} replaced by {new!r:.60}"


def damaged(content: bytes, random: Random) -> tuple[bytes, str]:
    """A file's bytes with some of them changed, and what was changed."""
    size = len(content)
    first = random.randrange(size + 1)
    last = min(size, first + random.choice((1, 2, 8, 64, 4096)))
    how = random.choice(
        ("cut", "flip", "flips", "delete", "repeat", "zeros", "insert", "empty", "noise", "bom", "tail")
    )
    if how == "cut":
        return content[:first], f"cut to {first} of {size} bytes"
    if how in ("flip", "flips") and size:
        changed = bytearray(content)
        for _ in range(1 if how == "flip" else random.choice((2, 20, 200))):
            changed[random.randrange(size)] ^= 1 << random.randrange(8)
        return bytes(changed), f"{how}ped bits"
    if how == "delete":
        return content[:first] + content[last:], f"bytes {first} to {last} deleted"
    if how == "repeat":
        return content[:last] + content[first:], f"bytes {first} to {last} repeated"
    if how == "zeros":
        return content[:first] + bytes(last - first) + content[last:], f"bytes {first} to {last} zeroed"
    if how == "insert":
        piece = random.choice(
            (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\n", b"\n\n\n", b'"', b"\\", b",", b"{", b"\x1b[2J")
        )
        return content[:first] + piece + content[first:], f"{piece!r} inserted at byte {first}"
    if how == "empty":
        return b"", "empty"
    if how == "noise":
        return random.randbytes(random.choice((1, 7, 8, 9, 100, 5_000))), "noise"
    if how == "bom":
        return random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) + content, "with a byte-order mark"
    return content + random.choice((b"\0", b"\xff", b"}", b"x" * 1_000, content[:100])), "with a tail"
