"""`manyheads-bench import-layouts`: an imported encoder, sharded in several ways, beside transformers on one device."""

from __future__ import annotations

import dataclasses
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
from train.hf.bring import bring
from train.hf.source import fetch
from train.mesh import MeshConfig, batch_sharding, shard_batch, use_mesh
from train.run_files import load_run
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.heads import embedding_of

TEXTS, LENGTH = 64, 64


def run(devices: int, source: str = MINILM, *, texts: Sequence[str] | None = None) -> dict[str, Any]:
    """The largest differences of hidden states, and the least cosine between embeddings, in every layout.

    Args:
        devices: how many there are, an even number.
        source: as of `manyheads import`.
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
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = bring(source, Path(folder) / "run", verify=False)
        config = load_run(run).config
        for name, mesh in layouts.items():
            loaded = load_run(run, like=dataclasses.replace(config, mesh=mesh))
            model = loaded.config.model
            assert isinstance(model, BertConfig)
            cls, sep = (loaded.tokenizer.special(one) for one in ("[CLS]", "[SEP]"))
            rows = [[cls, *ids.tolist()[: LENGTH - 2], sep] for ids in loaded.tokenizer.encode_batch(texts)]
            tokens, valid = (np.zeros((TEXTS, LENGTH), np.int32) for _ in range(2))
            for number, row in enumerate(rows):
                tokens[number, : len(row)], valid[number, : len(row)] = row, 1
            with use_mesh(loaded.mesh, mesh.rules):
                graphdef = nnx.split(nnx.eval_shape(lambda model=model: make_model(model, nnx.Rngs(0))))[0]
                placed = batch_sharding(loaded.mesh, mesh.rules)
                batch = shard_batch({"tokens": tokens, "valid": valid}, placed)

                @jax.jit
                def encode(params: nnx.State, batch: Any, graphdef: Any = graphdef) -> tuple[Any, Any]:
                    hidden, _ = nnx.merge(graphdef, params).hidden(batch["tokens"], segments_BT=batch["valid"])
                    return hidden, embedding_of(hidden, batch["valid"] > 0)

                hidden, vectors = jax.device_get(encode(loaded.params, batch))
            with torch.no_grad():
                inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(valid)}
                other = theirs(**inputs).last_hidden_state.numpy()
            real = valid > 0
            means = (other * valid[..., None]).sum(1) / valid.sum(1, keepdims=True)
            cosines = (vectors * means).sum(1) / np.linalg.norm(means, axis=1)
            found[name] = {
                "largest_difference": float(np.abs(hidden - other)[real].max()),
                "largest_number": float(np.abs(other[real]).max()),
                "least_cosine": float(cosines.min()),
            }
    result = {"source": source, "devices": devices, "texts": TEXTS, "import_layouts": found}
    save("import_layouts", f"manyheads-bench import-layouts --devices {devices}", result)
    return result
