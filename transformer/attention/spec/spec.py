"""The specification of a softmax attention: its mask, its scores, its dropout. Every backend computes the same function.

B batch, T query position, S key position, N query heads.

    logits  = bias + c·tanh(scale·q kᵀ / c), then score_mod
    weights = dropout(softmax(logits where the mask allows))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.mods import Mod
from transformer.attention.spec.tile import Tile, plane_filled
from transformer.randomness import dropout_mask
from transformer.types import Array, Bool, Float, wide

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Score:
    """Turns the product of a query and a key into a logit."""

    scale: float = dataclasses.field(metadata=_STATIC)
    soft_cap: float | None = dataclasses.field(default=None, metadata=_STATIC)
    """c·tanh(logit / c) bounds the logits smoothly (Gemma Team 2024, section 2)."""
    bias_BNTS: Any = None
    """An array [B_, N_, T_, S_], or None; the annotation is not more specific, since JAX also puts placeholders here."""
    mod: Mod | None = None

    @staticmethod
    def of(
        q_BTNH: Float[Array, "B T N H"],
        bias_BNTS: Float[Array, "B_ N_ T_ S_"] | None = None,
        *,
        score_mod: Callable[..., Any] | None = None,
        scale: float | None = None,
        logit_soft_cap: float | None = None,
    ) -> Score:
        """The score of a call of `attend` with these queries; arguments as there."""
        scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
        mod = None if score_mod is None else Mod.score(score_mod, wide(q_BTNH.dtype))
        return Score(scale, logit_soft_cap, bias_BNTS, mod)

    @property
    def is_plain(self) -> bool:
        """Whether it only scales the products."""
        return self.soft_cap is None and self.bias_BNTS is None and self.mod is None

    def __call__(self, products_BNTS: Float[Array, "B N T S"], tile: Tile) -> Float[Array, "B N T S"]:
        """Logits of a tile of products."""
        return self._logits(products_BNTS, self._learned(tile), tile)

    def pullback(
        self, products_BNTS: Float[Array, "B N T S"], dlogits_BNTS: Float[Array, "B N T S"], tile: Tile
    ) -> tuple[Float[Array, "B N T S"], list[Array]]:
        """Gradients of a tile's products, and this tile's contribution to the gradients of the score's own arrays."""
        if self.is_plain:
            return dlogits_BNTS * self.scale, []
        _, pull = jax.vjp(
            lambda products, learned: self._logits(products, learned, tile), products_BNTS, self._learned(tile)
        )
        return pull(dlogits_BNTS)

    def zero_gradients(self) -> list[Array]:
        """Zeros to which the gradients of the score's own arrays are added, in the order of `pullback`."""
        bias = [] if self.bias_BNTS is None else [self.bias_BNTS]
        return [jnp.zeros_like(array) for array in bias + self._floats()]

    def add_gradients(self, total: list[Array], part: list[Array], tile: Tile) -> list[Array]:
        """The sums with a tile's contribution added."""
        if self.bias_BNTS is None:
            return [one + other for one, other in zip(total, part, strict=True)]
        places = (
            0,
            0,
            tile.queries.start if self.bias_BNTS.shape[2] > 1 else 0,
            tile.keys.start if self.bias_BNTS.shape[3] > 1 else 0,
        )
        so_far = jax.lax.dynamic_slice(total[0], places, part[0].shape)
        bias = jax.lax.dynamic_update_slice(total[0], so_far + part[0], places)
        return [bias, *(one + other for one, other in zip(total[1:], part[1:], strict=True))]

    def cotangent(self, total: list[Array]) -> Score:
        """The gradients in the structure of the score; None, which JAX takes as no gradient, for everything else."""
        leaves, structure = jax.tree.flatten(self)
        rest = iter(total)
        return jax.tree.unflatten(structure, [next(rest) if _is_float(leaf) else None for leaf in leaves])

    def padded(self, num_queries: int, num_keys: int) -> Score:
        """The same score with its bias padded to these numbers of queries and keys."""
        if self.bias_BNTS is None:
            return self
        return dataclasses.replace(self, bias_BNTS=plane_filled(self.bias_BNTS, num_queries, num_keys))

    def _floats(self) -> list[Array]:
        return [] if self.mod is None else [array for array in self.mod.captured if _is_float(array)]

    def _learned(self, tile: Tile) -> list[Array]:
        bias = [] if self.bias_BNTS is None else [tile.cut(self.bias_BNTS)]
        return bias + self._floats()

    def _logits(self, products: Array, learned: list[Array], tile: Tile) -> Array:
        logits, rest = products * self.scale, iter(learned)
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        if self.bias_BNTS is not None:
            logits += next(rest).astype(logits.dtype)
        if self.mod is not None:
            captured = [next(rest) if _is_float(array) else array for array in self.mod.captured]
            logits = Mod(self.mod.program, captured)(tile, logits)
        return logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Weights set to zero at `rate`, the others scaled up to compensate (Srivastava et al. 2014)."""

    seeds_B2: Any
    """Of each row (`transformer.randomness.seeds_of`)."""
    rate: float = dataclasses.field(metadata=_STATIC)

    def __call__(self, weights_BNTS: Float[Array, "B N T S"], tile: Tile) -> Float[Array, "B N T S"]:
        """The weights of a tile with some dropped: which ones depends on their row, head, query and key alone."""
        _, heads, queries, keys = (index[0] for index in tile.indices)
        is_kept, scale = dropout_mask(self.seeds_B2, self.rate, heads, queries, keys)
        return jnp.where(is_kept, weights_BNTS * jnp.asarray(scale, weights_BNTS.dtype), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """A softmax attention without its inputs."""

    mask: AttentionMask
    score: Score
    dropout: Dropout | None = None

    def logits(
        self, products_BNTS: Float[Array, "B N T S"], tile: Tile
    ) -> tuple[Float[Array, "B N T S"], Bool[Array, "B_ N_ T_ S_"] | None]:
        """A tile's logits, with a finite floor where the mask forbids a pair, and the mask."""
        logits, allowed = self.score(products_BNTS, tile), self.mask.allowed(tile)
        if allowed is None:
            return logits, None
        # A finite floor keeps a row with no key free of NaN, in the gradient too.
        return jnp.where(allowed, logits, jnp.finfo(logits.dtype).min), allowed


def _is_float(array: Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))
