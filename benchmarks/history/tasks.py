"""The training pairs: those of a config, and sentences of two synthetic languages with known alignments."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.stage import CONFIGS, load
from train.data.prepared.prepare import DataConfig, prepare
from train.data.prepared.store import Prepared
from train.data.sources.source_config import SyntheticSource
from train.data.tokenization.tokenizer import TokenizerConfig
from train.objectives import Seq2Seq
from transformer.errors import UserError, nearest

DATA = ("verses", "synthetic")
"""Values of `--data` in addition to the path of a config."""
VERSES = CONFIGS / "translate_en_fr_small.yaml"
"""The config whose pairs `--data verses` takes."""
SYNTHETIC_PAIRS = 20_000
SYNTHETIC_WORDS = 896
"""Vocabulary size for every word of both synthetic languages, where a token is a word."""
HELD_OUT = 0.03
SHAPES = 2
"""Number of batch shapes: with ten models, compiling more would cost more than the padding saves."""
PARAMETERS_PER_TOKEN = 500
"""Vocabulary sizes by budget: with a large vocabulary, a small model would consist of embeddings only."""
LEAST_TOKENS, MOST_TOKENS = 320, 4000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Training pairs, in batches that are the same for every model."""

    name: str
    """`pairs` or `synthetic`."""
    title: str
    data: DataConfig
    length: int
    """Longest source and longest target, in tokens with the end of text; longer pairs are left out."""

    @property
    def objective(self) -> Seq2Seq:
        """Translation."""
        return Seq2Seq(source_length=self.length, max_shapes=SHAPES)

    def prepared(self) -> Prepared:
        """Its tokens."""
        return prepare(self.data)

    @property
    def has_gold(self) -> bool:
        """Whether the alignment of its words is known."""
        return self.name == "synthetic"


def tasks_of(data: str, parameters: int, *, synthetic_pairs: int | None = None) -> tuple[Task, ...]:
    """The tasks for `--data`: its pairs, and the synthetic ones, which evaluate alignments.

    Args:
        parameters: of each model; they determine the size of the vocabulary.
        synthetic_pairs: number of synthetic pairs; None: `SYNTHETIC_PAIRS`.

    Raises:
        UserError: neither a known name nor a config of pairs.
    """
    words = TokenizerConfig(kind="words", vocab_size=SYNTHETIC_WORDS)
    sources = (SyntheticSource(limit=synthetic_pairs or SYNTHETIC_PAIRS),)
    drawn = DataConfig(sources=sources, tokenizer=words, packing="pad", validation_fraction=HELD_OUT)
    synthetic = Task(name="synthetic", title="Two synthetic languages", data=drawn, length=32)
    if data == "synthetic":
        return (synthetic,)
    path = VERSES if data == "verses" else Path(data)
    if data not in DATA and path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"--data: got {data!r}; allowed: {', '.join(DATA)}, or the path of a config.{nearest(data, DATA)}"
        )
    config = load(path)
    if not config.data.pairs:
        raise UserError(f"--data: {path} gives no pairs of texts")
    tokenizer = TokenizerConfig(
        kind="bpe", vocab_size=min(max(parameters // PARAMETERS_PER_TOKEN, LEAST_TOKENS), MOST_TOKENS)
    )
    # One vocabulary for both sides, and one pair per row: a recurrent model cannot read several.
    pairs = dataclasses.replace(config.data, tokenizer=tokenizer, target_tokenizer=None, packing="pad")
    title = "English and French verses" if data == "verses" else path.stem
    return Task(name="pairs", title=title, data=pairs, length=48), synthetic
