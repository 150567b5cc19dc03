"""Bad arguments of the commands: texts, numbers, files and flags."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from tests.mutations.data_files import TASKS, _write_csv, _write_jsonl, _write_parquet
from tests.mutations.edits import damaged, edited
from tests.mutations.mutant import Mutant, Setting, of_command

_TEXTS = (
    "", " ", "\n", "a", "ba", "def f", "é漢字🙂", "\x1b[31mred", "\x00"[:0], "\t\r\n", "\udcff", "\u202eabc", "a" * 15,
    "a" * 16, "a" * 17, "b" * 20_000,
    "[red]", "[/]", "[link=x]", "{}", "%s", "[MASK]", "<|endoftext|>", "\u0000".strip("\0"), "\ufeff", "\u200b",
    "a\u0301" * 5, "ba da " * 3,
)  # fmt: skip
_NUMBERS = (
    "0", "1", "-1", "2", "3", "16", "17", "1000000", "99999999999999999999", "nan", "inf", "-inf", "1e400", "1e-400", "0.5",
    "1.0", "", " ", "x",
    "1_0", "٣", "²", "0x10", "+1", "1e3", "true", "1,2", "-0.0", "1e-30", "1e30", "4294967296", "9" * 5_000,
)  # fmt: skip
_LISTS = (
    "",
    ",",
    "0",
    "0,",
    "0,1",
    "1,0",
    "0,0",
    "2",
    "-1",
    "x",
    "²",
    "٣",
    "0;1",
    "0 , 1",
    "9" * 5_000,
    "0," * 500 + "0",
    "1e3",
    "0-1",
)
_STEPS = (
    "best",
    "latest",
    "1",
    "2",
    "0",
    "-1",
    "3",
    "²",
    "٣",
    "01",
    "",
    " 1",
    "../1",
    "x",
    "9" * 5_000,
    "BEST",
    "1.0",
    "\udcff",
)
_RUNS = ("gpt", "classifier", "translator")


def arguments(random: Random, setting: Setting) -> Mutant:
    """A command with bad arguments."""
    name = random.choice(_RUNS)
    run = setting.place / "run"
    shutil.copytree(setting.material / "runs" / name, run)
    made = random.choice(list(_COMMANDS))
    words = [made, *_COMMANDS[made](random, setting, run)]
    words = _mangled(words, random) if random.random() < 0.15 else words
    # No argument of a process holds a zero byte.
    words = [str(word).replace("\0", "0") for word in words]
    return of_command(name, *words)


def _mangled(words: list[Any], random: Random) -> list[Any]:
    place = random.randrange(len(words) + 1)
    how = random.choice(("drop", "insert", "swap", "double", "unknown", "path"))
    if how == "drop":
        return words[:place] + words[place + 1 :]
    if how == "insert":
        return [*words[:place], random.choice((*_TEXTS, "--", "-", "-h", "--help", "=")), *words[place:]]
    if how == "swap":
        return [*words[::-1]]
    if how == "double":
        return words + words[1:]
    if how == "unknown":
        return [
            *words,
            random.choice(("--nothing", "--nothing=3", "-x", "--steps", "--promptt", "--", "--=", "--\x1b[31m")),
        ]
    return [
        str(word).replace(
            "/run",
            random.choice(
                (
                    "/nothing",
                    "/run/config.yaml",
                    "/run/checkpoints",
                    "/run/../run",
                    "s3://nothing/run",
                    "memory://x",
                    "file:///etc",
                    "x://",
                    "",
                    "/\udcff",
                )
            ),
        )
        for word in words
    ]


def _flags(random: Random, known: dict[str, tuple[Any, ...]], most: int = 3) -> list[Any]:
    words: list[Any] = []
    for flag in random.sample(list(known), random.randrange(1, min(most, len(known)) + 1)):
        words += [f"{flag}={random.choice(known[flag])}"]
    return words


def _step(random: Random) -> list[Any]:
    return [f"--step={random.choice(_STEPS)}"] if random.random() < 0.25 else []


_OUT = ("out", "out.npy", "out.parquet", "out.html", "out.png", "out.svg", "out.x", "", ".", "run", "run/config.yaml",
    "a/b/c/out.png", "file/out.png",
        "x" * 300, "\udcff.png", "é.png", "file", "/dev/full", "out.png/", "\x1b[31m.png", "*.png")  # fmt: skip


def _out(random: Random, setting: Setting) -> str:
    (setting.place / "file").write_text("a")
    name = random.choice(_OUT)
    return name if name.startswith("/") or not name else str(setting.place / name)


def _file(random: Random, setting: Setting, *, text: bool) -> str:
    """A file of texts or records, mostly bad."""
    place = setting.place
    if random.random() < 0.25:
        path = place / "special"
        how = random.choice(("missing", "folder", "pipe", "dangling", "-", "device", ""))
        if how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "dangling":
            path.symlink_to("nothing")
        return {"-": "-", "device": "/dev/zero", "": ""}.get(how, str(path))
    if text or random.random() < 0.3:
        path = place / "texts.txt"
        path.write_bytes("\n".join(random.sample(_TEXTS, 3)).encode("utf-8", "surrogateescape"))
    else:
        rows: list[Any] = [TASKS["class"][1](number) for number in range(3)]
        if random.random() < 0.6:
            rows, _ = edited(rows, random)
            rows = rows if isinstance(rows, list) else [rows]
        suffix, write = random.choice(((".jsonl", _write_jsonl), (".csv", _write_csv), (".parquet", _write_parquet)))
        path = place / f"rows{suffix}"
        write(path, rows, random)
    if random.random() < 0.3:
        content, _ = damaged(path.read_bytes(), random)
        path.write_bytes(content)
    return str(path)


def _generate(random: Random, setting: Setting, run: Path) -> list[Any]:
    words: list[Any] = [
        run,
        f"--prompt={random.choice(_TEXTS)}",
        f"--max-tokens={random.choice(('2', '2', *_NUMBERS))}",
    ]
    if random.random() < 0.2:
        words[1] = f"--prompts-file={_file(random, setting, text=True)}"
    flags = {
        f"--{name}": _NUMBERS
        for name in (
            "temperature",
            "top-k",
            "top-p",
            "min-p",
            "repetition-penalty",
            "seed",
            "beams",
            "num-best",
            "length-penalty",
        )
    }
    return words + (_flags(random, flags) if random.random() < 0.7 else []) + _step(random)


def _translate(random: Random, setting: Setting, run: Path) -> list[Any]:
    words: list[Any] = [run, f"--text={random.choice(_TEXTS)}"]
    if random.random() < 0.2:
        words[1] = f"--file={_file(random, setting, text=True)}"
    if random.random() < 0.2:
        words += [f"--attention={_out(random, setting)}"]
    flags = {f"--{name}": _NUMBERS for name in ("beams", "num-best", "length-penalty", "coverage-penalty")}
    return words + (_flags(random, flags) if random.random() < 0.7 else ["--beams=1"]) + _step(random)


def _attend(random: Random, setting: Setting, run: Path) -> list[Any]:
    words: list[Any] = [run, f"--text={random.choice(_TEXTS)}"]
    words += _flags(random, {"--layers": _LISTS, "--heads": _LISTS}) if random.random() < 0.8 else []
    return words + ([f"--out={_out(random, setting)}"] if random.random() < 0.3 else []) + _step(random)


def _embed(random: Random, setting: Setting, run: Path) -> list[Any]:
    words: list[Any] = [
        run,
        f"--file={_file(random, setting, text=False)}",
        f"--out={random.choice(('x.npy', 'x.parquet', _out(random, setting)))}",
    ]
    known = {"--field": (*_TEXTS, "text.x", "label"), "--pooling": ("mean", "cls", "x", "")}
    return words + (_flags(random, known) if random.random() < 0.5 else []) + _step(random)


def _predict(random: Random, setting: Setting, run: Path) -> list[Any]:
    words: list[Any] = [run, f"--file={_file(random, setting, text=False)}"]
    return words + ([f"--out={_out(random, setting)}"] if random.random() < 0.3 else []) + _step(random)


def _export(random: Random, setting: Setting, run: Path) -> list[Any]:
    known = {
        "--format": ("hf", "peft", "onnx", "x"), "--out": (_out(random, setting),),
        "--model-type": ("gpt2", "bert", "llama", "t5", "marian", "x", "", "\x1b[31m"),
        "--dtype": ("float32", "bfloat16", "float16", "float64", "int8", "x", "", "object"),
        "--max-shard-size": ("5GB", "20KB", "0", "x", "", "9" * 30 + "GB"),
    }  # fmt: skip
    return [run, "--no-verify", *_flags(random, known), *_step(random)]


def _eval(random: Random, setting: Setting, run: Path) -> list[Any]:
    words: list[Any] = [run, f"--data={_file(random, setting, text=False)}"] if random.random() < 0.7 else [run]
    return words + ([f"--out={_out(random, setting)}"] if random.random() < 0.4 else []) + _step(random)


def _diff(random: Random, setting: Setting, run: Path) -> list[Any]:
    other = random.choice(
        (
            run,
            setting.material / "runs" / random.choice(_RUNS),
            setting.place / "nothing",
            setting.place,
            "",
            "/dev/null",
            "\udcff",
        )
    )
    return [run, other, *([f"--out={_out(random, setting)}"] if random.random() < 0.6 else [])]


def _plot(random: Random, setting: Setting, run: Path) -> list[Any]:
    return [*_diff(random, setting, run)] if random.random() < 0.7 else [run, f"--out={_out(random, setting)}"]


def _checkpoints(random: Random, setting: Setting, run: Path) -> list[Any]:
    return [run, f"--remove={random.choice((*_STEPS, *_LISTS, '1,1', '1,2', '../x', '1,'))}"]


def _config(random: Random, setting: Setting, run: Path) -> Path:
    path = setting.place / "config.yaml"
    path.write_text((run / "config.yaml").read_text("utf-8"), "utf-8")
    return path


def _prepare(random: Random, setting: Setting, run: Path) -> list[Any]:
    known = {
        "--data.sources.0.path": (_file(random, setting, text=False), *_TEXTS), "--data.validation-fraction": _NUMBERS,
        "--data.tokenizer.vocab-size": _NUMBERS, "--model.vocab-size": _NUMBERS, "--length": _NUMBERS,
        "--data.num-workers": ("0", "-1", "3", "x"),
        "--data.sources.0.limit": _NUMBERS, "--data.sources.0.weight": _NUMBERS, "--batch-size": _NUMBERS,
        "--data.packing": ("chunk", "documents", "pad", "x"),
    }  # fmt: skip
    return [_config(random, setting, run), *_flags(random, known)]


def _inspect(random: Random, setting: Setting, run: Path) -> list[Any]:
    known = {"--step": _NUMBERS, "--rows": _NUMBERS, "--diff": (run, "nothing", "", run / "config.yaml"),
        "--out": (_out(random, setting),),
             "--steps": _NUMBERS, "--seed": _NUMBERS}  # fmt: skip
    return [random.choice((run, _config(random, setting, run), "nothing")), *_flags(random, known)]


def _train(random: Random, setting: Setting, run: Path) -> list[Any]:
    known = {"--profile": ("1:2", "0:1", "2:1", "x", "²:³", "1:", ":", "9" * 5_000 + ":1"), "--allow-changed": ("data", "x",
        ",", "model", "a.b", "\x1b[31m"),
             "--seeds": ("0", "-1", "x", ""), "--devices": ("0", "-1", "x"), "--num-processes": ("0", "-1", "x"),
             "--process-id": ("-1", "5", "x"),
             "--heartbeat-seconds": ("0", "-1", "x"), "--steps": ("0", "-1", "1", "2"), "--model.num-layers": ("3",),
             "--batch-size": ("8", "0"),
             "--checkpoint.keep": _NUMBERS[:8], "--init-from": (run, "nothing", "", setting.material)}  # fmt: skip
    words = [_config(random, setting, run), "--run-dir", run, *_flags(random, known)]
    # Without a bad value of an argument, it is refused before a step: the folder holds another run.
    return [*words, "--model.embed-dim", "32"]


def _import(random: Random, setting: Setting, run: Path) -> list[Any]:
    good = setting.material / "huggingface" / random.choice(("bert", "gpt2"))
    source = random.choice((good, good, run, "nothing/x", "a/b/c", "", ".", "~", "~nosuchuser/x", "wheel:", "wheel:x",
        "wheel:x==1:y", "wheel:../x==1:y",
                            "\udcff", "x" * 300, "./nothing", "/dev/null", "a@b", "@", "\x1b[31m"))  # fmt: skip
    known = {
        "--run-dir": (setting.place / "new", run, _out(random, setting)),
        "--head": ("masked", "x", ""),
        "--sha256": ("x", "", "0" * 64),
    }
    return [source, "--no-verify", *_flags(random, known)]


_COMMANDS = {
    "generate": _generate, "translate": _translate, "attend": _attend, "embed": _embed, "predict": _predict, "export": _export,
    "eval": _eval, "diff": _diff, "plot": _plot, "report": _plot,
    "checkpoints": _checkpoints, "prepare": _prepare, "inspect-data": _inspect,
    "train": _train, "import": _import,
}  # fmt: skip


def stdin(random: Random) -> bytes:
    """What a command reads from standard input, if it does."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("a", "b"))
    return random.choice(
        (b"", b"a\nb\n", b"\xff\xfe", b"\0\0", rows.encode(), b"\n\n", b'{"text": 3}\n', b"\xef\xbb\xbfa\n")
    )
