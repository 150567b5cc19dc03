"""Maps to make pages of, one of them with tokens that would like to be more than text."""

from __future__ import annotations

import numpy as np

from transformer.interpret.capture import AttentionMaps

HOSTILE = (
    "</script><img src=x onerror=document.title='bad'>",
    "<script>document.title='bad'</script>",
    "<!--",
    "${alert(1)}$data",
    "&lt;b&gt;",
    '"\\\u2028',
    "\u202eright to left",
    " plain",
)


def maps_of(tokens, layers=(0, 1, 2), heads=(0, 3), seed=0, **options):
    """Causal weights over many orders of magnitude."""
    size = len(tokens)
    weights = np.tril(np.random.default_rng(seed).random((len(layers), len(heads), size, size)) ** 6)
    weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    return AttentionMaps(tuple(tokens), tuple(tokens), layers, heads, weights, **options)


def two_texts():
    weights = np.random.default_rng(1).random((1, 2, 3, 5)).astype(np.float32)
    weights /= weights.sum(-1, keepdims=True)
    source, target = ("the", "black", "cat", "sleeps", "."), ("le", "chat", "dort")
    return AttentionMaps(target, source, (0,), (0, 1), weights, "alignment", same_tokens=False)
