"""The sizes of a model that a layout divides and that its collectives carry, for all kinds of mixers."""

from __future__ import annotations

import math
from typing import Any

from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.models.config import StackConfig


def kv_heads(model: Any) -> int:
    """Heads that a tensor axis divides in every layer; 1 for a model without any."""
    if not isinstance(model, StackConfig):
        return 1
    return math.gcd(*(getattr(mixer, "num_kv_heads", None) or mixer.num_heads for mixer in model.mixers()))


def query_heads(model: Any) -> int:
    """The same for query heads."""
    return math.gcd(*(mixer.num_heads for mixer in model.mixers())) if isinstance(model, StackConfig) else 1


def widths(model: Any) -> tuple[float, float]:
    """Features of all queries, and of all keys, of a layer, averaged over the layers."""
    if not isinstance(model, StackConfig):
        return model.embed_dim, model.embed_dim
    sizes = []
    for mixer in model.mixers():
        head_dim = mixer.head_dim or model.embed_dim // mixer.num_heads
        sizes.append((mixer.num_heads * head_dim, (getattr(mixer, "num_kv_heads", None) or mixer.num_heads) * head_dim))
    queries, keys = zip(*sizes, strict=True)
    return sum(queries) / len(queries), sum(keys) / len(keys)


def experts(model: Any) -> ExpertsConfig | None:
    """The mixture of experts of each block, or None."""
    mlp = getattr(model, "mlp", None)
    return mlp if isinstance(mlp, ExpertsConfig) else None


def mlp_width(model: Any) -> int | None:
    """Width of the feed-forward layers; None for a model without any."""
    return model.mlp.width(model.embed_dim) if isinstance(model, StackConfig) else None


def expert_parameters(model: Any) -> float:
    """Parameters of all experts of all layers; 0 without any."""
    mlp = experts(model)
    if mlp is None:
        return 0.0
    matrices = 3 if mlp.activation in ("geglu", "geglu_exact", "swiglu") else 2
    return float(model.num_layers * mlp.num_experts * matrices * model.embed_dim * mlp.width(model.embed_dim))
