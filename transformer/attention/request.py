"""What a call of `attend` asks for, as far as the choice of a backend depends on it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformer.attention.variant import Variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Shapes, types and the variant of one call, known before the program runs."""

    platform: str
    dtype: Any
    batch_size: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    variant: Variant
