"""`jax.nn.dot_product_attention`: XLA's own fusion, and cuDNN's flash attention on NVIDIA GPUs.

B batch, T query position, S key position, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from transformer.attention.backends.shares import shard_map_kernel
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.predicates import Causal, Window
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec
from transformer.attention.spec.tile import Tile
from transformer.differentiation import reverse_mode_only
from transformer.types import Array, Float


def fused(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B T N H"]:
    """Attention by `jax.nn.dot_product_attention`: causal and window terms are passed by name, the rest as an array."""
    (B, T, N, _), S = q_BTNH.shape, k_BSKH.shape[1]
    whole = Tile.whole(B, N, T, S)
    structured, rest = _structure(spec.mask, T, S)
    allowed = rest.allowed(whole)
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], T, S))

    def call(q: Array, k: Array, v: Array, _: None) -> Array:
        # JAX's own function mixes types, even if the program runs under a stricter promotion rule.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q, k, v, bias=spec.score.bias_BNTS, mask=allowed, scale=spec.score.scale,
                implementation=implementation, **structured,
            )  # fmt: skip

    if implementation == "cudnn":
        q_BTNH, k_BSKH, v_BSKH = reverse_mode_only(
            (q_BTNH, k_BSKH, v_BSKH),
            "attention backend 'cudnn' has a gradient and no derivative in forward mode, nor a second one; "
            "use 'blockwise' or 'reference' for those",
        )
        # Its own partitioning fails in a program that is manual over some of the mesh's axes, such as a pipeline.
        out = shard_map_kernel(call, q_BTNH, k_BSKH, v_BSKH)
    else:
        out = call(q_BTNH, k_BSKH, v_BSKH, None)
    if allowed is None:
        return out
    # A query with no key gives zeros here, as in the reference, rather than the mean of the values.
    some_key = jnp.any(spec.mask.allowed(whole), axis=-1)  # type: ignore[arg-type]  # [B_, N_, T]
    return jnp.where(jnp.moveaxis(some_key, 1, 2)[..., None], out, 0)


def _structure(mask: AttentionMask, num_queries: int, num_keys: int) -> tuple[dict[str, Any], AttentionMask]:
    """The part of a mask that `jax.nn.dot_product_attention` takes by name, and the rest, which it takes as an array."""
    plain = [
        isinstance(term, Causal | Window) and isinstance(term.offset, int) and term.offset == 0
        for term in mask.predicates
    ]
    # A window with nothing on the right is causal, and cuDNN needs it to be declared as causal.
    is_causal = any(
        here and (isinstance(term, Causal) or (isinstance(term, Window) and term.right == 0))
        for term, here in zip(mask.predicates, plain, strict=True)
    )
    structured: dict[str, Any] = {"is_causal": True} if is_causal else {}
    rest = []
    for term, here in zip(mask.predicates, plain, strict=True):
        if here and isinstance(term, Causal):
            continue
        if here and isinstance(term, Window):
            right = 0 if is_causal else term.right
            if term.left is None and (is_causal or right is None):
                continue
            if num_queries == num_keys and "local_window_size" not in structured:
                left, right = (num_keys if width is None else width for width in (term.left, right))
                structured["local_window_size"] = (left, right)
                continue
        rest.append(term)
    return structured, AttentionMask(tuple(rest))


def supports_xla(request: AttentionShapes) -> str | None:
    """Why XLA cannot serve this call, or None."""
    if request.spec.dropout is not None:
        return "it has no dropout"
    if request.spec.score.soft_cap is not None:
        return "it has no logit soft-cap"
    if request.spec.score.mod is not None:
        return "it has no score_mod"
    if request.value_dim != request.head_dim:
        return f"it needs values as wide as keys, and they are {request.value_dim} and {request.head_dim}"
    return None


def supports_cudnn(request: AttentionShapes) -> str | None:
    """Why cuDNN cannot serve this call, or None. The limits are those of `jax.nn.dot_product_attention`."""
    if request.platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is {request.platform}"
    if reason := supports_xla(request):
        return reason
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, and q is {request.dtype}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it needs a head_dim that is a multiple of 8 and at most 128, and this is {request.head_dim}"
    if request.spec.score.bias_BNTS is not None:
        return "its bias gradient is not reliable for every shape"
    if request.num_queries % 2 or request.num_keys % 2:
        # JAX requires this of calls with a bias, and treats every call as one.
        return (
            f"its gradient needs even lengths, and there are {request.num_queries} queries and {request.num_keys} keys"
        )
    structured, rest = _structure(request.spec.mask, request.num_queries, request.num_keys)
    if rest.predicates:
        return (
            "it takes causal and window masks only: an array of a mask would become a bias, with a gradient of its own"
        )
    if "local_window_size" in structured and not structured.get("is_causal"):
        return (
            "it has windows on the left of a causal mask only, and this one sees keys on the right "
            f"({_sides(request.spec.mask)})"
        )
    return None


def _sides(mask: AttentionMask) -> str:
    return "; ".join(f"left={term.left}, right={term.right}" for term in mask.predicates if isinstance(term, Window))
