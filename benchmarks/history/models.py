"""The models that are compared, each brought to the same number of parameters.

All recurrent ones have a GRU encoder in both directions and a GRU decoder, so that what differs is how the decoder looks at
the source. Widths are solved for: one width decides the others, and a second one takes up what is left.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from transformer.alignment.fast_weights import FastMemoryConfig
from transformer.alignment.registry import AlignmentConfig
from transformer.alignment.scored import (
    AdditiveConfig,
    HardConfig,
    LocalConfig,
    MultiplicativeConfig,
    NoAlignmentConfig,
)
from transformer.errors import UserError, nearest
from transformer.layers.feed_forward import DenseConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.encoder_decoder import VaswaniConfig
from transformer.models.families import ModelConfig, count_parameters
from transformer.models.recurrent import RecurrentConfig

TOLERANCE = 0.03
"""How far a model's parameters may be from the budget, as a part of it."""
DROPOUT = 0.1
_LARGEST = 1 << 13
_PROBED = (8, 32, 128)
_HEADS = 4
_LAYERS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of the comparison."""

    title: str
    """What the report calls it."""
    paper: str
    learning_rate: float
    """Of its family, the highest of the schedule."""
    make: Callable[..., ModelConfig]
    """(width, fine, **options) -> config; parameters grow with both widths."""
    step: int
    """`width` comes in multiples of this."""
    fine: Callable[[int], int]
    """The second width that goes with a first one."""


def _recurrent(style: str, attention: AlignmentConfig) -> Callable[..., ModelConfig]:
    def make(width: int, fine: int, *, source_vocab_size: int, **options: Any) -> ModelConfig:
        extra: dict[str, Any] = {"source_vocab_size": source_vocab_size, "style": style, "attention": attention}
        return RecurrentConfig(hidden_dim=width, embed_dim=fine, encoder_dim=width // 2, **extra, **options)

    return make


def _transformer(width: int, fine: int, *, source_vocab_size: int, vocab_size: int, **options: Any) -> ModelConfig:
    shared = source_vocab_size == vocab_size
    return VaswaniConfig(
        embed_dim=width, mlp=DenseConfig(dim=fine, activation="relu"), num_layers=_LAYERS,
        attention=SoftmaxConfig(num_heads=_HEADS), norm_first=True, vocab_size=vocab_size,
        source_vocab_size=None if shared else source_vocab_size, attention_dropout=options["dropout"], **options,
    )  # fmt: skip


def _entry(title: str, paper: str, style: str, attention: AlignmentConfig) -> Entry:
    return Entry(
        title=title, paper=paper, learning_rate=2e-3, make=_recurrent(style, attention), step=2,
        fine=lambda width: max(width // 2, 1),
    )  # fmt: skip


ENTRIES: dict[str, Entry] = {
    "none": _entry("No attention", "Cho et al. 2014", "bahdanau", NoAlignmentConfig()),
    "bahdanau": _entry("Bahdanau (additive)", "Bahdanau et al. 2014", "bahdanau", AdditiveConfig()),
    "luong-dot": _entry("Luong, dot", "Luong et al. 2015", "luong", MultiplicativeConfig(kind="dot")),
    "luong-general": _entry("Luong, general", "Luong et al. 2015", "luong", MultiplicativeConfig(kind="general")),
    "luong-concat": _entry("Luong, concat", "Luong et al. 2015", "luong", AdditiveConfig(kind="concat")),
    "luong-local-p": _entry("Luong, local-p", "Luong et al. 2015", "luong", LocalConfig(kind="local_p")),
    "hard": _entry("Hard", "Xu et al. 2015; Jang et al. 2016", "bahdanau", HardConfig()),
    "linear": _entry("Linear", "Katharopoulos et al. 2020", "bahdanau", FastMemoryConfig(kind="linear")),
    "delta": _entry("Delta rule", "Schlag et al. 2021", "bahdanau", FastMemoryConfig(kind="delta")),
    "transformer": Entry(
        title="Transformer", paper="Vaswani et al. 2017", learning_rate=2e-3, make=_transformer, step=2 * _HEADS,
        fine=lambda width: 4 * width,
    ),
}  # fmt: skip


def chosen(names: Sequence[str] | None) -> tuple[str, ...]:
    """The models of these names, each once and in the order of history; all of them for None.

    Raises:
        UserError: a name that no model has, or no name.
    """
    for name in names or ():
        if name not in ENTRIES:
            raise UserError(f"--models: got {name!r}; allowed: {', '.join(ENTRIES)}.{nearest(name, ENTRIES)}")
    if names is not None and not names:
        raise UserError(f"--models: none is named; allowed: {', '.join(ENTRIES)}")
    return tuple(name for name in ENTRIES if names is None or name in names)


@functools.cache
def solve(name: str, budget: int, *, source_vocab_size: int, vocab_size: int, max_length: int) -> ModelConfig:
    """The config of a model whose number of parameters is nearest the budget.

    Raises:
        UserError: no size of this model comes within `TOLERANCE` of it.
    """
    entry = ENTRIES[name]
    options: dict[str, Any] = {
        "source_vocab_size": source_vocab_size, "vocab_size": vocab_size, "max_length": max_length, "dropout": DROPOUT
    }  # fmt: skip

    def config(width: int, fine: int | None = None) -> ModelConfig:
        return entry.make(width, entry.fine(width) if fine is None else fine, **options)

    width = entry.step * _nearest(lambda size: count_parameters(config(entry.step * size)) - budget)
    fine = _nearest(lambda size: count_parameters(config(width, size)) - budget)
    found = config(width, fine)
    count = count_parameters(found)
    if abs(count - budget) > TOLERANCE * budget:
        raise UserError(
            f"--parameters: got {budget:,}; the nearest size of {name} has {count:,} with vocabularies of "
            f"{source_vocab_size:,} and {vocab_size:,} tokens: allow more parameters"
        )
    return found


def _nearest(excess: Callable[[int], int]) -> int:
    """The size, 1 or more, at which a function that grows with it, nearly as a polynomial of degree 2, is nearest 0."""
    # Each call makes a model, if only its shapes: three of them tell about where to look.
    curve = np.polyfit(_PROBED, [excess(size) for size in _PROBED], 2)
    low = 1 + int(np.abs(np.polyval(curve, np.arange(1, _LARGEST))).argmin())
    while low > 1 and excess(low) > 0:
        low -= 1
    while low < _LARGEST and excess(low + 1) <= 0:
        low += 1
    return min((low, low + 1), key=lambda size: abs(excess(size)))
