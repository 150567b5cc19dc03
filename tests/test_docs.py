"""README and docs: every command is one that the programs take, every block of Python runs, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax
import pytest

from benchmarks.cli import OVERRIDABLE
from benchmarks.cli import _parser as bench_parser
from benchmarks.cli import main as bench
from benchmarks.report import report
from train.commands.cli import main, make_parser
from train.config import load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)

pytestmark = pytest.mark.usefixtures("one_device")


def blocks(page, language):
    """The code of a page in one language, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page):
    """What a reader types, split into words."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


@EVERY
def test_every_command_is_one_that_is_taken(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    written = [block for block in blocks(page, "yaml") if block.startswith("name:")]
    (tmp_path / "mine.yaml").write_text(written[0] if written else "name: mine\n")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for program, *words in commands(page):
        if program == "make":
            assert words[0] in targets
        elif program == "manyheads" and words != ["--help"]:
            options, overrides = make_parser().parse_known_args(words)
            assert options.command.takes_config or not overrides, words
            if options.command.takes_config:
                path = tmp_path / options.config if options.config == "mine.yaml" else options.config
                if "num-heads" not in " ".join(overrides):
                    load(path, overrides)
        elif program == "manyheads-bench":
            options, overrides = bench_parser().parse_known_args(words)
            assert options.command in OVERRIDABLE or not overrides, words
            if getattr(options, "config", None):
                load(options.config, overrides)


@EVERY
def test_links_and_pictures_are_there(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with the config of the examples, made short."""
    text = (ROOT / "configs" / "tiny.yaml").read_text()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(
        text.replace("steps: 30", "steps: 2").replace("limit: 60", "limit: 9")
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["README", "library"])
def test_every_block_of_python_runs(name, place):
    (page,) = (page for page in PAGES if page.stem == name)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        # The suite is strict about types that differ, and a user's own program is not.
        with jax.numpy_dtype_promotion("standard"):
            exec(compile(block.replace('"steps": 20', '"steps": 2'), f"{name}.md", "exec"), names)
    assert (place / "attention.html").exists()


def test_the_commands_of_the_readme_run(place, capsys):
    for program, *words in commands(ROOT / "README.md"):
        if program == "manyheads":
            assert main(words) == 0, capsys.readouterr().err
        elif program == "manyheads-bench":
            assert bench([*words, "--dir", str(place / "plans")]) == 0, capsys.readouterr().err
    assert (place / "runs" / "tiny" / "attention" / "attention.html").exists()
    assert list((place / "plans").glob("*.html"))


def test_a_wrong_number_of_heads_is_said_as_the_docs_show(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = (block for block in blocks(ROOT / "docs" / "configs.md", "console") if "num-heads" in block)
    command, expected = block.strip().splitlines()
    assert main(shlex.split(command[2:])[1:]) == 2
    assert capsys.readouterr().err.strip() == expected


def test_the_results_are_what_the_report_prints():
    assert report() in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
