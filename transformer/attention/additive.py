"""Additive attention (Bahdanau et al. 2014), the first of all; and the conventions that later mechanisms share with it.

B batch, T query position, S key position, D query features, E key features, V value features, A alignment features.

    e_ts = vᵀ tanh(W q_t + U k_s)                     Bahdanau et al. 2014, appendix A.1.2
    α_ts = exp(e_ts) / Σ_s' exp(e_ts')                equation 6
    c_t  = Σ_s α_ts h_s                               equation 5
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.mask import AttentionMask
from transformer.errors import nearest
from transformer.layers.linear import Linear
from transformer.types import Array, Bool, DTypeLike, Float

Normalizer = Callable[[Array, Array | None], Array]
"""From scores [B, T, S], and where they are allowed, to weights: `softmax`, or one of `sparse_softmax.NORMALIZERS`."""


def additive_scores(
    q_BTA: Float[Array, "B T A"], k_BSA: Float[Array, "B S A"], vector_A: Float[Array, " A"]
) -> Float[Array, "B T S"]:
    """e_ts = vᵀ tanh(q_t + k_s) for projected queries and keys, in float32 or wider.

    Takes memory for B·T·S·A numbers: a recurrent decoder asks for one query at a time.
    """
    check_shapes("additive_scores", q=(q_BTA, "B T A"), k=(k_BSA, "B S A"), vector=(vector_A, "A"))
    hidden_BTSA = jnp.tanh(widen(q_BTA)[:, :, None] + widen(k_BSA)[:, None])
    return hidden_BTSA @ widen(vector_A)


def additive_attention(
    q_BTA: Float[Array, "B T A"],
    k_BSA: Float[Array, "B S A"],
    values_BSV: Float[Array, "B S V"],
    vector_A: Float[Array, " A"],
    mask: AttentionMask | None = None,
    *,
    normalize: Normalizer | None = None,
) -> tuple[Float[Array, "B T V"], Float[Array, "B T S"]]:
    """Context and weights (Bahdanau et al. 2014, equations 5 and 6) for projected queries W q and keys U k.

    Args:
        normalize: makes weights of scores; softmax by default.

    Returns:
        The context in the values' type, and the weights in float32 or wider. A query that sees no key gives zeros.

    Raises:
        ValueError: shapes that do not fit, arrays that are no floats, or a mask with heads.
    """
    shapes = {"q": (q_BTA, "B T A"), "k": (k_BSA, "B S A"), "values": (values_BSV, "B S V"), "vector": (vector_A, "A")}
    check_shapes("additive_attention", **shapes)
    allowed_BTS = headless_mask(mask, q_BTA.shape[1], k_BSA.shape[1])
    weights_BTS = (normalize or softmax)(additive_scores(q_BTA, k_BSA, vector_A), allowed_BTS)
    return context(weights_BTS, values_BSV), weights_BTS


class AdditiveAttention(nnx.Module):
    """`additive_attention` with learned W, U and v. The decoder's state is the query, the encoder's the keys.

    Args:
        query_dim, key_dim, attention_dim: D, E and A.
        normalize: makes weights of scores; softmax by default.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        *,
        normalize: Normalizer | None = None,
        kernel_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.normalize = normalize
        options: dict[str, Any] = {"kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = Linear((query_dim,), (attention_dim,), axes=("embed", "mlp"), **options)
        self.key = Linear((key_dim,), (attention_dim,), axes=("embed", "mlp"), use_bias=False, **options)
        self.vector = Linear((attention_dim,), (), axes=("mlp",), use_bias=False, **options)

    def __call__(
        self,
        query_BTD: Float[Array, "B T D"],
        keys_BSE: Float[Array, "B S E"],
        values_BSV: Float[Array, "B S V"] | None = None,
        mask: AttentionMask | None = None,
        *,
        projected_BSA: Float[Array, "B S A"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T S"]]:
        """Context and weights.

        Args:
            values_BSV: what is averaged; the keys by default, as in the paper.
            projected_BSA: `project(keys)`, which a recurrent decoder computes once for all of its steps.
        """
        with jax.named_scope("additive_attention"):
            projected_BSA = self.project(keys_BSE) if projected_BSA is None else projected_BSA
            values_BSV = keys_BSE if values_BSV is None else values_BSV
            return additive_attention(
                self.query(query_BTD),
                projected_BSA,
                values_BSV,
                self.vector.kernel[...],
                mask,
                normalize=self.normalize,
            )

    def project(self, keys_BSE: Float[Array, "B S E"]) -> Float[Array, "B S A"]:
        """U k_s, which depends on no query."""
        return self.key(keys_BSE)

    def scores(self, query_BTD: Float[Array, "B T D"], keys_BSE: Float[Array, "B S E"]) -> Float[Array, "B T S"]:
        """e_ts alone."""
        return additive_scores(self.query(query_BTD), self.project(keys_BSE), self.vector.kernel[...])


def softmax(scores: Float[Array, "*#dims"], allowed: Bool[Array, "*#dims"] | None = None) -> Float[Array, "*#dims"]:
    """Softmax over the last dim in float32 or wider, zero where not allowed; all zeros for a row that allows nothing."""
    scores = widen(scores)
    if allowed is None:
        return jax.nn.softmax(scores, axis=-1)
    # A finite floor keeps an empty row free of NaN, in the gradient too; the second where empties it.
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(allowed, weights, 0)


def context(weights_BTS: Float[Array, "B T S"], values_BSV: Float[Array, "B S V"]) -> Float[Array, "B T V"]:
    """Σ_s α_ts v_s, accumulated in the weights' type, in the values' type."""
    weights_BTS, wide = weights_BTS.astype(values_BSV.dtype), weights_BTS.dtype
    summed = jnp.einsum("BTS,BSV->BTV", weights_BTS, values_BSV, preferred_element_type=wide)
    return summed.astype(values_BSV.dtype)


def headless_mask(mask: AttentionMask | None, num_queries: int, num_keys: int) -> Bool[Array, "B_ T_ S_"] | None:
    """The mask of a mechanism with one head; None when everything is allowed.

    Raises:
        ValueError: a mask that differs by head, or is made for other numbers of queries or keys.
    """
    allowed_BNTS = None if mask is None else mask.materialize(num_queries, num_keys)
    if allowed_BNTS is None:
        return None
    if allowed_BNTS.shape[1] != 1:
        raise ValueError(f"mask: it has {allowed_BNTS.shape[1]} heads {allowed_BNTS.shape}; this attention has one")
    return allowed_BNTS[:, 0]


def widen(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """The type to accumulate in: float64 stays, anything narrower becomes float32."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def check_shapes(caller: str, **arguments: tuple[Array | None, str] | tuple[Array | None, str, Any]) -> None:
    """Raise a `ValueError` unless every array is of floats (or of the type given) and its dims fit the letters.

        check_shapes("attention", q=(q, "B T D"), valid=(valid, "B T", jnp.bool_))

    A letter stands for the same size in each argument; an argument that is None fits.
    """
    sizes: dict[str, int] = {}
    for name, (array, letters, *kinds) in arguments.items():
        if array is None:
            continue
        dims, kind = letters.split(), kinds[0] if kinds else jnp.floating
        fits = len(dims) == array.ndim and all(
            sizes.get(dim, size) == size for dim, size in zip(dims, array.shape, strict=True)
        )
        if not (fits and jnp.issubdtype(array.dtype, kind)):
            wanted = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in dims)
            raise ValueError(f"{caller}: {name} is {array.dtype} {array.shape}; expected {kind.__name__} [{wanted}]")
        sizes |= zip(dims, array.shape, strict=True)


def check_name(caller: str, argument: str, name: str, names: Iterable[str]) -> None:
    """Raise a `ValueError` for a name that is not among `names`."""
    names = tuple(names)
    if name not in names:
        raise ValueError(
            f"{caller}: {argument}={name!r} does not exist; there are {', '.join(names)}.{nearest(name, names)}"
        )
