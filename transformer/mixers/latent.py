"""Multi-head latent attention: keys and values of all heads come from one small vector per token, and only that is cached.

B batch, T query position, S key position, D embed, N heads, H head_dim without rotation, C value dim, R latent dim (d_c),
P rotary dim (d_h^R). DeepSeek-AI 2024 (DeepSeek-V2), section 2.1; equations by their numbers there.

    c = norm(W_DKV x)                  (9)   the latent, shared by all heads
    k = [W_UK c ; rotary(W_KR x)]      (10, 15, 17)   the rotary part is shared by all heads too
    v = W_UV c                         (11)
    q = [W_UQ cq ; rotary(W_QR cq)]    (12-14, 16)   cq = norm(W_DQ x), or x itself

The product of a head's W_UQ·q with W_UK·c equals that of W_UKᵀ·q with c. In this absorbed form, attention runs over the
cached latents as if they were the keys and values of one key/value head, and nothing is expanded. Decoding does that; training
expands, which takes fewer products if there are as many queries as keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.dispatch import attend
from transformer.errors import Config, require
from transformer.layers.linear import DEFAULT_INIT, Linear
from transformer.layers.norm import RMSNorm
from transformer.layers.position import NO_SCALING, RotaryScaling, rotary
from transformer.mixers.context import NO_CONTEXT, Context
from transformer.mixers.heads import Backend, check_heads, check_width, seen_keys
from transformer.mixers.state import LatentCache, nan_on_overflow
from transformer.resume import Free
from transformer.sharding import constrain
from transformer.types import Array, DTypeLike, Float


class _Sizes(NamedTuple):
    num_heads: int
    head_dim: int
    latent_dim: int
    rotary_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(Config):
    """Multi-head latent attention: keys and values of all heads from one small vector a token (DeepSeek-AI 2024)."""

    causal_only: ClassVar[bool] = False
    has_distributions: ClassVar[bool] = True

    kind: Literal["latent"] = "latent"
    """Softmax attention whose cache holds a small vector for each token."""
    num_heads: int = 12
    """Number of heads."""
    head_dim: int | None = None
    """Features of each head's queries and keys without the rotary part. null: embed_dim / num_heads."""
    latent_dim: int | None = None
    """Width d_c of the compressed keys and values. null: 4 head_dim."""
    query_latent_dim: int | None = None
    """Width d_c' of the compressed queries. null: queries are not compressed."""
    rotary_dim: int | None = None
    """Features d_h^R of each rotated query, and of the rotated key that all heads share. null: head_dim / 2."""
    value_dim: int | None = None
    """Features of each head's values. null: head_dim."""
    theta: float = 10_000.0
    """Base of the rotary frequencies."""
    scaling: RotaryScaling = NO_SCALING
    """How rotary positions are extended to a longer context."""
    window: int | None = None
    """Each token sees this many tokens before itself, and in an encoder as many after. null: all."""
    backend: Free[Backend] = "auto"
    """Implementation of attention. It is an error to name one that cannot run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)
        for field in ("latent_dim", "query_latent_dim", "rotary_dim", "value_dim", "window"):
            given = getattr(self, field)
            require(self, field, given is None or given >= 1, "allowed: 1 or more, or null")
        require(self, "rotary_dim", (self.rotary_dim or 2) % 2 == 0, "allowed: an even number, or null")
        require(self, "theta", self.theta > 0, "allowed: above 0")

    @property
    def structure(self) -> LatentConfig:
        """The settings that determine the parameters: layers in which these are equal can be stacked."""
        return dataclasses.replace(self, theta=10_000.0, scaling=NO_SCALING, window=None, backend="auto")

    def check(self, embed_dim: int) -> tuple[str, str] | None:
        """The field that does not suit `embed_dim` and what is allowed, or None."""
        if (wrong := check_width(self, embed_dim)) is not None:
            return wrong
        if (dim := self.sizes(embed_dim).rotary_dim) % 2:
            return (
                "rotary_dim",
                f"rotary positions rotate pairs of features, and would rotate {dim}; allowed: an even number",
            )
        return None

    def sizes(self, embed_dim: int) -> _Sizes:
        """All sizes with their defaults filled in."""
        H = self.head_dim or embed_dim // self.num_heads
        return _Sizes(
            self.num_heads, H, self.latent_dim or 4 * H, self.rotary_dim or max(H // 2, 1), self.value_dim or H
        )

    def flops(self, embed_dim: int, length: int, *, causal: bool) -> float:
        """FLOPs of one token in a context of `length`, keys and values expanded; a multiply-add counts as two."""
        N, H, R, P, V = self.sizes(embed_dim)
        read = self.query_latent_dim or embed_dim
        queries = read * N * (H + P) + (embed_dim * read if self.query_latent_dim else 0)
        projections = queries + embed_dim * (R + P) + R * N * (H + V) + N * V * embed_dim
        return 2.0 * projections + 2 * seen_keys(self, length, causal=causal) * N * (H + P + V)


class LatentAttention(nnx.Module):
    """Self-attention in N heads over latents of `latent_dim` numbers per token.

    Args:
        config: its sizes and positions.
        dropout_rate: of the attention weights.
        kernel_init, out_init: initialisers of the input projections, and of the output projection to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        config: LatentConfig,
        *,
        dropout_rate: float = 0.0,
        kernel_init: Callable[..., Array] = DEFAULT_INIT,
        out_init: Callable[..., Array] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = c = config
        self.sizes = c.sizes(embed_dim)
        self.dropout_rate = dropout_rate

        N, H, R, P, V = self.sizes

        def linear(dim: int, *out: int) -> Linear:
            # A latent is sharded like the residual stream, and every head reads all of it.
            axes = ("embed", "head_dim") if len(out) == 1 else ("embed", "heads", "head_dim")
            return Linear(
                (dim,), out, axes=axes, use_bias=False, kernel_init=kernel_init,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        def norm(dim: int) -> RMSNorm:
            return RMSNorm(dim, axis="head_dim", param_dtype=param_dtype, rngs=rngs)

        # W_DQ; W_UQ and W_QR as one; W_DKV and W_KR as one; W_UK; W_UV.
        query_latent = c.query_latent_dim
        self.query_down = None if query_latent is None else linear(embed_dim, query_latent)
        self.query_norm = None if query_latent is None else norm(query_latent)
        self.query = linear(query_latent or embed_dim, N, H + P)
        self.down = linear(embed_dim, R + P)
        self.norm = norm(R)
        self.key_up = linear(R, N, H)
        self.value_up = linear(R, N, V)
        self.out = Linear(
            (N, V), (embed_dim,), axes=("heads", "head_dim", "embed"), use_bias=False,
            kernel_init=kernel_init if out_init is None else out_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context = NO_CONTEXT, *, absorb: bool | None = None
    ) -> tuple[Float[Array, "B T D"], LatentCache | None, Float[Array, "B n T S"] | None]:
        """Self-attention over x, or over the state's latents with x's after them.

        Args:
            absorb: attend to the latents themselves; False: to keys and values expanded from them; None: whichever takes fewer
                multiplications for these numbers of queries and keys. The result is the same.

        Returns:
            The output, the state with x in it (None without one), and the weights (None unless asked for).
        """
        c, state, key = self.config, context.state, context.adapter_key
        _, H, R, P, _ = self.sizes
        with jax.named_scope("latent_attention"):
            positions_BT = context.positions(x_BTD)
            mask = context.self_mask(x_BTD, window=c.window)
            turn = functools.partial(
                rotary, positions_BT=positions_BT, theta=c.theta, scaling=c.scaling, length=context.room
            )
            q_BTNH, turned_BTNP = self._queries(x_BTD, turn, key)
            latents_BSR = self._latents(x_BTD, turn, key)
            if state is not None:
                assert isinstance(state, LatentCache)
                state = state.append(latents_BSR, context.valid_BT)
                mask = context.cached_mask(mask, state)
                latents_BSR = state.latents.astype(q_BTNH.dtype)
            if absorb is None:
                absorb = self._absorbing_is_cheaper(x_BTD.shape[1], latents_BSR.shape[1])
            if absorb:
                # W_UKᵀ q, [B, T, N, R]: the query for the latents.
                q_BTNH = jnp.einsum("BTNH,RNH->BTNR", q_BTNH, self.key_up.kernel[...].astype(q_BTNH.dtype))
                k, v = latents_BSR[:, :, None], latents_BSR[:, :, None, :R]
            else:
                c_BSR, turned_BSP = jnp.split(latents_BSR, [R], axis=-1)
                k, v = self.key_up(c_BSR, key), self.value_up(c_BSR, key)
                turned = jnp.broadcast_to(turned_BSP[:, :, None], (*k.shape[:3], P))
                k = constrain(jnp.concatenate([k, turned], axis=-1), "batch", "seq", "heads", "head_dim")
                v = constrain(v, "batch", "seq", "heads", "head_dim")
            out_BTNC, weights = attend(
                jnp.concatenate([q_BTNH, turned_BTNP], axis=-1), k, v, mask, scale=(H + P) ** -0.5,
                score_mod=context.scores(None, c.num_heads),
                dropout_rate=self.dropout_rate, dropout_key=context.key, backend=c.backend,
                return_weights=context.return_weights,
            )  # fmt: skip
            if state is not None:
                out_BTNC = nan_on_overflow(out_BTNC, state)
            if absorb:
                # The weighted latents are expanded, instead of the values.
                out_BTNC = jnp.einsum("BTNR,RNC->BTNC", out_BTNC, self.value_up.kernel[...].astype(out_BTNC.dtype))
            return constrain(self.out(context.at("heads", out_BTNC), key), "batch", "stream", None), state, weights

    def make_state(self, batch_size: int, max_length: int) -> LatentCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens: R + P numbers per token."""
        return LatentCache.empty(batch_size, max_length, self.sizes.latent_dim + self.sizes.rotary_dim, self.down.dtype)

    def _queries(self, x_BTD: Array, turn: Callable[[Array], Array], key: Any) -> tuple[Array, Array]:
        """Queries [B, T, N, H], and their rotary parts [B, T, N, P]."""
        if self.query_down is not None and self.query_norm is not None:
            x_BTD = self.query_norm(self.query_down(x_BTD, key))
        q = constrain(self.query(x_BTD, key), "batch", "seq", "heads", "head_dim")
        q_BTNH, turned_BTNP = jnp.split(q, [self.sizes.head_dim], axis=-1)
        return q_BTNH, turn(turned_BTNP)

    def _latents(self, x_BTD: Array, turn: Callable[[Array], Array], key: Any) -> Array:
        """What is cached, [B, T, R + P]: the latent, followed by the rotated key."""
        c_BTR, turned_BTP = jnp.split(self.down(x_BTD, key), [self.sizes.latent_dim], axis=-1)
        turned_BTP = turn(turned_BTP[:, :, None])[:, :, 0]
        return constrain(jnp.concatenate([self.norm(c_BTR), turned_BTP], axis=-1), "batch", "seq", None)

    def _absorbing_is_cheaper(self, num_queries: int, num_keys: int) -> bool:
        """Compares the multiplications per head of both forms, for T queries and S keys."""
        T, S, R, both = num_queries, num_keys, self.sizes.latent_dim, self.sizes.head_dim + self.sizes.value_dim
        return T * R * both + T * S * 2 * R < S * R * both + T * S * both
