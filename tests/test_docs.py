"""README and docs: every command is one that the programs take, every block of Python runs, and links lead somewhere."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.cli import OVERRIDABLE
from benchmarks.cli import _parser as bench_parser
from benchmarks.cli import main as bench
from benchmarks.report import report
from tests.huggingface.ours import write_bert
from tests.shrunk import shrunk, write_documents
from tests.train.run_records import surroundings
from train.commands.cli import main, make_parser
from train.config import dump, load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
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
            assert options.command.takes_fields or not overrides, words
            if options.command.takes_config and not getattr(options, "of_run", False):
                if options.config == "configs/reviews.yaml":  # the page's own, which needs the run that it begins from
                    continue
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


def page_of(name):
    (page,) = (page for page in PAGES if page.stem == name)
    return page


def run_python(page):
    """The blocks of Python of a page, in their order."""
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        # The suite is strict about types that differ, and a user's own program is not.
        with jax.numpy_dtype_promotion("standard"):
            exec(compile(block.replace('"steps": 20', '"steps": 2'), page.name, "exec"), names)


@pytest.mark.parametrize("name", ["README", "library"])
def test_every_block_of_python_runs(name, place):
    run_python(page_of(name))
    assert (place / "attention.html").exists()


def test_the_python_that_defines_things_runs_as_a_program(tmp_path):
    """In a process of its own: a class that is defined there is a kind that other tests would find."""
    pages = [page_of(name) for name in ("mixer", "objective", "attention-history")]
    program = tmp_path / "pages.py"
    program.write_text("\n".join(block for page in pages for block in blocks(page, "python")))
    environment = surroundings(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What runs long, with what stands for it: fewer steps and seeds, the layers of a small model, a checkpoint made here.
SHORTER = [
    (r"--steps \d+", "--steps 2"), (r"--seeds \d+", "--seeds 2"), (r"--profile \S+", "--profile 1:1"),
    (r"--layers \S+", "--layers 0,1"), (r"--max-tokens \d+", "--max-tokens 4"), (r"wheel:\S+", "checkpoint"),
]  # fmt: skip
# What needs more than this process, with the test that runs it.
ELSEWHERE = {
    "--coordinator": "train/test_processes.py",
    "verify-resume": "train/test_verify_resume.py",
    "--tasks": "train/test_harness.py",
    "--install": "benchmarks/test_compile_ahead.py",
    "calibrate": "benchmarks/test_profile.py",
    "--validate": "benchmarks/test_profile.py",
    "--regret": "benchmarks/test_search.py",
    "--target cpu": "benchmarks/test_search.py",
    "--published": "benchmarks/test_published.py",
    "gpt_7b.yaml --target": "benchmarks/test_compile_ahead.py",
    "sharding configs/tiny.yaml": "benchmarks/test_sharding_measure.py",
    # It is refused, by a test of its own below.
    "num-heads 7": "test_docs.py",
}


# What the commands of a page leave behind, where it is a file for the reader.
LEFT = {
    "doctor": ["doctor/tiny/doctor.html"],
    "getting-started": ["runs/stdlib-small/report.html"],
    "README": ["runs/tiny/attention/attention.html", "plans/*.html"],
    "hugging-face": ["vectors.npy", "minilm-onnx/onnx/model.onnx", "minilm-bfloat16/model.safetensors"],
    "look-inside": ["runs/stdlib-small/look/look.html"],
    "objectives": ["curves.png"],
    "translate": ["page.html"],
}
# Pages whose Python uses what their commands made.
WITH_PYTHON = ("classify", "embed", "attention-maps", "look-inside")
SAID: set[str] = set()
"""Commands on shipped configs that ran for an earlier page: they do the same again."""


def has_programs(page):
    return any(program.startswith("manyheads") for program, *_ in commands(page))


@pytest.mark.parametrize("page", [*filter(has_programs, PAGES)], ids=lambda page: page.stem)
def test_its_commands_run(page, tmp_path, monkeypatch, capsys):
    """In their order, on the shipped configs and the page's own, at a small size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    Path("texts").mkdir()
    write_documents(tmp_path / "texts")
    Path("texts.txt").write_text("a text\nand another\n")
    write_bert(tmp_path / "checkpoint")
    write_classes(tmp_path)
    (tmp_path / "mine.yaml").write_text("".join(block for block in blocks(page, "yaml") if block.startswith("name:")))
    (tmp_path / "configs").mkdir()
    shutil.copy(tmp_path / "mine.yaml", tmp_path / "configs" / "reviews.yaml")
    for program, *words in commands(page):
        said = shlex.join(words)
        if other := next((test for part, test in ELSEWHERE.items() if part in said), None):
            assert (ROOT / "tests" / other).exists()
        elif program in ("manyheads", "manyheads-bench") and not is_repeated(page, said):
            for pattern, shorter in SHORTER:
                said = re.sub(pattern, shorter, said)
            words = shlex.split(said)
            make_small([word for word in words if word.endswith(".yaml")], tmp_path)
            for name in {word for word, before in zip(words[1:], words, strict=False) if is_run(word, before)}:
                if name == "runs/minilm":  # the import of another page
                    assert main(["import", "checkpoint", "--run-dir", name]) == 0
                    continue
                path = f"configs/{Path(name).name.replace('-', '_')}.yaml"
                make_small([path], tmp_path)
                assert main(["train", path]) == 0
            run = main if program == "manyheads" else bench
            run = in_a_process if "--devices" in words else run
            try:
                status = run(words)
            except SystemExit as ended:
                status = ended.code
            assert status == 0, (words, capsys.readouterr().err)
    if page.stem in WITH_PYTHON:
        run_python(page)
    for pattern in LEFT.get(page.stem, ()):
        assert list(tmp_path.glob(pattern)), pattern


def is_repeated(page, said):
    """Whether a command ran for an earlier page, and nothing on this one needs what it leaves behind."""
    known = all((ROOT / word).exists() for word in said.split() if word.endswith(".yaml"))
    again = (
        known and said in SAID and page.stem not in LEFT and page.stem not in WITH_PYTHON and "--run-dir" not in said
    )
    SAID.add(said)
    return again


def write_classes(folder):
    """Texts of two classes, as rows of a table and as files of two folders."""
    texts = {name: [f"{name} cat {number % 7}" for number in range(12)] for name in ("the", "dogs")}
    rows = [f"{text},{name}" for name, some in texts.items() for text in some]
    (folder / "reviews.csv").write_text("\n".join(["text,category", *rows]) + "\n")
    for name, some in texts.items():
        (folder / "news" / name).mkdir(parents=True)
        for number, text in enumerate(some):
            (folder / "news" / name / f"{number}.txt").write_text(text)


def in_a_process(words):
    """Devices are made before anything runs on one."""
    environment = surroundings(PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, "-m", "train.commands.cli", *words], env=environment, check=False).returncode


def is_run(word, before):
    """Whether a command reads a run that is not there yet: one of an earlier page."""
    return word.startswith("runs/") and before != "--run-dir" and not Path(word).exists()


def make_small(paths, folder):
    """The configs of these paths, shipped or written on the page, at a size that a test can train."""
    for path in map(Path, paths):
        if not (path.exists() and path.parent != Path()):
            config = load(path if path.exists() else ROOT / path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dump(shrunk(config, folder / "texts")))


def test_a_wrong_number_of_heads_is_said_as_the_docs_show(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = (
        block for block in blocks(ROOT / "docs" / "reference" / "configs.md", "console") if "num-heads" in block
    )
    command, expected = block.strip().splitlines()
    assert main(shlex.split(command[2:])[1:]) == 2
    assert capsys.readouterr().err.strip() == expected


def test_the_results_are_what_the_report_prints():
    assert report() in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
