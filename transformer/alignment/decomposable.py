"""Decomposable attention (Parikh et al. 2016): two sentences compared word by word, with no recurrence and no order.

B batch, T position in the first sentence a, S position in the second sentence b, D embed, F hidden features, C classes.

    attend       e_ts = F(a_t)ᵀ F(b_s),  β_t = Σ_s softmax over s of e_ts · b_s,  α_s = Σ_t softmax over t of e_ts · a_t
    compare      v1_t = G([a_t, β_t]),  v2_s = G([b_s, α_s])
    aggregate    ŷ = H([Σ_t v1_t, Σ_s v2_s])                    Parikh et al. 2016, equations 1 to 5

With intra-sentence attention (their section 3.4), a_t becomes [a_t, a'_t], where a' attends within the sentence by
F_intra(a_t)ᵀ F_intra(a_s) + d_(t-s). The bias d is learned for each distance; all distances beyond a maximum share one. The
same applies to b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.alignment.multiplicative import dot_scores
from transformer.attention.common import check_shapes, context, headless_mask, softmax
from transformer.attention.spec.mask import AttentionMask
from transformer.layers.linear import Linear
from transformer.sharding import with_axes
from transformer.types import Array, Bool, DTypeLike, Float


def attend_both_ways(
    scores_BTS: Float[Array, "B T S"],
    a_BTD: Float[Array, "B T D"],
    b_BSD: Float[Array, "B S D"],
    mask: AttentionMask | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"], Float[Array, "B T S"], Float[Array, "B S T"]]:
    """What each word of a sees of b, and each word of b sees of a (Parikh et al. 2016, equation 2).

    Args:
        mask: pairs that may see each other.

    Returns:
        β in b's type, α in a's, the weights of a over b and those of b over a in float32 or wider. A word that sees nothing
        gets zeros.

    Raises:
        ValueError: shapes that do not fit, or a mask with heads.
    """
    check_shapes("attend_both_ways", scores=(scores_BTS, "B T S"), a=(a_BTD, "B T D"), b=(b_BSD, "B S D"))
    allowed_BTS = headless_mask(mask, *scores_BTS.shape)
    over_b_BTS = softmax(scores_BTS, allowed_BTS)
    over_a_BST = softmax(scores_BTS.swapaxes(1, 2), None if allowed_BTS is None else allowed_BTS.swapaxes(1, 2))
    return context(over_b_BTS, b_BSD), context(over_a_BST, a_BTD), over_b_BTS, over_a_BST


def distance_bias(bias_M: Float[Array, " M"], length: int) -> Float[Array, "T T"]:
    """d_(t-s) for all pairs of positions, from biases for distances -(M-1)/2 to (M-1)/2; the outermost ones also apply beyond.

    Raises:
        ValueError: an even number of biases.
    """
    check_shapes("distance_bias", bias=(bias_M, "M"))
    if bias_M.shape[0] % 2 == 0:
        raise ValueError(f"distance_bias: bias has shape {bias_M.shape}; expected an odd number, of -D to D")
    furthest = bias_M.shape[0] // 2
    positions = jnp.arange(length)
    return bias_M[jnp.clip(positions[:, None] - positions[None], -furthest, furthest) + furthest]


class DecomposableAttention(nnx.Module):
    """The whole model, from two sentences of embeddings to the logits of C classes.

    Args:
        embed_dim, hidden_dim, num_classes: D, F and C.
        use_intra: attend within each sentence first.
        max_distance: the greatest distance that has its own bias; 10 in the paper.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_classes: int,
        *,
        use_intra: bool = False,
        max_distance: int = 10,
        kernel_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if max_distance < 1:
            raise ValueError(f"DecomposableAttention: max_distance={max_distance}; expected 1 or more")
        self.intra = _TwoLayers(embed_dim, hidden_dim, **options) if use_intra else None
        biases = with_axes(nnx.initializers.zeros, None)
        self.bias = nnx.Param(biases(rngs.params(), (2 * max_distance + 1,), param_dtype)) if use_intra else None
        word_dim = 2 * embed_dim if use_intra else embed_dim
        self.attend = _TwoLayers(word_dim, hidden_dim, **options)
        self.compare = _TwoLayers(2 * word_dim, hidden_dim, **options)
        self.aggregate = _TwoLayers(2 * hidden_dim, hidden_dim, **options)
        # There are few classes, so their dim has the name `head_dim`, which no strategy shards.
        self.classify = Linear((hidden_dim,), (num_classes,), axes=("embed", "head_dim"), **options)

    def __call__(
        self,
        a_BTD: Float[Array, "B T D"],
        b_BSD: Float[Array, "B S D"],
        *,
        valid_a_BT: Bool[Array, "B T"] | None = None,
        valid_b_BS: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B C"], Float[Array, "B T S"], Float[Array, "B S T"]]:
        """The logits, and the weights of a over b and of b over a.

        Args:
            valid_a_BT, valid_b_BS: words that are not padding; padding is neither seen nor counted.

        Raises:
            ValueError: shapes that do not fit.
        """
        shapes: dict[str, Any] = {
            "a": (a_BTD, "B T D"),
            "b": (b_BSD, "B S D"),
            "valid_a": (valid_a_BT, "B T", jnp.bool_),
            "valid_b": (valid_b_BS, "B S", jnp.bool_),
        }
        check_shapes("DecomposableAttention", **shapes)
        with jax.named_scope("decomposable_attention"):
            valid_a_BT = jnp.ones(a_BTD.shape[:2], bool) if valid_a_BT is None else valid_a_BT
            valid_b_BS = jnp.ones(b_BSD.shape[:2], bool) if valid_b_BS is None else valid_b_BS
            pairs = AttentionMask.explicit(valid_a_BT[:, None, :, None] & valid_b_BS[:, None, None, :])
            a_BTD, b_BSD = self._words(a_BTD, valid_a_BT), self._words(b_BSD, valid_b_BS)
            scores_BTS = dot_scores(self.attend(a_BTD), self.attend(b_BSD))
            beta_BTD, alpha_BSD, over_b_BTS, over_a_BST = attend_both_ways(scores_BTS, a_BTD, b_BSD, pairs)
            sums = []
            for words, seen, valid in ((a_BTD, beta_BTD, valid_a_BT), (b_BSD, alpha_BSD, valid_b_BS)):
                compared = self.compare(jnp.concatenate([words, seen], axis=-1))
                sums.append(jnp.where(valid[..., None], compared, 0).sum(1))
            logits_BC = self.classify(self.aggregate(jnp.concatenate(sums, axis=-1)))
            return logits_BC, over_b_BTS, over_a_BST

    def _words(self, x_BTD: Array, valid_BT: Array) -> Array:
        """The words, each concatenated with its intra-sentence context if the model uses one."""
        if self.intra is None or self.bias is None:
            return x_BTD
        T, features = x_BTD.shape[1], self.intra(x_BTD)
        scores_BTT = dot_scores(features, features)
        scores_BTT = scores_BTT + distance_bias(self.bias[...], T).astype(scores_BTT.dtype)[None]
        weights_BTT = softmax(scores_BTT, headless_mask(AttentionMask.padding(valid_BT), *scores_BTT.shape))
        return jnp.concatenate([x_BTD, context(weights_BTT, x_BTD)], axis=-1)


class _TwoLayers(nnx.Module):
    """relu(W_2 relu(W_1 x + b_1) + b_2)."""

    def __init__(self, in_dim: int, hidden_dim: int, **options: Any) -> None:
        self.first = Linear((in_dim,), (hidden_dim,), axes=("embed", "mlp"), **options)
        self.second = Linear((hidden_dim,), (hidden_dim,), axes=("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "*dims I"]) -> Float[Array, "*dims F"]:
        return jax.nn.relu(self.second(jax.nn.relu(self.first(x))))
