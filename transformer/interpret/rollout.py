"""Summaries of attention weights: rollout through the layers, and a head's entropy and distance.

L layers, N query heads, T query position, S key position.

Pure functions of weights as `capture.attention_maps` gives them, in NumPy.
"""

from __future__ import annotations

import numpy as np

from transformer.types import Float


def rollout(weights_LNTT: Float[np.ndarray, "L N T T"], residual: float = 0.5) -> Float[np.ndarray, "L T T"]:
    """How much of each input token reaches each position, after every layer (Abnar & Zuidema 2020, section 3).

    A layer's heads are averaged and mixed with the identity for the residual connection; the product of those matrices
    from the first layer on is the rollout.

    Args:
        weights_LNTT: of consecutive layers from the first on.
        residual: share of the residual connection, 0 to 1; the paper takes 1/2.

    Returns:
        [L, T, T]: row t of matrix l is position t's distribution over the input tokens after layer l.
    """
    identity = np.eye(weights_LNTT.shape[-1], dtype=weights_LNTT.dtype)
    reached, after = identity, []
    for weights_NTT in weights_LNTT:
        mixed = (1 - residual) * weights_NTT.mean(0) + residual * identity
        # A query that sees nothing has no weights: only the residual connection brings it anything.
        reached = mixed / mixed.sum(-1, keepdims=True) @ reached
        after.append(reached)
    return np.stack(after) if after else np.zeros((0, *identity.shape), identity.dtype)


def entropy(weights: Float[np.ndarray, "*heads T S"]) -> Float[np.ndarray, "*heads"]:
    """Entropy of a query's distribution over the keys in bits, averaged over the queries that see anything.

    0: one key gets everything; log2(S): all get the same. Even a uniform causal head stays below that, since its
    first queries see few keys.
    """
    logs = np.log2(weights, out=np.zeros_like(weights), where=weights > 0)
    return _mean_over_queries(-(weights * logs).sum(-1), weights)


def mean_distance(weights: Float[np.ndarray, "*heads T T"]) -> Float[np.ndarray, "*heads"]:
    """How many tokens away a head looks: |t - s| under its weights, averaged over the queries that see anything.

    Vig & Belinkov 2019, section 4.2. Rows and columns are the same tokens.
    """
    positions = np.arange(weights.shape[-1], dtype=weights.dtype)
    distance_TT = np.abs(positions[:, None] - positions)
    return _mean_over_queries((weights * distance_TT).sum(-1), weights)


def _mean_over_queries(
    values: Float[np.ndarray, "*heads T"], weights: Float[np.ndarray, "*heads T S"]
) -> Float[np.ndarray, "*heads"]:
    sees = weights.any(-1)
    return np.asarray((values * sees).sum(-1) / np.maximum(sees.sum(-1), 1), weights.dtype)
