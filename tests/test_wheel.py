"""The files that are published: the sources make the wheel, the wheel runs outside the checkout, and their pages can be shown."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = """
name: away
steps: 1
batch_size: 2
model: {vocab_size: 256, max_length: 8, num_layers: 1, embed_dim: 8, attention: {num_heads: 1}}
data: {sources: [{kind: files, path: text.txt}], tokenizer: {kind: bytes}, validation_fraction: 0.0}
log: {trackers: []}
sample: {max_tokens: 0}
"""
PROGRAM = """
import manyheads as mh, transformer, train, benchmarks
assert all("wheel" in module.__file__ for module in (mh, transformer, train, benchmarks))
run = mh.train("away.yaml")
print("wrote", repr(run.generate("a", max_tokens=2)))
run.attention("abc").save("page.html")
"""


def test_the_wheel_runs_outside_the_checkout(tmp_path):
    # A copy of what is tracked: a build leaves folders beside its sources.
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    sources = tmp_path / "sources"
    for name in filter(None, map(os.fsdecode, tracked)):
        if name.split("/")[0] not in ("tests", "docs", "configs") and (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((ROOT / name).read_bytes())
    # The archive of the sources first, then the wheel from it.
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(sources)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    published = sorted(map(str, (tmp_path / "dist").iterdir()))
    assert [Path(one).name for one in published] == ["manyheads-0.1.0-py3-none-any.whl", "manyheads-0.1.0.tar.gz"]
    check = [sys.executable, "-m", "twine", "check", "--strict", *published]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    wheel = published[0]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "wheel")
    for needed in ("manyheads/py.typed", "transformer/py.typed", "transformer/interpret/page.html"):
        assert needed in names
    away = tmp_path / "away"
    away.mkdir()
    (away / "text.txt").write_text("ab " * 50)
    (away / "away.yaml").write_text(CONFIG)
    surroundings = os.environ | {"PYTHONPATH": str(tmp_path / "wheel"), "XLA_FLAGS": ""}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=away, env=surroundings, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "wrote '" in ran.stdout and (away / "page.html").stat().st_size > 1000
