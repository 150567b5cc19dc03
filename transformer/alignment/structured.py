"""Structured self-attention (Lin et al. 2017): represents a sentence as a matrix of R weighted means of its positions.

B batch, S position, D features of a position, A alignment features, R hops.

    A = softmax over positions of W_s2 tanh(W_s1 Hᵀ)            Lin et al. 2017, equation 6
    M = A H                                                     equation 7
    P = ||A Aᵀ - I||²_F                                         equation 8
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.common import check_shapes, context, headless_mask, softmax
from transformer.attention.spec.mask import AttentionMask
from transformer.layers.linear import Linear
from transformer.precision import matmul
from transformer.types import Array, DTypeLike, Float, widen


def structured_attention(
    scores_BSR: Float[Array, "B S R"], x_BSD: Float[Array, "B S D"], mask: AttentionMask | None = None
) -> tuple[Float[Array, "B R D"], Float[Array, "B R S"]]:
    """M and A, from the scores W_s2 tanh(W_s1 Hᵀ), transposed.

    Args:
        mask: over R queries (the hops) and S keys; usually `AttentionMask.padding`.

    Returns:
        M in x's type, and A in float32 or wider. Both are zeros in a row where no position is seen.

    Raises:
        ValueError: shapes that do not fit, or a mask with heads.
    """
    check_shapes("structured_attention", scores=(scores_BSR, "B S R"), x=(x_BSD, "B S D"))
    S, R = scores_BSR.shape[1:]
    weights_BRS = softmax(scores_BSR.swapaxes(1, 2), headless_mask(mask, scores_BSR.shape[0], R, S))
    return context(weights_BRS, x_BSD), weights_BRS


def redundancy_penalty(weights_BRS: Float[Array, "B R S"]) -> Float[Array, " B"]:
    """||A Aᵀ - I||²_F of each row of the batch: small if each hop looks at few positions, and no two at the same ones."""
    check_shapes("redundancy_penalty", weights=(weights_BRS, "B R S"))
    weights_BRS = widen(weights_BRS)
    gram_BRR = matmul(weights_BRS, weights_BRS.swapaxes(1, 2))
    return jnp.sum((gram_BRR - jnp.eye(gram_BRR.shape[-1], dtype=gram_BRR.dtype)[None]) ** 2, axis=(1, 2))


class StructuredAttention(nnx.Module):
    """`structured_attention` with learned W_s1 and W_s2.

    Args:
        embed_dim, attention_dim: D and A.
        num_hops: R.
    """

    def __init__(
        self,
        embed_dim: int,
        attention_dim: int,
        num_hops: int,
        *,
        kernel_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.hidden = Linear((embed_dim,), (attention_dim,), axes=("embed", "mlp"), use_bias=False, **options)
        self.hops = Linear((attention_dim,), (num_hops,), axes=("mlp", None), use_bias=False, **options)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], mask: AttentionMask | None = None
    ) -> tuple[Float[Array, "B R D"], Float[Array, "B R S"]]:
        """M and A. Add a small multiple of `redundancy_penalty(A)` to the loss, so that the hops differ."""
        with jax.named_scope("structured_attention"):
            return structured_attention(self.hops(jnp.tanh(self.hidden(x_BSD))), x_BSD, mask)
