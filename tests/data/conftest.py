"""Every test here has a cache folder of its own, and text to prepare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder that `cache_dir()` names during a test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MANYHEADS_CACHE", str(folder))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 40 text files of 1 to 400 words."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "Grüße", "x", "=", "1", "\n\n", "    return", "def f(x):\n"]
    for number in range(40):
        text = " ".join(random.choice(words, random.integers(1, 400)))
        (folder / f"{number:02}.txt").write_text(text, "utf-8")
    return folder
