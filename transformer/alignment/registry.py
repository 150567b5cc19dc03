"""The alignments that a recurrent model's config can name. To add one, add a class and a line here."""

from __future__ import annotations

from typing import Any

from transformer.alignment.fast_memory import FastMemoryAlignment, FastMemoryConfig
from transformer.alignment.scored import (
    AdditiveAlignment,
    AdditiveConfig,
    HardAlignment,
    HardConfig,
    LastState,
    LocalAlignment,
    LocalConfig,
    MultiplicativeAlignment,
    MultiplicativeConfig,
    NoAlignmentConfig,
)
from transformer.alignment.source import Alignment

AlignmentConfig = (
    NoAlignmentConfig | AdditiveConfig | MultiplicativeConfig | LocalConfig | HardConfig | FastMemoryConfig
)

ALIGNMENTS: dict[type, type] = {
    NoAlignmentConfig: LastState,
    AdditiveConfig: AdditiveAlignment,
    MultiplicativeConfig: MultiplicativeAlignment,
    LocalConfig: LocalAlignment,
    HardConfig: HardAlignment,
    FastMemoryConfig: FastMemoryAlignment,
}


def make_alignment(config: AlignmentConfig, query_dim: int, memory_dim: int, **options: Any) -> Alignment:
    """The attention for a config.

    Args:
        query_dim, memory_dim: width of the decoder's state and of an encoder state.
        options: kernel_init, dtype, param_dtype and rngs of the linear layers.

    Raises:
        ValueError: `dot` with a query and states of different widths.
    """
    if (wrong := config.check(query_dim, memory_dim)) is not None:
        raise ValueError(f"make_alignment: kind={config.kind!r}; {wrong}")
    return ALIGNMENTS[type(config)](query_dim, memory_dim, config, **options)
