"""Bad configs: fields, YAML text and command-line overrides, read as every command reads them."""

from __future__ import annotations

import functools
from pathlib import Path
from random import Random
from typing import Any

from tests.mutations.edits import SCALARS, damaged, edited, places, put
from tests.mutations.mutant import Mutant, Setting, listed, of_command

_CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
_SMALL = ("tiny", "stdlib_small")
"""Configs whose costs are computed in a moment."""
_WORDS = (
    "", " ", "null", "true", "0", "-1", "1e400", ".nan", ".inf", "-.inf", "99999999999999999999", "1_000", "0x10", "0o7", "1:30",
    "2001-99-99", "[", "[1, 2", "{a: 1}", "{a: {b: [1]}}", "&a [*a]", "*a", "!!python/object:os.system x", "!!binary x",
    "!!set {a}",
    "!!timestamp x", "!!int x", "!!float x", "? a", "- 1", "a: b: c", "'", '"', '"\\uD800"', "\udcff", "\x1b[31m", "é", "%",
    "@", "`a`",
    "<<: {a: 1}", "1" * 5_000, "[" * 2_000, "a" * 50_000, "..", "../../x", "~", "=", "--", "-", "kind", "file",
)  # fmt: skip
_TEXTS = (
    "a: &a [x]\nb: &b [*a, *a]\n", "model: &m {a: *m}\n", "x: !!python/object/apply:os.system [ls]\n", "%YAML 9.9\n---\n",
    "---\n---\n",
    "? [a, b]\n: c\n", "{1: 2}: 3\n", "!!binary x\n", "x: 2001-02-31\n", "x: 2001-99-99 25:61:61\n", "x: 190:20:30.15\n",
    "null: 1\n", "true: 1\n", "1.5: 1\n", "<<: 3\n", "<<: [1, 2]\n", "<<: *nothing\n", "\tname: x\n", "name:\tx\n",
    "a: |\n", "- - - -\n",
    "name: \"\\uD800\"\n", "name: \"\\x00\"\n", "name: \x1b[31m\n", "x: " + "9" * 5_000 + "\n", "x: 0b\n", "x: 0x\n", "x: 1_\n",
    "x: ._e+1\n", "x: 1e999999999\n", "? \n", ": \n", "!\n", "&\n", "x: !<> y\n", "=: =\n", "x: =\n", "x: <<\n", "x: 1:1:1:1\n",
)  # fmt: skip


def config(random: Random, setting: Setting) -> Mutant:
    """A config with bad fields, bad YAML or bad overrides."""
    source = random.choice([path for path in _CONFIGS if path.stem in _SMALL] if random.random() < 0.2 else _CONFIGS)
    path = setting.place / "config.yaml"
    how = random.choice(("fields", "fields", "fields", "bytes", "text", "bomb", "overrides", "overrides", "file"))
    overrides: list[str] = []
    about = how
    if how == "fields":
        data, whats = _data(source), []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            data, what = edited(data, random)
            whats.append(what)
        about = "; ".join(whats)
        path.write_bytes(_yaml(data))
    elif how == "bytes":
        content, about = damaged(source.read_bytes(), random)
        path.write_bytes(content)
    elif how == "text":
        path.write_text(_text(source, random), encoding="utf-8")
    elif how == "bomb":
        path.write_text(_bomb(source, random), encoding="utf-8")
    elif how == "overrides":
        path.write_bytes(source.read_bytes())
        overrides = _overrides(source, random)
        about = listed(*overrides)
    else:
        about = _no_file(path, random)
    about = f"{source.stem}: {about}"
    if source.stem in _SMALL and random.random() < 0.5:
        return of_command(about, "explain", path, *overrides)
    return Mutant(about, functools.partial(_load, path, overrides))


def _load(path: Path, overrides: list[str]) -> None:
    """Read a config, write it and read it again: the second is equal to the first."""
    from train.config import dump, load

    first = load(path, overrides)
    again = path.with_name("again.yaml")
    again.write_text(dump(first), encoding="utf-8")
    assert load(again) == first, "the config that was written is read back as another one"


@functools.cache
def _whole(source: Path) -> Any:
    """A config's data with every default filled in."""
    from train.config import load, to_data

    return to_data(load(source))


def _data(source: Path) -> Any:
    return _whole(source)


def _yaml(data: Any) -> bytes:
    import yaml

    return yaml.safe_dump(data, sort_keys=False).encode("utf-8", "surrogatepass")


def _text(source: Path, random: Random) -> str:
    """YAML with lines that are unusual or invalid."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    place = random.randrange(len(lines) + 1)
    how = random.choice(("insert", "insert", "double", "indent", "crlf", "alone", "value"))
    if how == "insert":
        return "".join([*lines[:place], random.choice(_TEXTS), *lines[place:]])
    if how == "double":
        return "".join([*lines[:place], *lines[max(0, place - 3) : place], *lines[place:]])
    if how == "indent":
        return "".join([*lines[:place], *(random.choice(("\t", " ", "   ")) + line for line in lines[place:])])
    if how == "crlf":
        return "\r\n".join(line.rstrip("\n") for line in lines)
    if how == "value":
        keyed = [number for number, line in enumerate(lines) if ": " in line and not line.startswith("#")]
        number = random.choice(keyed)
        lines[number] = f"{lines[number].partition(': ')[0]}: {random.choice(_WORDS)}\n"
        return "".join(lines).encode("utf-8", "replace").decode()
    return random.choice(_TEXTS)


def _bomb(source: Path, random: Random) -> str:
    """YAML that is small in a file and large, deep or endless in memory."""
    text = source.read_text(encoding="utf-8")
    kind = random.choice(("aliases", "merges", "depth", "flow", "cycle", "keys"))
    if kind == "aliases":
        count = random.choice((3, 9, 30, 60))
        layers = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, count)]
        return text + "a0: &a0 [x, x]\n" + "\n".join(layers) + "\n"
    if kind == "merges":
        layers = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, random.choice((3, 8, 30)))]
        return text + "a0: &a0 {x: 1}\n" + "\n".join(layers) + "\n"
    if kind == "depth":
        return text + "".join(f"{' ' * n}a:\n" for n in range(random.choice((50, 900, 3_000))))
    if kind == "flow":
        return text + "a: " + random.choice("[{") * random.choice((50, 900, 20_000)) + "\n"
    if kind == "cycle":
        return text + random.choice(("a: &a [*a]\n", "a: &a {b: *a}\n", "a: &a {<<: *a}\n"))
    return text + "".join(f"k{n}: 1\n" for n in range(random.choice((10, 2_000))))


def _overrides(source: Path, random: Random) -> list[str]:
    """Flags of fields that exist or nearly do, with values that are mostly wrong."""
    paths = [".".join(map(str, path)) for path in places(_data(source))]
    flags: list[str] = []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        name = random.choice(paths)
        name = random.choice(
            (name, name, name, name.replace("_", "-"), f"{name}.x", f"{name}.0", name[1:], f".{name}", name + ".")
        )
        word = random.choice((*_WORDS, *(str(one)[:5_000] for one in SCALARS)))
        word = word.encode("utf-8", "surrogateescape" if "\udcff" in word else "replace").decode(
            "utf-8", "surrogateescape"
        )
        word = word.replace("\0", "0")
        flags += random.choice(
            ([f"--{name}", word], [f"--{name}={word}"], [f"--{name}"], [f"-{name}", word], [f"--{name}", word, word])
        )
    return flags


def _no_file(path: Path, random: Random) -> str:
    """A path that is not a file with a config."""
    how = random.choice(("missing", "folder", "dangling", "pipe", "loop"))
    if how != "missing":
        put(path, how)
    return how
