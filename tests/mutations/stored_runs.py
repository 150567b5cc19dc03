"""Damaged and hostile folders of runs, given to the commands that read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from tests.mutations.edits import damaged, edited, put
from tests.mutations.mutant import Mutant, Setting, of_command
from train.checkpoints.integrity import HASHES, write_hashes

_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_COMMANDS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "gpt": (
        ("generate", "RUN", "--prompt", "a", "--max-tokens", 2, "--temperature", 0), ("checkpoints", "RUN"), ("eval", "RUN"),
        ("diff", "RUN", "RUN"), ("plot", "RUN"), ("report", "RUN"),
        ("export", "RUN", "--no-verify"), ("attend", "RUN", "--text", "ab"),
        ("generate", "RUN", "--prompt", "a", "--max-tokens", 2, "--step", "latest"), ("checkpoints", "RUN", "--remove", "1"),
        ("inspect-data", "RUN"), ("train", "RUN/config.yaml", "--run-dir", "RUN", "--steps", 3),
    ),
    "classifier": (
        ("predict", "RUN", "--file", "MATERIAL/labelled.jsonl"), ("embed", "RUN", "--file", "MATERIAL/labelled.jsonl",
        "--out", "x.npy"),
        ("eval", "RUN"), ("export", "RUN", "--no-verify"),
    ),
    "translator": (("translate", "RUN", "--text", "ba", "--beams", 1), ("export", "RUN", "--no-verify")),
}  # fmt: skip


def run(random: Random, setting: Setting) -> Mutant:
    """A copy of a run with something changed, and the commands that read it."""
    name = random.choice(("gpt", "gpt", "gpt", "classifier", "translator"))
    folder = setting.place / "run"
    shutil.copytree(setting.material / "runs" / name, folder)
    what = _changed(folder, random)
    arguments = [
        str(one).replace("RUN", str(folder)).replace("MATERIAL", str(setting.material))
        for one in random.choice(_COMMANDS[name])
    ]
    return of_command(f"{name}: {what}", *arguments)


def _changed(folder: Path, random: Random) -> str:
    how = random.random()
    checkpoints = sorted(path for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    if how < 0.3:
        return _of_meta(random.choice(checkpoints), random)
    inside = how < 0.6
    root = random.choice(checkpoints) if inside else folder
    files = sorted(path for path in root.rglob("*") if path.is_file() and (inside or "checkpoints" not in path.parts))
    path = random.choice(files)
    about = f"{path.relative_to(folder)}: {_of_file(path, random)}"
    if inside and random.random() < 0.6 and path.name != HASHES:
        # Whoever changes a file can change its hash.
        write_hashes(root, _LATER)
        about += ", with its hash"
    return about


def _of_meta(checkpoint: Path, random: Random) -> str:
    """What a checkpoint says of its run, changed together with its hash."""
    path = checkpoint / "meta" / "metadata"
    data = json.loads(path.read_text("utf-8"))
    if random.random() < 0.3:
        files = data["tokenizer"]
        name = random.choice(
            ("../../outside", "/outside", "a/../../outside", "a\\b", "", ".", "tokenizer.json/x", "x" * 300, "\0")
        )
        files[name] = random.choice((next(iter(files.values())), 7, None, "text"))
        what = f"a file of the tokenizer named {name[:30]!r}"
    else:
        data, what = edited(data, random)
    path.write_text(json.dumps(data), "utf-8")
    write_hashes(checkpoint, _LATER)
    return f"{checkpoint.name}/meta: {what}"


def _of_file(path: Path, random: Random) -> str:
    how = random.choice(("bytes", "bytes", "json", "json", "json", "delete", "folder", "pipe", "link", "replace"))
    if how == "json":
        try:
            data = json.loads(path.read_text("utf-8"))
        except ValueError:
            how = "lines" if path.suffix == ".jsonl" else "bytes"
        else:
            data, what = edited(data, random)
            path.write_text(json.dumps(data), "utf-8")
            return what
    if how == "lines":
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        lines, what = edited(lines, random)
        path.write_text(
            "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])), "utf-8"
        )
        return what
    if how == "bytes":
        content, what = damaged(path.read_bytes(), random)
        path.write_bytes(content)
        return what
    path.unlink()
    if how in ("folder", "pipe"):
        put(path, how)
    elif how == "link":
        put(path, how, random.choice(("nothing", path.name, "..", "/dev/zero")))
    elif how == "replace":
        path.write_bytes(random.choice((b"{}", b"[]", b"null", b"1", b'"a"', b"\0" * 64, b"[" * 5_000)))
    return how
