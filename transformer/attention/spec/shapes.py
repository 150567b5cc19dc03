"""The properties of a call of `attend` that the choice of a backend depends on."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformer.attention.spec.spec import AttentionSpec
from transformer.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShapes:
    """Shapes, types and the spec of one call, known before the program runs."""

    platform: str
    dtype: Any
    batch_size: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    spec: AttentionSpec
    compute_capability: float = 0.0
    """Of an NVIDIA GPU."""
    devices: int = 1
    """Number of devices that the batch and the heads are divided over."""

    @property
    def pairs(self) -> float:
        """Number of weights on each device: of each row, head, query and key."""
        return self.batch_size * self.num_heads * self.num_queries * self.num_keys / self.devices

    @staticmethod
    def of(q_BTNH: Array, v_BSKC: Array, spec: AttentionSpec, platform: str, **device: Any) -> AttentionShapes:
        """The request of a call with these queries and values, on this platform, and the fields of `device`."""
        (B, T, N, H), (_, S, K, C) = q_BTNH.shape, v_BSKC.shape
        return AttentionShapes(
            platform=platform, dtype=q_BTNH.dtype, batch_size=B, num_queries=T, num_keys=S, num_heads=N, num_kv_heads=K,
            head_dim=H, value_dim=C, spec=spec, **device,
        )  # fmt: skip
