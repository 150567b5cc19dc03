"""Bad vocabularies: a tokenizer.json, what is written next to it, and a file of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.mutations.edits import damaged, edited
from tests.mutations.mutant import Mutant, Setting, of_command

_KINDS = ("bpe", "wordpiece", "unigram", "words", "ranks")


def tokenizer(random: Random, setting: Setting) -> Mutant:
    """Data that is to be tokenised with a bad vocabulary."""
    kind = random.choice(_KINDS)
    folder = setting.place / "tokenizer"
    shutil.copytree(setting.material / "tokenizers" / kind, folder)
    path = random.choice(sorted(folder.iterdir()))
    main = folder / ("ranks.tiktoken" if kind == "ranks" else "tokenizer.json")
    if path.suffix == ".json" and random.random() < 0.7:
        what = _of_json(path, random)
    else:
        content, what = damaged(path.read_bytes(), random)
        path.write_bytes(content)
    config: dict[str, Any] = {
        "name": "mutant", "batch_size": 4, "steps": 1,
        "model": {"vocab_size": 400, "max_length": 16, "num_layers": 1, "embed_dim": 16, "attention": {"num_heads": 2}},
        "data": {
            "sources": [{"kind": "files", "path": str(setting.material / "texts.jsonl")}], "validation_fraction": 0.2,
            "tokenizer": {"kind": "gpt2" if kind == "ranks" else "file", "path": str(main)},
        },
    }  # fmt: skip
    if kind != "ranks" and random.random() < 0.3:
        config["data"]["tokenizer"]["end_of_text"] = random.choice(("", "[CLS]", "nothing", "a", "\x1b"))
    if random.random() < 0.3:
        config["data"]["tokenizer"]["special_tokens"] = [random.choice(("[MASK]", "<x>", "[a]"))]
    file = setting.place / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return of_command(f"{kind}: {path.name}: {what}", "prepare", file)


def _of_json(path: Path, random: Random) -> str:
    data = json.loads(path.read_text("utf-8"))
    vocabulary = data.get("model", {}).get("vocab")
    if isinstance(vocabulary, dict) and random.random() < 0.4:
        what = _of_ids(vocabulary, data, random)
    else:
        data, what = edited(data, random)
    path.write_text(json.dumps(data), "utf-8")
    return what


def _of_ids(vocabulary: dict[str, int], data: dict[str, Any], random: Random) -> str:
    """Ids that two tokens share, that no array can hold, or that are missing."""
    token, other = random.choice(list(vocabulary)), random.choice(list(vocabulary))
    how = random.choice(("same", "huge", "negative", "gap", "missing", "added", "no specials", "long"))
    if how == "same":
        vocabulary[token] = vocabulary[other]
    elif how == "missing":
        del vocabulary[token]
    elif how == "added":
        added = {
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        data["added_tokens"] = [
            *(data.get("added_tokens") or []),
            added | {"id": random.choice((0, 1, 10**6, 2**31, 2**32 - 1, 2**40, -1))},
        ]
    elif how == "no specials":
        data["added_tokens"] = []
    elif how == "long":
        vocabulary["a" * 100_000] = len(vocabulary)
    else:
        vocabulary[token] = {"huge": random.choice((10**6, 2**31, 2**32 - 1, 2**40)), "negative": -1, "gap": 70_000}[
            how
        ]
    return f"{how} id of {token!r:.30}"
