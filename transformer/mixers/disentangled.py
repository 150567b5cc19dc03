"""Disentangled attention: logits from the contents of two tokens, and from the content of each with their distance.

B batch, T query position, S key position, D embed, N heads, H head_dim, R rows of the table of relative embeddings, E distances.
He et al. 2021 (DeBERTa), equations 2 to 4.

    q, k, v   = x W_q, x W_k, x W_v
    q^r, k^r  = P W_q^r, P W_k^r              P: the relative embeddings, shared by all layers
    logit(t, s) = (q_t · k_s + q_t · k^r_δ(t,s) + k_s · q^r_δ(t,s)) / √(3H)

δ(t, s) is the row for the distance t - s. The terms are content-to-content, content-to-position and position-to-content; the
scale is 1 / √(H · number of terms). Equation 4 has δ(s, t) in the last term. Here it is δ(t, s), as in the released code and so
in published checkpoints: the rows of q^r have the opposite order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.attention.dispatch import attend
from transformer.errors import Config, require
from transformer.layers.linear import DEFAULT_INIT, Linear
from transformer.layers.position import token_positions
from transformer.layers.relative_embedding import RelativeEmbedding
from transformer.mixers.context import NO_CONTEXT, Context
from transformer.mixers.heads import Backend, check_heads, check_width, head_sizes, projection_flops, seen_keys
from transformer.mixers.state import KVCache, nan_on_overflow
from transformer.resume import Free
from transformer.sharding import constrain
from transformer.types import Array, DTypeLike, Float, Int, wide

BLOCK, MAX_BLOCKS = 128, 16
"""Tokens in a block whose products with distances are computed together, and blocks in a row; in a longer row, more tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisentangledConfig(Config):
    """Disentangled attention: logits from contents, and from contents with distances (He et al. 2021)."""

    causal_only: ClassVar[bool] = False
    has_distributions: ClassVar[bool] = True

    kind: Literal["disentangled"] = "disentangled"
    """Softmax attention in which each token's content also meets the distance to the other token (DeBERTa)."""
    num_heads: int = 12
    """Number of heads."""
    head_dim: int | None = None
    """Features of a head. null: embed_dim / num_heads."""
    max_distance: int = 512
    """From this distance on, in tokens, all distances share an embedding."""
    num_buckets: int | None = 256
    """Number of ranges of distances on each side, an even number: half of them hold a single distance each, the others widen
    geometrically. null: each distance has an embedding of its own."""
    content_to_position: bool = True
    """Whether logits have the product of a query with the distance."""
    position_to_content: bool = True
    """Whether logits have the product of a key with the distance."""
    share_projections: bool = True
    """Project relative embeddings with the layers of queries and keys (DeBERTa v3); false: with layers of their own."""
    norm_embeddings: bool = True
    """Layer-normalise the relative embeddings."""
    bias: bool = True
    """Biases in the linear layers."""
    backend: Free[Backend] = "auto"
    """Implementation of attention. It is an error to name one that cannot run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)
        require(self, "max_distance", self.max_distance >= 1, "allowed: 1 or more")
        buckets = self.num_buckets
        even = buckets is None or (buckets >= 2 and buckets % 2 == 0)
        require(self, "num_buckets", even, "allowed: an even number from 2 up, or null")
        least = 1 if buckets is None else buckets // 2 + 2
        require(
            self, "max_distance", self.max_distance >= least, f"with {buckets} num_buckets allowed: {least} or more"
        )
        some = self.content_to_position or self.position_to_content
        require(self, "content_to_position", some, "allowed: true where position_to_content is false")

    @property
    def structure(self) -> DisentangledConfig:
        """The settings that determine the parameters: layers in which these are equal can be stacked."""
        return dataclasses.replace(self, backend="auto")

    @property
    def shared(self) -> tuple[int, int | None, bool]:
        """The settings of the relative embeddings, which are equal in all layers."""
        return self.max_distance, self.num_buckets, self.norm_embeddings

    @property
    def num_terms(self) -> int:
        """Number of products that a logit is the sum of."""
        return 1 + self.content_to_position + self.position_to_content

    def check(self, embed_dim: int) -> tuple[str, str] | None:
        """The field that does not suit `embed_dim` and what is allowed, or None."""
        return check_width(self, embed_dim)

    def flops(self, embed_dim: int, length: int, *, causal: bool) -> float:
        """FLOPs of one token in a context of `length`, projections included; a multiply-add counts as two.

        Each term of the logits counts as one product for each pair of tokens; projecting the relative embeddings is not counted.
        """
        N, _, H = head_sizes(self, embed_dim)
        pairs = seen_keys(self, length, causal=causal) * N * H
        return projection_flops(self, embed_dim) + 2 * pairs * (self.num_terms + 1)


class DisentangledAttention(nnx.Module):
    """Self-attention in N heads over contents and distances. The stack of layers owns the relative embeddings.

    Training drops attention weights only; the released code also drops features of the relative embeddings in each layer.

    Args:
        config: its sizes and terms.
        dropout_rate: of the attention weights.
        kernel_init, out_init: initialisers of the input projections, and of the output projection to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        config: DisentangledConfig,
        *,
        dropout_rate: float = 0.0,
        kernel_init: Callable[..., Array] = DEFAULT_INIT,
        out_init: Callable[..., Array] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = c = config
        N, _, H = self.sizes = head_sizes(c, embed_dim)
        self.dropout_rate = dropout_rate
        types: dict[str, Any] = {"use_bias": c.bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def project() -> Linear:
            return Linear((embed_dim,), (N, H), axes=("embed", "heads", "head_dim"), kernel_init=kernel_init, **types)

        self.query, self.key, self.value = project(), project(), project()
        self.position_key: Linear | None = None
        self.position_query: Linear | None = None
        if c.content_to_position and not c.share_projections:
            self.position_key = nnx.data(project())
        if c.position_to_content and not c.share_projections:
            self.position_query = nnx.data(project())
        init = kernel_init if out_init is None else out_init
        self.out = Linear((N, H), (embed_dim,), axes=("heads", "head_dim", "embed"), kernel_init=init, **types)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context = NO_CONTEXT
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Float[Array, "B n T S"] | None]:
        """Self-attention over x, or over the state's keys with x's after them.

        Distances count positions in the row, which packing does not change: tokens of one document are as far apart as before.

        Returns:
            The output, the state with x in it (None without one), and the weights (None unless asked for).

        Raises:
            ValueError: a context without relative embeddings.
        """
        c, state, key = self.config, context.state, context.adapter_key
        with jax.named_scope("disentangled_attention"):
            mask = context.self_mask(x_BTD)
            q, k, v = (
                constrain(linear(x_BTD, key), "batch", "seq", "heads", "head_dim")
                for linear in (self.query, self.key, self.value)
            )
            if state is not None:
                assert isinstance(state, KVCache)
                state = state.append(k, v, context.valid_BT)
                mask = context.cached_mask(mask, state)
                k, v = state.keys_and_values(q.dtype)
            scale = (q.shape[-1] * c.num_terms) ** -0.5
            bias_BNTS = constrain(scale * self._by_distance(q, k, context), "batch", "heads", None, None)
            out_BTNH, weights = attend(
                q, k, v, mask, bias_BNTS, scale=scale, score_mod=context.scores(None, c.num_heads),
                dropout_rate=self.dropout_rate, dropout_key=context.key, backend=c.backend,
                return_weights=context.return_weights,
            )  # fmt: skip
            if state is not None:
                out_BTNH = nan_on_overflow(out_BTNH, state)
            return constrain(self.out(context.at("heads", out_BTNH), key), "batch", "stream", None), state, weights

    def make_state(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens."""
        N, _, H = self.sizes
        return KVCache.empty(batch_size, max_length, N, H, self.out.dtype)

    def _by_distance(self, q_BTNH: Array, k_BSNH: Array, context: Context) -> Float[Array, "B N T S"]:
        """The sum of the products with a distance, in float32 or wider."""
        c, table = self.config, context.relative
        if not isinstance(table, RelativeEmbedding):
            raise ValueError("disentangled attention: the context has no relative embeddings (a RelativeEmbedding)")
        rows_RD = table()
        start = None if context.state is None else context.start
        parts = []
        if c.content_to_position:
            vectors_RNH = (self.key if self.position_key is None else self.position_key)(rows_RD)
            parts.append(_with_distances(q_BTNH, vectors_RNH, table, k_BSNH.shape[1], start))
        if c.position_to_content:
            vectors_RNH = (self.query if self.position_query is None else self.position_query)(rows_RD)
            parts.append(_with_distances(k_BSNH, vectors_RNH, table, q_BTNH.shape[1], start, is_key=True).mT)
        first, *others = parts
        return sum(others, first)


def _with_distances(
    x_BTNH: Float[Array, "B T N H"],
    vectors_RNH: Float[Array, "R N H"],
    table: RelativeEmbedding,
    num_others: int,
    start: int | Int[Array, " B"] | None,
    *,
    is_key: bool = False,
) -> Float[Array, "B N T {num_others}"]:
    """The product of each query with the vector of its distance from each key, in float32 or wider; or the same of each key.

    Args:
        num_others: number of tokens on the other side.
        start: position of the first query, if it differs by row; None: that of the first key.
        is_key: x are keys.
    """
    (B, T), sign = x_BTNH.shape[:2], -1 if is_key else 1

    def products(x_BTNH: Array, vectors_ENH: Array) -> Array:
        return jnp.einsum("BTNH,ENH->BNTE", x_BTNH, vectors_ENH, preferred_element_type=wide(x_BTNH.dtype))

    if start is None:
        # A block of tokens at a time: one product for each distance that occurs in it, and a shift that lines them up with the
        # tokens of the other side. Gathering (B, N, T, S) from the products with the table's rows is shorter to write, and its
        # gradient is a scatter-add: on a CPU the gradient of attention took 1.6 to 2 times as long, in as much memory, for 128
        # to 512 tokens. One block of all T needs products for 2T - 1 distances, of which half are not used.
        size = max(BLOCK, -(-T // MAX_BLOCKS))
        blocks = []
        for first in range(0, T, size):
            last = min(first + size, T) - 1
            rows = table.rows(sign * np.arange(last, first - num_others, -1))
            blocks.append(_shifted(products(x_BTNH[:, first : last + 1], vectors_RNH[rows]), num_others))
        return jnp.concatenate(blocks, axis=2)
    # Decoding has few queries and no gradient.
    own_BT, others_BS = (
        token_positions(B, size, 0 if is_keys else start) for size, is_keys in ((T, is_key), (num_others, not is_key))
    )
    index_BTS = table.rows(sign * (own_BT[:, :, None] - others_BS[:, None]))
    return jnp.take_along_axis(products(x_BTNH, vectors_RNH), index_BTS[:, None], axis=-1)


def _shifted(x_BNTE: Float[Array, "B N T E"], size: int) -> Float[Array, "B N T {size}"]:
    """From place T - 1 - t of row t on, `size` numbers; E = T + size - 1.

    With one more number in each row, the flat array read in rows of the old width begins each of them one place earlier.
    """
    B, N, T, E = x_BNTE.shape
    flat = jnp.pad(x_BNTE, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(B, N, T * (E + 1))
    return flat[..., : T * E].reshape(B, N, T, E)[..., T - 1 :]
