"""A program that prepares data in small parts, and is killed at its nth write: `python -m tests.data.stopped_prepare`.

Arguments: the kind of data, the folder with its files, the number of the call at which to die (0: never), "live" to show a bar.
It prints how many calls there were.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from train.data.prepared import write_source
from train.data.prepared.growing_file import GrowingFile
from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.source_config import FilesSource, SyntheticSource
from train.data.tokenization import tokenise
from train.data.tokenization.tokenizer import TokenizerConfig
from transformer.errors import UserError

KINDS = ("texts", "pairs", "tags", "answers", "classes")
PART_BYTES = 3000
BATCH_DOCUMENTS = 5


def config_of(kind: str, folder: Path) -> DataConfig:
    """Several files, unreadable documents among them, and several sources."""
    files = str(folder / kind / "*.jsonl")
    fraction = 0.3
    if kind == "texts":
        source = FilesSource(path=files, on_error="skip", group_field="group")
        held_out = FilesSource(path=str(folder / kind / "0.jsonl"), on_error="skip", limit=20)
        tokenizer = TokenizerConfig(kind="bpe", vocab_size=300)
        return DataConfig(sources=(source, source), validation=(held_out, held_out), tokenizer=tokenizer, num_workers=2)
    if kind == "pairs":
        sources = (FilesSource(path=files, target_field="target", limit=150), SyntheticSource(limit=30))
        tokenizers = {
            name: TokenizerConfig(kind="bpe", vocab_size=300 + n)
            for n, name in enumerate(("tokenizer", "target_tokenizer"))
        }
        return DataConfig(sources=sources, packing="pad", validation_fraction=fraction, **tokenizers)
    settings = {
        "tags": {"text_field": "words", "label_field": "tags", "label_kind": "tags"},
        "answers": {"text_field": "group", "target_field": "text", "label_field": "answers", "label_kind": "answers"},
        "classes": {"label_field": "group"},
    }[kind]
    source = FilesSource(path=files, **settings)
    return DataConfig(sources=(source, source), packing="documents", validation_fraction=fraction)


def write_files(kind: str, folder: Path) -> None:
    """Four files of 50 documents each, one in 40 without text where that may be."""
    (folder / kind).mkdir(parents=True)
    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "Grüße", "x", "=", "1", "\u2028", "    return", "def f(x):"]
    for file in range(4):
        lines = []
        for number in range(50):
            chosen = [str(word) for word in random.choice(words, random.integers(1, 40))]
            row = {"text": " ".join(chosen), "target": " ".join(chosen[::-1]), "group": f"group {random.integers(20)}"}
            row["words"], row["tags"] = chosen, [word[:1].upper() for word in chosen]
            row["answers"] = {"text": chosen[:1], "answer_start": [0]}
            if kind == "texts" and (number + file) % 40 == 7:
                row = {"group": "none"}
            lines.append(json.dumps(row))
        (folder / kind / f"{file}.jsonl").write_text("\n".join(lines), "utf-8")


def _dies_at(wanted: int) -> list[int]:
    """Kill this process before call number `wanted` of what changes the disk; the count of such calls."""
    calls = [0]

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: object, **settings: object) -> object:
            calls[0] += 1
            if calls[0] == wanted:
                if owner is GrowingFile and name == "write":
                    arguments[0].flush()  # pyright: ignore[reportAttributeAccessIssue]
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **settings)

        setattr(owner, name, call)

    for owner, name in (
        (GrowingFile, "write"), (os, "fsync"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree"), (os, "ftruncate"),
    ):  # fmt: skip
        counted(owner, name)
    return calls


def main() -> None:
    kind, folder, wanted = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    write_source.PART_BYTES = PART_BYTES
    tokenise._BATCH_DOCUMENTS = BATCH_DOCUMENTS
    calls = _dies_at(wanted)
    try:
        prepare(config_of(kind, folder))
    except UserError as error:
        sys.exit(f"UserError: {error}")
    print(calls[0])


if __name__ == "__main__":
    main()
