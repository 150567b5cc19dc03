"""Damaged and hostile folders of Hugging Face's, given to `manyheads import`."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

from tests.mutations.edits import damaged, edited, put, value
from tests.mutations.mutant import Mutant, Setting, of_command

_INDEX = "model.safetensors.index.json"


def weights(random: Random, setting: Setting) -> Mutant:
    """A checkpoint with something changed, to be imported."""
    name = random.choice(("bert", "gpt2", "llama", "t5", "parts"))
    folder = setting.place / "checkpoint"
    shutil.copytree(setting.material / "huggingface" / name, folder)
    how = random.choice((_config, _config, _config, _header, _header, _index, _bytes, _files, _tokenizer, _pooling))
    what = how(folder, random)
    arguments: list[Any] = ["import", folder, "--run-dir", setting.place / "run", "--no-verify"]
    if random.random() < 0.1:
        arguments += ["--head", random.choice(("masked", "embedding", "nothing", "", "classification"))]
    return of_command(f"{name}: {what}", *arguments)


def _json(path: Path, random: Random) -> str:
    data = json.loads(path.read_text("utf-8"))
    whats = []
    for _ in range(random.choice((1, 1, 2))):
        data, what = edited(data, random)
        whats.append(what)
    path.write_text(json.dumps(data), "utf-8")
    return f"{path.name}: {'; '.join(whats)}"


def _config(folder: Path, random: Random) -> str:
    path = folder / "config.json"
    if random.random() < 0.4:
        data = json.loads(path.read_text("utf-8"))
        field = random.choice((*data, *_FIELDS))
        data[field] = value(random)
        path.write_text(json.dumps(data), "utf-8")
        return f"config.json: {field} {data[field]!r:.60}"
    return _json(path, random)


_FIELDS = (
    "rope_scaling", "rope_parameters", "rope_theta", "id2label", "label2id", "num_labels", "eos_token_id", "attention_dropout",
    "hidden_dropout_prob", "hidden_act", "head_dim", "num_key_value_heads", "tie_word_embeddings", "sliding_window",
    "layer_types",
    "initializer_range", "layer_norm_eps", "rms_norm_eps", "type_vocab_size", "classifier_dropout", "problem_type", "dtype",
    "decoder_start_token_id", "relative_attention_num_buckets", "max_position_embeddings", "architectures", "model_type",
)  # fmt: skip


def _header(folder: Path, random: Random) -> str:
    """A safetensors file whose header is not what its tensors are."""
    path = random.choice(sorted(folder.glob("*.safetensors")))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    how = random.choice(
        ("length", "length", "offsets", "offsets", "shape", "dtype", "edit", "edit", "name", "twice", "raw")
    )
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    about = header[name]
    if how == "length":
        new = random.choice((0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 2**63 - 1))
        path.write_bytes(struct.pack("<Q", new) + content[8:])
        return f"a header of {new} bytes"
    if how == "offsets":
        first, last = about["data_offsets"]
        size = last - first
        about["data_offsets"] = random.choice(
            ([first, last + 4], [first - 4, last], [-size, 0], [0, size], [last, first], [len(rest), len(rest) + size],
            [2**62, 2**62 + size],
             [float(first), float(last)], [first], [], None, [first, last, 0], [True, size + 1], [first + 1, last + 1])
        )  # fmt: skip
    elif how == "shape":
        shape = about["shape"]
        about["shape"] = random.choice(
            (shape[::-1], [*shape, 1], [-one for one in shape], [0], [], [2**32, 2**32], [1.5], None, "4", [*shape, 0],
            [2**63], [True, *shape],
             [*shape[:-1], shape[-1] // 2, 2])
        )  # fmt: skip
    elif how == "dtype":
        about["dtype"] = random.choice(
            ("F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "x", "", None, 3, [], {})
        )
    elif how == "name":
        header[random.choice(("../x", "", "a\x1b[31m", "x" * 1_000, "__metadata__", names[0]))] = header.pop(name)
    elif how == "twice":
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(about)}}}"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + rest)
        return f"{name} twice"
    elif how == "raw":
        text = random.choice(
            ("[" * 5_000, "[]", "null", "{", '{"a": 1}', '{"a": {}}', "\xff", '{"__metadata__": 3}', " " * 100)
        )
        path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + rest)
        return f"a header {text[:20]!r}"
    else:
        header, _ = edited(header, random)
    text = json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + rest)
    return f"{how} of {name}"


def _index(folder: Path, random: Random) -> str:
    """An index that names other files than there are."""
    path = folder / _INDEX
    data = json.loads(path.read_text("utf-8")) if path.exists() else {"weight_map": {"a": "model.safetensors"}}
    if random.random() < 0.5 and data["weight_map"]:
        name = random.choice(list(data["weight_map"]))
        data["weight_map"][name] = random.choice(
            ("../../outside.safetensors", "/etc/passwd", "", ".", "config.json", "x", 3, None, [], "a\0b", "C:x")
        )
        what = f"{name}: {data['weight_map'][name]!r}"
    else:
        data, what = edited(data, random)
    path.write_text(json.dumps(data), "utf-8")
    return f"index: {what}"


def _bytes(folder: Path, random: Random) -> str:
    path = random.choice(sorted(folder.iterdir()))
    content, what = damaged(path.read_bytes(), random)
    path.write_bytes(content)
    return f"{path.name}: {what}"


def _files(folder: Path, random: Random) -> str:
    path = random.choice(sorted(folder.iterdir()))
    how = random.choice(("delete", "folder", "pipe", "link", "pickled", "nothing"))
    path.unlink()
    if how in ("folder", "pipe"):
        put(path, how)
    elif how == "link":
        put(path, how, random.choice(("nothing", path.name, "..", "/dev/zero")))
    elif how == "pickled":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    elif how == "nothing":
        for other in list(folder.iterdir()):
            other.unlink()
    return f"{path.name}: {how}"


def _tokenizer(folder: Path, random: Random) -> str:
    return _json(folder / "tokenizer.json", random)


def _pooling(folder: Path, random: Random) -> str:
    """What sentence-transformers writes next to a model."""
    (folder / "1_Pooling").mkdir()
    data, what = edited({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 16}, random)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(data), "utf-8")
    lengths, other = edited({"max_seq_length": 8}, random)
    (folder / "sentence_bert_config.json").write_text(json.dumps(lengths), "utf-8")
    return f"pooling: {what}; {other}"
