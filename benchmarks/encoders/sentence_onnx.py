"""A process that embeds texts with sentence-transformers' ONNX backend, and times itself.

It runs in an environment of its own, whose packages are other versions than this program's, so it imports nothing of it:
`python sentence_onnx.py MODEL TEXTS`. It reads a request in JSON per line of standard input, and writes the answer as a line.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

PACKAGES = ("sentence-transformers", "optimum-onnx", "onnxruntime", "transformers", "torch")


def main(model: str, texts: str) -> None:
    """Answer requests until standard input ends.

    Args:
        model: a folder of sentence-transformers, which its ONNX backend converts.
        texts: a JSON file with a list of texts.
    """
    # Whatever the packages print is not an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    import numpy as np
    from sentence_transformers import SentenceTransformer

    provider = {"provider": "CPUExecutionProvider"}
    encoder = SentenceTransformer(model, backend="onnx", device="cpu", model_kwargs=provider)
    with open(texts, encoding="utf-8") as file:
        given = json.load(file)
    print(json.dumps({name: importlib.metadata.version(name) for name in PACKAGES}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        vectors = encoder.encode(given, normalize_embeddings=True, show_progress_bar=False)
        seconds = time.perf_counter() - start
        if (out := json.loads(line).get("out")) is not None:
            np.save(out, vectors)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
