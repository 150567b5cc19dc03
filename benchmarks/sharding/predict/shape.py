"""The sizes of a model that a layout divides and that its collectives carry, for all kinds of mixers."""

from __future__ import annotations

import math
from typing import Any

from transformer.layers.feed_forward import num_matrices
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.models.config import StackConfig
from transformer.models.families import flops_per_token


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


def repeated(model: Any, length: int) -> float:
    """The share of a forward pass's FLOPs that the backward pass repeats where it recomputes all of each layer.

    The head is not in a layer, and where a block ends with a sum, nothing needs its last product again.
    """
    if not isinstance(model, StackConfig):
        return 1.0
    config: Any = model
    whole, head = flops_per_token(config, length), 2.0 * model.embed_dim * model.vocab_size
    mixers = model.mixers()
    mixing = sum(mixer.flops(model.embed_dim, length, causal=not model.has_encoder) for mixer in mixers) / len(mixers)
    mlp = model.mlp.flops(model.embed_dim)
    last = mlp / num_matrices(model.mlp.activation) if model.norm_first and not model.norm_outputs else 0.0
    return max(whole - head, 0.0) / whole * (1 - last / (mixing + mlp))


def expert_parameters(model: Any) -> float:
    """Parameters of all experts of all layers; 0 without any."""
    mlp = experts(model)
    if mlp is None:
        return 0.0
    matrices = 3 if mlp.activation in ("geglu", "geglu_exact", "swiglu") else 2
    return float(model.num_layers * mlp.num_experts * matrices * model.embed_dim * mlp.width(model.embed_dim))
