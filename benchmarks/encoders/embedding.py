"""`manyheads-bench embedding`: text embedding compared with sentence-transformers' encode, with the same weights."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoders.reviews import MINILM, sentences
from benchmarks.record import ratio, save, speeds_in_turn, summary
from train.huggingface.import_checkpoint import import_checkpoint
from train.huggingface.source import fetch
from train.inference.embed import Embedder
from train.parallel.mesh import use_mesh
from train.run.run_files import load_run
from transformer.errors import UserError
from transformer.models.bert import BertConfig

TEXTS = 4096


def run(rounds: int, texts: int = TEXTS) -> dict[str, Any]:
    """Texts a second of each, in turn, the ratio, and the smallest cosine between the two vectors of the same text."""
    try:
        import sentence_transformers
    except ImportError:
        raise UserError("embedding: the peer is missing; pip install --no-deps sentence-transformers") from None

    given = list(itertools.islice(sentences(), texts))
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_run(import_checkpoint(MINILM, Path(folder) / "run", verify=False))
        model = loaded.config.model
        assert isinstance(model, BertConfig)
        embedder = Embedder(model, loaded.tokenizer)
        theirs = sentence_transformers.SentenceTransformer(str(fetch(MINILM)), device="cpu")

        def ours_of(texts: list[str]) -> np.ndarray:
            with use_mesh(loaded.mesh, loaded.config.mesh.rules):
                return embedder(loaded.params, texts)

        def theirs_of(texts: list[str]) -> np.ndarray:
            return theirs.encode(texts, normalize_embeddings=True, show_progress_bar=False)

        cosines = np.sum(ours_of(given) * theirs_of(given), axis=1)
        calls = {"manyheads": lambda: ours_of(given), "sentence-transformers": lambda: theirs_of(given)}
        speeds = speeds_in_turn(calls, rounds, 1, texts)
    result: dict[str, Any] = {
        "texts": texts,
        "mean_tokens": float(np.mean([len(ids) + 2 for ids in loaded.tokenizer.encode_batch(given)])),
        "texts_per_second": {name: summary(speed) for name, speed in speeds.items()},
        "embedding_ratio": ratio(speeds["manyheads"], speeds["sentence-transformers"]),
        "least_cosine": float(cosines.min()),
        "sentence_transformers": sentence_transformers.__version__,
    }
    save("embedding", f"manyheads-bench embedding --rounds {rounds}", result)
    return result
