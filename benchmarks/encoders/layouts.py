"""`manyheads-bench import-layouts`: an imported encoder in several shardings, compared with transformers on one device."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.encoders.reviews import MINILM, sentences
from benchmarks.record import save
from train.data.tokenization.tokenizer import CLS, SEP, Tokenizer
from train.huggingface.import_checkpoint import import_checkpoint
from train.huggingface.source import fetch
from train.parallel.mesh import MeshConfig, batch_sharding, shard_batch, use_mesh
from train.run.run_files import LoadedRun, load_run
from transformer.functional import graphdef_of
from transformer.models.embedding_head import pool, unit
from transformer.models.families import make_model

TEXTS, LENGTH = 64, 64


def run(devices: int, source: str = MINILM, *, texts: Sequence[str] | None = None) -> dict[str, Any]:
    """The largest differences of hidden states, and the smallest cosine between embeddings, in every layout.

    Args:
        devices: number of devices, even.
        source: as in `manyheads import`.
        texts: sentences of reviews by default.
    """
    import torch
    import transformers

    layouts = {
        "fsdp": MeshConfig(strategy="fsdp"),
        "tensor": MeshConfig(strategy="tensor", tensor=2, data=devices // 2),
    }
    texts = list(itertools.islice(sentences(), TEXTS)) if texts is None else texts
    theirs = transformers.AutoModel.from_pretrained(fetch(source), attn_implementation="eager").eval()
    with tempfile.TemporaryDirectory() as folder:
        run = import_checkpoint(source, Path(folder) / "run", verify=False)
        one = load_run(run)
        tokens, valid = _rows(one.tokenizer, texts)
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(valid)}
            expected = theirs(**inputs).last_hidden_state.numpy()
        means = (expected * valid[..., None]).sum(1) / valid.sum(1, keepdims=True)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        found = {}
        for name, mesh in layouts.items():
            loaded = load_run(run, like=dataclasses.replace(one.config, mesh=mesh))
            hidden, vectors = _encoded(loaded, mesh, {"tokens": tokens, "valid": valid})
            found[name] = {
                "largest_difference": float(np.abs(hidden - expected)[valid > 0].max()),
                "largest_number": float(np.abs(expected[valid > 0]).max()),
                "least_cosine": float((vectors * means).sum(1).min()),
            }
    result = {"source": source, "devices": devices, "texts": TEXTS, "import_layouts": found}
    save("import_layouts", f"manyheads-bench import-layouts --devices {devices}", result)
    return result


def _rows(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The texts' tokens, one text per row, and their segments."""
    cls, sep = tokenizer.special(CLS), tokenizer.special(SEP)
    tokens, valid = (np.zeros((len(texts), LENGTH), np.int32) for _ in range(2))
    for number, ids in enumerate(tokenizer.encode_batch(texts)):
        row = [cls, *ids.tolist()[: LENGTH - 2], sep]
        tokens[number, : len(row)], valid[number, : len(row)] = row, 1
    return tokens, valid


def _encoded(loaded: LoadedRun, mesh: MeshConfig, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and embeddings by the sharded model."""
    graphdef = graphdef_of(functools.partial(make_model, loaded.config.model))

    @jax.jit
    def encode(params: nnx.State, batch: Any) -> tuple[Any, Any]:
        hidden, _ = nnx.merge(graphdef, params).hidden(batch["tokens"], segments_BT=batch["valid"])
        return hidden, unit(pool(hidden, batch["valid"] > 0, pooling="mean"))

    with use_mesh(loaded.mesh, mesh.rules):
        placed = shard_batch(batch, batch_sharding(loaded.mesh, mesh.rules))
        return jax.device_get(encode(loaded.params, placed))
