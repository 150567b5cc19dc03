"""Transformers in JAX and Flax, from attention up: the interface for notebooks and scripts.

    import manyheads as mh

    run = mh.train("configs/stdlib_small.yaml")
    run.generate("def read(path):")
    mh.load("runs/minilm").embed(["a text", "another one"])

Modules are imported on first use, so that `import manyheads` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyheads.run import Run, load, train
    from train.config import RunConfig
    from transformer.attention.dispatch import attend
    from transformer.attention.spec.mask import AttentionMask
    from transformer.models.bert import Bert, BertConfig
    from transformer.models.encoder_decoder import EncoderDecoder, T5Config, VaswaniConfig
    from transformer.models.gpt import GPT, GPTConfig
    from transformer.models.recurrent import RecurrentTranslator
    from transformer.models.recurrent_config import RecurrentConfig

_OWN = {"Run": "manyheads.run", "load": "manyheads.run", "train": "manyheads.run", "RunConfig": "train.config"}
"""Where the names are defined that `transformer` does not export."""

__all__ = [
    "GPT", "AttentionMask", "Bert", "BertConfig", "EncoderDecoder", "GPTConfig", "RecurrentConfig", "RecurrentTranslator",
    "Run", "RunConfig", "T5Config", "VaswaniConfig", "attend", "load", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'manyheads' has no attribute {name!r}; there are {', '.join(__all__)}")
    return getattr(importlib.import_module(_OWN.get(name, "transformer")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
