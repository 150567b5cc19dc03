"""Position of a token: sinusoidal and rotary positions, and attention biases by distance (ALiBi, T5).

B batch, T query position, S key position, D embed, N heads, H head_dim, R distances.

Learned positions are an `Embedding` of the position. A bias by distance is added to attention's logits: `score_mod` computes
it for a pair at a time, so that no T×S array is created; `bias` is the same as an array. Both count positions in the row, which
packing does not change: tokens of one document are as far apart as before, and other documents are masked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import Config, require
from transformer.sharding import with_axes
from transformer.types import Array, DTypeLike, Float, Int

ScoreMod = Callable[[Array, Array, Array, Array, Array], Array]
"""(score, row, head, query, key) to score, as `attend` takes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling(Config):
    """How rotary positions are extended to a context longer than the one that a model was trained with."""

    kind: Literal["none", "linear", "ntk", "yarn", "llama3", "longrope"] = "none"
    """linear: every period is longer by factor; ntk: the longer ones more; yarn, llama3: only the longest ones; longrope: each
    by a factor of its own, of which there are two sets."""
    factor: float = 1.0
    """Ratio of the new context to the original one."""
    original_length: int | None = None
    """Context that the model was trained with, in tokens; required by yarn, llama3 and longrope."""
    slow_turns: float = 1.0
    """Features that turn fewer times than this in original_length get a period longer by factor (yarn, llama3)."""
    fast_turns: float | None = None
    """Features that turn more often than this keep their period (yarn, llama3); null: 32 for yarn, 4 for llama3."""
    attention_factor: float | None = None
    """Factor of rotated queries and keys (yarn, longrope); null: 0.1 ln(factor) + 1 for yarn, and for longrope
    √(1 + ln(factor) / ln(original_length))."""
    short_factors: tuple[float, ...] = ()
    """For each rotated pair of features, how much longer its period is, in texts of up to original_length (longrope)."""
    long_factors: tuple[float, ...] = ()
    """The same in longer texts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_length = self.kind in ("yarn", "llama3", "longrope")
        require(self, "factor", self.factor >= 1, "allowed: 1 or more")
        least = 2 if self.kind == "longrope" else 1
        holds = self.original_length is None or self.original_length >= least
        require(self, "original_length", holds, f"allowed: {least} or more")
        require(
            self,
            "original_length",
            not needs_length or self.original_length is not None,
            f"{self.kind} needs it; allowed: 1 or more",
        )
        require(self, "slow_turns", self.slow_turns > 0, "allowed: above 0")
        require(self, "fast_turns", self.most_turns > self.slow_turns, f"allowed: above slow_turns ({self.slow_turns})")
        scales = self.kind in ("yarn", "longrope")
        allowed = self.attention_factor is None or (scales and self.attention_factor > 0)
        require(self, "attention_factor", allowed, "allowed: above 0, with yarn or longrope; or null")
        for field in ("short_factors", "long_factors"):
            given = getattr(self, field)
            holds = bool(given) == (self.kind == "longrope") and all(factor > 0 for factor in given)
            require(self, field, holds, "allowed: numbers above 0 with longrope, and none without it")
        count = len(self.short_factors)
        require(self, "long_factors", len(self.long_factors) == count, f"allowed: as many as short_factors ({count})")

    @property
    def most_turns(self) -> float:
        """`fast_turns` with its default filled in."""
        if self.fast_turns is not None:
            return self.fast_turns
        return 4.0 if self.kind == "llama3" else 32.0

    @property
    def magnitude(self) -> float:
        """The factor of rotated queries and keys: √(1/t) of YaRN's attention temperature t (section 3.4), or LongRoPE's."""
        if self.attention_factor is not None or self.kind not in ("yarn", "longrope"):
            return 1.0 if self.attention_factor is None else self.attention_factor
        if self.kind == "yarn" or self.factor == 1:
            return 0.1 * math.log(self.factor) + 1
        assert self.original_length is not None
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    @property
    def boundary(self) -> int | None:
        """The number of tokens beyond which a text has other frequencies; None if all texts have the same."""
        return self.original_length if self.kind == "longrope" else None


NO_SCALING = RotaryScaling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPositionConfig(Config):
    """No positions in attention: the model knows them only from the embeddings or the mask."""

    kind: Literal["none"] = "none"
    """No positions in attention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig(Config):
    """Rotary positions of queries and keys (Su et al. 2021)."""

    kind: Literal["rotary"] = "rotary"
    """Queries and keys are rotated by their positions."""
    theta: float = 10_000.0
    """Base of the frequencies θ_i = theta^(-2i/d)."""
    fraction: float = 1.0
    """Fraction of a head's features, from the first on, that are rotated (GPT-NeoX: 0.25)."""
    scaling: RotaryScaling = NO_SCALING
    """How rotary positions are extended to a longer context than the model was trained with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "theta", self.theta > 0, "allowed: above 0")
        require(self, "fraction", 0 < self.fraction <= 1, "allowed: above 0, at most 1")

    def dim(self, head_dim: int) -> int:
        """Features of a head that are rotated."""
        return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlibiConfig(Config):
    """Attention with linear biases (Press et al. 2022)."""

    kind: Literal["alibi"] = "alibi"
    """Each head's logits decrease linearly with the distance, at a fixed slope."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeConfig(Config):
    """A learned bias by distance, shared by the layers (Raffel et al. 2020, section 2.1)."""

    kind: Literal["relative"] = "relative"
    """A learned number for each range of distances is added to each head's logits."""
    num_buckets: int = 32
    """Number of ranges of distances: half of them hold a single distance each, the others widen geometrically."""
    max_distance: int = 128
    """From this distance on, in tokens, all distances share a bucket."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "num_buckets", self.num_buckets >= 4 and self.num_buckets % 4 == 0, "allowed: a multiple of 4")
        least = self.num_buckets // 2
        require(self, "max_distance", self.max_distance > least, f"allowed: above {least}")


PositionConfig = NoPositionConfig | RotaryConfig | AlibiConfig | RelativeConfig
"""How attention knows positions."""


def token_positions(
    batch_size: int, num_tokens: int, start: int | Int[Array, " B"] = 0
) -> Int[Array, "{batch_size} {num_tokens}"]:
    """`num_tokens` positions in each row, from `start` on; an array gives each row its own start."""
    first = start if isinstance(start, int) else start[:, None]
    return jnp.broadcast_to(first + jnp.arange(num_tokens), (batch_size, num_tokens))


def sinusoidal(
    positions_BT: Int[Array, "B T"], dim: int, *, theta: float = 10_000.0, in_halves: bool = False
) -> Float[Array, "B T D"]:
    """Sines in the even features and cosines in the odd ones (Vaswani et al. 2017, section 3.5), [B, T, dim], float32; or, with
    `in_halves`, all sines before all cosines."""
    angles = positions_BT[..., None].astype(jnp.float32) * rotary_frequencies(dim, theta)
    waves = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate(waves, axis=-1) if in_halves else jnp.stack(waves, axis=-1).reshape(*angles.shape[:-1], dim)


def rotary(
    x_BTNH: Float[Array, "B T N H"],
    positions_BT: Int[Array, "B T"],
    *,
    theta: float = 10_000.0,
    scaling: RotaryScaling = NO_SCALING,
    dim: int | None = None,
    length: int | None = None,
) -> Float[Array, "B T N H"]:
    """Rotate each pair (i, i + H/2) of features by an angle that grows with the position.

    Su et al. 2021, equation 34, with the pairs of GPT-NeoX: a head's first half with its second. The products of
    rotated queries and keys depend only on the distance of their positions. Angles are in float32.

    Args:
        dim: rotate only the first `dim` features, as if a head had no others; None: all.
        length: number of tokens that each row has, or will have; it decides between the frequencies of longrope. None: by the
            last position of each row.
    """
    if dim is not None and dim < x_BTNH.shape[-1]:
        turned = rotary(x_BTNH[..., :dim], positions_BT, theta=theta, scaling=scaling, length=length)
        return jnp.concatenate([turned, x_BTNH[..., dim:]], axis=-1)
    frequencies: Array | np.ndarray = rotary_frequencies(x_BTNH.shape[-1], theta, scaling, length=length)
    if scaling.boundary is not None and length is None:
        is_long_B11 = positions_BT.max(axis=1)[:, None, None] >= scaling.boundary
        beyond = rotary_frequencies(x_BTNH.shape[-1], theta, scaling, length=scaling.boundary + 1)
        frequencies = jnp.where(is_long_B11, beyond, frequencies)
    angles = (positions_BT[..., None].astype(jnp.float32) * frequencies)[:, :, None, :]  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling.magnitude != 1:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def rotary_frequencies(
    dim: int, theta: float = 10_000.0, scaling: RotaryScaling = NO_SCALING, *, length: int | None = None
) -> Float[np.ndarray, " half"]:
    """Radians by which each pair of features turns from one position to the next, [dim/2] in float32.

    θ_i = theta^(-2i/dim), so that the periods run geometrically from 2π to 2π·theta; with s = factor:

    - linear: θ_i / s, which is position interpolation (Chen et al. 2023, equation 4);
    - ntk: theta · s^(dim/(dim-2)) in place of theta, so that the fastest pair is unchanged and the slowest
      turns s times more slowly (bloc97 2023; Peng et al. 2023, section 3.1);
    - yarn: (1 - γ_i) θ_i / s + γ_i θ_i, γ_i from 0 to 1 between `slow_turns` and `fast_turns` in the old context (Peng et al.
      2023, section 3.2). As in its authors' code, and so in published checkpoints, γ is linear in i, between whole numbers;
    - llama3: the same with γ linear in the number of turns, as in YaRN's paper (Llama Team 2024);
    - longrope: θ_i / λ_i, with λ = `long_factors` for texts longer than `original_length`, else `short_factors` (Ding et al.
      2024, section 3.2).

    Args:
        length: number of tokens of a text; None: no more than `original_length`.

    Raises:
        ValueError: an odd `dim`, or another number of factors than pairs.
    """
    if dim % 2:
        raise ValueError(f"positions of sines and cosines need an even dim; got {dim}")
    if scaling.kind == "ntk":
        theta *= scaling.factor ** (dim / max(dim - 2, 1))
    frequencies = theta ** (-np.arange(0, dim, 2) / dim)
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.boundary is not None:
        factors = scaling.short_factors if (length or 0) <= scaling.boundary else scaling.long_factors
        if len(factors) != len(frequencies):
            raise ValueError(f"longrope: {len(factors)} factors for {len(frequencies)} pairs of features")
        frequencies = frequencies / np.asarray(factors)
    elif scaling.kind in ("yarn", "llama3"):
        keep = _kept(frequencies, theta, scaling)
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    return frequencies.astype(np.float32)


def _kept(frequencies: np.ndarray, theta: float, scaling: RotaryScaling) -> np.ndarray:
    """γ: the fraction of each frequency that is kept, from 0 (turns slowly, fully interpolated) to 1."""
    length = scaling.original_length
    assert length is not None
    turns = length * frequencies / (2 * math.pi)
    few, many = scaling.slow_turns, scaling.most_turns
    if scaling.kind == "llama3":
        return np.clip((turns - few) / (many - few), 0, 1)
    dim = 2 * len(frequencies)

    def pair_with(turns: float) -> float:
        return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_with(many)), 0), min(math.ceil(pair_with(few)), dim - 1)
    return 1 - np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)


@dataclasses.dataclass(frozen=True)
class Alibi:
    """Attention with linear biases: each head's logits decrease with the distance, at its own slope (Press et al. 2022).

    The bias is -m |t - s|; section 3 of the paper defines it for the keys before a query.
    """

    num_heads: int

    def slopes(self, heads: Int[Array, ...]) -> Float[Array, ...]:
        """Slopes of heads 0, 1, ...: 2^(-8/N), 2^(-16/N), ... 2^(-8). If N is not a power of two, those for the next lower power,
        followed by every other one for the next higher power."""
        power = 2 ** math.floor(math.log2(self.num_heads))
        heads = heads.astype(jnp.float32)
        return jnp.exp2(-8 / power * jnp.where(heads < power, heads + 1, heads - power + 0.5))

    def bias(
        self, num_queries: int, num_keys: int, offset: int | Int[Array, " B"] = 0
    ) -> Float[Array, "B_ N {num_queries} {num_keys}"]:
        """The bias as an array, for one row or one for each offset; query t is at key position `offset + t`."""
        distances = jnp.abs(_distances(num_queries, num_keys, offset)).astype(jnp.float32)
        return -self.slopes(jnp.arange(self.num_heads))[:, None, None] * distances

    def score_mod(self, offset: int | Int[Array, " B"] = 0) -> ScoreMod:
        """The bias as a function for `attend`. Query t is at key position `offset + t`; in decoding, `offset` is the length of
        each row's cache."""

        def score_mod(score: Array, row: Array, head: Array, query: Array, key: Array) -> Array:
            distance = jnp.abs(key - query - _of_row(offset, row))
            return score - (self.slopes(head) * distance.astype(jnp.float32)).astype(score.dtype)

        return score_mod


class RelativePosition(nnx.Module):
    """A learned bias by distance, which all layers share: distances fall into buckets, each with a number for every head.

    Raffel et al. 2020, section 2.1.

    Args:
        num_buckets: half of them for single distances, half for ranges that widen geometrically; if bidirectional, half
            of all for the keys after a query.
        max_distance: from this distance on, all distances share a bucket.
        bidirectional: distinguish the keys after a query; otherwise they all count as distance 0.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool,
        init: Callable[..., Array],
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _check_buckets(num_buckets, max_distance, bidirectional)
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        # One bucket per row.
        table = with_axes(init, None, "heads")(rngs.params(), (num_buckets, num_heads), param_dtype)
        self.table = nnx.Param(table)

    def by_distance(self) -> Float[Array, "N R"]:
        """Each head's bias at the distances -max_distance to max_distance, of key to query."""
        distances = np.arange(-self.max_distance, self.max_distance + 1)
        buckets = relative_buckets(distances, self.num_buckets, self.max_distance, bidirectional=self.bidirectional)
        return self.table[...][buckets].T

    def bias(
        self, num_queries: int, num_keys: int, offset: int | Int[Array, " B"] = 0
    ) -> Float[Array, "B_ N {num_queries} {num_keys}"]:
        """The bias as an array, for one row or one for each offset; query t is at key position `offset + t`."""
        return jnp.moveaxis(self.by_distance()[:, self._index(_distances(num_queries, num_keys, offset)[:, 0])], 0, 1)

    def score_mod(self, offset: int | Int[Array, " B"] = 0) -> ScoreMod:
        """The bias as a function for `attend`. Query t is at key position `offset + t`; in decoding, `offset` is the length of
        each row's cache."""
        by_distance_NR = self.by_distance()

        def score_mod(score: Array, row: Array, head: Array, query: Array, key: Array) -> Array:
            index = self._index(key - query - _of_row(offset, row))
            return score + by_distance_NR[head, index].astype(score.dtype)

        return score_mod

    def _index(self, distance: Array) -> Array:
        return jnp.clip(distance, -self.max_distance, self.max_distance) + self.max_distance


def relative_buckets(
    distances: Int[np.ndarray, ...], num_buckets: int, max_distance: int, *, bidirectional: bool
) -> Int[np.ndarray, ...]:
    """T5's bucket for each distance of a key from a query (Raffel et al. 2020), which is negative for keys before the query."""
    first: int | np.ndarray = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets * (distances > 0)
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    exact = num_buckets // 2
    # In float32 as the model's authors compute it, since some boundaries are at whole numbers.
    ratio = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    wide = (ratio / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)).astype(np.int64)
    return first + np.where(distances < exact, distances, np.minimum(exact + wide, num_buckets - 1))


def _check_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    """Raise a `ValueError` for invalid buckets."""
    step = 4 if bidirectional else 2
    if num_buckets < step or num_buckets % step:
        raise ValueError(f"relative positions: num_buckets={num_buckets}; expected a multiple of {step}")
    if max_distance <= num_buckets // step:
        raise ValueError(f"relative positions: max_distance={max_distance}; expected above {num_buckets // step}")


def _distances(num_queries: int, num_keys: int, offset: int | Array) -> Int[Array, "B_ 1 T S"]:
    """Key position minus query position."""
    first = jnp.asarray(offset, jnp.int32).reshape(-1, 1, 1, 1)
    return jnp.arange(num_keys) - (first + jnp.arange(num_queries)[:, None])


def _of_row(offset: int | Array, row: Array) -> int | Array:
    return offset if isinstance(offset, int) else offset[row]
