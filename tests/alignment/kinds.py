"""Every kind of alignment, small."""

from __future__ import annotations

from transformer.alignment.fast_memory import FastMemoryConfig
from transformer.alignment.registry import AlignmentConfig
from transformer.alignment.scored import (
    AdditiveConfig,
    HardConfig,
    LocalConfig,
    MultiplicativeConfig,
    NoAlignmentConfig,
)

KINDS: dict[str, AlignmentConfig] = {
    "none": NoAlignmentConfig(),
    "additive": AdditiveConfig(dim=10),
    "dot": MultiplicativeConfig(kind="dot"),
    "general": MultiplicativeConfig(kind="general"),
    "concat": AdditiveConfig(kind="concat", dim=10),
    "local_m": LocalConfig(kind="local_m", window=2),
    "local_p": LocalConfig(kind="local_p", window=2, dim=10),
    "hard": HardConfig(dim=10),
    "linear": FastMemoryConfig(kind="linear", dim=10),
    "delta": FastMemoryConfig(kind="delta", dim=10),
    "additive, sparsemax": AdditiveConfig(dim=10, normalizer="sparsemax"),
    "general, entmax15": MultiplicativeConfig(kind="general", normalizer="entmax15"),
}
