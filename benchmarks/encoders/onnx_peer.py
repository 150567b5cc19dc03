"""The peer of the embedding benchmark that has an environment of its own: sentence-transformers with its ONNX backend.

The backend needs optimum-onnx, which works only with older versions of transformers than the rest of this program.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environments import environment
from transformer.errors import UserError


def find() -> str:
    """The interpreter of the peer's environment, which is made on first use. Raises `UserError` if pip cannot make it."""
    folder = environment.folder_of("peers", "sentence-transformers-onnx")
    # Without an exact version, pip can bring gigabytes of CUDA.
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    wanted = ["sentence-transformers>=5.0", "optimum-onnx[onnxruntime]", "onnx", torch]
    return environment.installed(folder) or environment.install(folder, wanted, "leave --onnx out")


class OnnxPeer:
    """A running process of `sentence_onnx`.

    Args:
        python: the interpreter of an environment with sentence-transformers and optimum-onnx.
        model: a folder of sentence-transformers.
        texts: what it embeds.
        folder: for the files that the two processes share.

    Attributes:
        versions: of its packages.

    Raises:
        UserError: it ends before it has loaded the model.
    """

    def __init__(self, python: str, model: Path, texts: Sequence[str], folder: Path) -> None:
        self._folder = folder
        (folder / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")
        script = Path(__file__).with_name("sentence_onnx.py")
        self._errors = (folder / "errors.txt").open("w+", encoding="utf-8")
        # Its packages are those of its environment alone.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [python, str(script), str(model), str(folder / "texts.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip
        self.versions: dict[str, str] = self._answer()

    def seconds(self) -> float:
        """The seconds in which it embeds all texts, by its own clock."""
        return self._ask({})["seconds"]

    def vectors(self) -> np.ndarray:
        """The vectors of all texts, [texts, D] float32, of length 1."""
        out = self._folder / "vectors.npy"
        self._ask({"out": str(out)})
        return np.load(out)

    def __enter__(self) -> OnnxPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        self.__exit__()
        raise UserError(f"sentence-transformers' ONNX backend ended: {lines[-1] if lines else 'it said nothing'}")
