"""The library needs jax, flax, optax and numpy alone; the step runs where the data and config packages are missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA_PACKAGES = (
    "datasets",
    "grain",
    "tokenizers",
    "pydantic",
    "tensorboardX",
    "matplotlib",
    "seqeval",
    "sklearn",
    "jaxtyping",
    "torch",
)

SCRIPT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import {modules}
"""


@pytest.mark.parametrize(
    "modules",
    [
        "transformer.models.gpt, transformer.generation.generate",
        "train.program.step, train.program.state, train.optimizer, train.parallel.mesh, train.parallel.hardware, "
        "train.data.prepared.prepare, train.parallel.runtime",
        "benchmarks.cli, benchmarks.step, benchmarks.decode, benchmarks.compile_time, benchmarks.gpu",
    ],
)
def test_imports_without_the_data_and_config_packages(modules):
    script = SCRIPT.format(packages=set(DATA_PACKAGES), modules=modules)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("package", "forbidden"), [("transformer", "train|benchmarks"), ("train", "benchmarks")])
def test_arrows_run_one_way(package, forbidden):
    against = [
        str(path)
        for path in (ROOT / package).rglob("*.py")
        if re.search(rf"^\s*(from|import) ({forbidden})\b", path.read_text(), re.MULTILINE)
    ]
    assert not against
