"""`manyheads-bench embedding`: text embedding compared with sentence-transformers' encode, with the same weights."""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoders import onnx_peer
from benchmarks.encoders.reviews import MINILM, sentences
from benchmarks.record import in_turn, ratio, save, seconds_per_call, summary
from train.huggingface.import_checkpoint import import_checkpoint
from train.huggingface.source import fetch
from train.inference.embed import Embedder
from train.parallel.mesh import use_mesh
from train.run.run_files import load_run
from transformer.errors import UserError
from transformer.models.bert import BertConfig

TEXTS = 4096
OURS, PEER, ONNX_PEER = "manyheads", "sentence-transformers", "sentence-transformers, ONNX"


def run(rounds: int, texts: int = TEXTS, *, onnx: bool = False) -> dict[str, Any]:
    """Texts a second of each, in turn, the ratios, and the smallest cosine between the two vectors of the same text.

    Args:
        onnx: also compare with sentence-transformers' ONNX backend (`onnx_peer`).

    Raises:
        UserError: a peer is missing, or its environment cannot be made.
    """
    try:
        import sentence_transformers
    except ImportError:
        raise UserError("embedding: the peer is missing; pip install --no-deps sentence-transformers") from None

    python = onnx_peer.find() if onnx else None
    given = list(itertools.islice(sentences(), texts))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        loaded = load_run(import_checkpoint(MINILM, Path(folder) / "run", verify=False))
        model = loaded.config.model
        assert isinstance(model, BertConfig)
        embedder = Embedder(model, loaded.tokenizer)
        theirs = sentence_transformers.SentenceTransformer(str(fetch(MINILM)), device="cpu")

        def ours_of() -> np.ndarray:
            with use_mesh(loaded.mesh, loaded.config.mesh.rules):
                return embedder(loaded.params, given)

        def theirs_of() -> np.ndarray:
            return theirs.encode(given, normalize_embeddings=True, show_progress_bar=False)

        vectors = ours_of()
        least = {PEER: _least_cosine(vectors, theirs_of())}
        calls = {OURS: ours_of, PEER: theirs_of}
        seconds: dict[str, Callable[[], float]] = {
            name: functools.partial(seconds_per_call, call, 1) for name, call in calls.items()
        }
        if python is not None:
            peer = stack.enter_context(onnx_peer.OnnxPeer(python, fetch(MINILM), given, Path(folder)))
            least[ONNX_PEER] = _least_cosine(vectors, peer.vectors())
            seconds[ONNX_PEER] = peer.seconds
        # Each has run once above.
        speeds = {name: [texts / one for one in taken] for name, taken in in_turn(seconds, rounds).items()}
    result: dict[str, Any] = {
        "texts": texts,
        "mean_tokens": float(np.mean([len(ids) + 2 for ids in loaded.tokenizer.encode_batch(given)])),
        "texts_per_second": {name: summary(speed) for name, speed in speeds.items()},
        "embedding_ratio": ratio(speeds[OURS], speeds[PEER]),
        "least_cosine": least[PEER],
        "sentence_transformers": sentence_transformers.__version__,
    }
    if python is not None:
        result |= {
            "embedding_ratio_onnx": ratio(speeds[OURS], speeds[ONNX_PEER]),
            "least_cosine_onnx": least[ONNX_PEER],
            "onnx_versions": peer.versions,
        }
    save("embedding", f"manyheads-bench embedding --rounds {rounds}{' --onnx' if onnx else ''}", result)
    return result


def _least_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.sum(ours * theirs, axis=1).min())
