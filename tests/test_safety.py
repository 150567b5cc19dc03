"""Nothing that is read can run code, or choose where it is written."""

from __future__ import annotations

import ast
import os
import socket
from pathlib import Path

import pytest

from transformer.errors import UserError
from transformer.paths import check_file, expanded, path_inside

ROOT = Path(__file__).parents[1]
SOURCES = [path for room in ("transformer", "train", "benchmarks", "manyheads") for path in (ROOT / room).rglob("*.py")]
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "np.load", "yaml.load",
         "yaml.unsafe_load", "torch.load", "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive"}  # fmt: skip
ALLOWED = {
    # With a loader that knows plain types only.
    ("train/config/yaml_files.py", "yaml.load"),
    # Without allow_pickle.
    ("train/data/prepared/store.py", "np.load"), ("train/data/examples/pack.py", "np.load"),
    ("train/data/examples/windows.py", "np.load"), ("benchmarks/history/run.py", "np.load"),
    ("train/run/reference.py", "np.load"), ("benchmarks/encoders/onnx_peer.py", "np.load"),
    # Members go through `path_inside`.
    ("train/data/sources/wheel.py", "zipfile.ZipFile"),
    ("train/data/sources/archives.py", "zipfile.ZipFile"),
    ("train/data/sources/archives.py", "tarfile.open"),
}  # fmt: skip


def calls_of(path):
    """The dotted names of what a file calls, with the keywords of each call."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_runs_what_it_reads(path):
    assert not RUNS_CODE & set(imports_of(path))
    name = path.relative_to(ROOT).as_posix()
    for call, keywords in calls_of(path):
        assert keywords.get("shell", "False") == "False", call
        assert keywords.get("allow_pickle", "False") == "False", call
        assert call not in CALLS or (name, call) in ALLOWED, call
        assert not call.endswith((".extract", ".extractall")) or name == "train/data/sources/wheel.py", call


@pytest.mark.parametrize("name", ["a", "a/b", "a.b/c d", "..a/b..", "./a"])
def test_names_inside_a_folder(tmp_path, name):
    assert path_inside(tmp_path, name, source="x").resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(
    "name", ["", "/", "/a", "..", "../a", "a/../..", "a/../../b", "a\\b", "C:a", "a\0b", 7, None, "."]
)
def test_names_that_lead_elsewhere(tmp_path, name):
    with pytest.raises(UserError, match=r"^the index: names the file .*not inside its folder"):
        path_inside(tmp_path, name, source="the index")


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    (tmp_path / "file").write_text("a")
    (tmp_path / "link").symlink_to("pipe")
    for path, kind in (
        (tmp_path / "pipe", "a named pipe"), (tmp_path / "link", "a named pipe"), (tmp_path / "socket", "a socket"),
        (Path("/dev/zero"), "a device"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{path}: this is {kind}; name a file"):
            check_file(path)
    for name in ("file", "nothing", ".", "x" * 300, "a\0b"):
        check_file(tmp_path / name)
    # What a shell puts in the place of <(command).
    reading, writing = os.pipe()
    check_file(Path(f"/dev/fd/{reading}"))
    os.close(reading)
    os.close(writing)


def test_a_home_that_there_is_not():
    assert expanded("~/x") == Path.home() / "x"
    with pytest.raises(UserError, match="^~nosuchuser/x: there is no home directory for '~nosuchuser'"):
        expanded("~nosuchuser/x")
