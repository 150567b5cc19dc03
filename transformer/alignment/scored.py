"""Alignments that score each state: the context is the mean of the states, weighted by normalised scores.

B batch, S source position, D features of the query, E features of an encoder state, A alignment features.

    additive, concat    e = vᵀ tanh(W q + U k)     Bahdanau et al. 2014, appendix A.1.2; Luong et al. 2015, equation 8
    dot, general        e = qᵀ k, e = qᵀ W k       Luong et al. 2015, equation 8
    local_m, local_p    general, near a position   Luong et al. 2015, section 3.2
    hard                a single state             Xu et al. 2015; its gradient as in Jang et al. 2017
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from flax import nnx

from transformer.alignment.additive import additive_scores
from transformer.alignment.hard import argmax_weights, gumbel_weights
from transformer.alignment.multiplicative import dot_scores, local_weights, predicted_positions
from transformer.alignment.source import Alignment, AlignmentBase, Source, check_dim, dim_of, projection
from transformer.alignment.sparse_softmax import NORMALIZERS
from transformer.attention.common import context
from transformer.attention.spec.mask import AttentionMask
from transformer.errors import require
from transformer.types import Array, Bool, DTypeLike, Float, Int, Keys, wide, widen

Normalizer = Literal["softmax", "sparsemax", "entmax15"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoAlignmentConfig(AlignmentBase):
    """No attention: one vector, the encoder's last state, represents the source (Cho et al. 2014; Sutskever et al. 2014)."""

    kind: Literal["none"] = "none"
    """No attention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdditiveConfig(AlignmentBase):
    """A layer of tanh units scores the query with each state."""

    kind: Literal["additive", "concat"] = "additive"
    """additive: Bahdanau's score; concat: Luong's, which has no bias."""
    dim: int | None = None
    """Width of the scoring layer. null: hidden_dim."""
    normalizer: Normalizer = "softmax"
    """Turns scores into weights. sparsemax and entmax15 give most states a weight of exactly zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dim(self)

    def flops(self, query_dim: int, memory_dim: int, length: int) -> float:
        """FLOPs of one query, and of one state's key."""
        return _additive_flops(dim_of(self, query_dim), query_dim, memory_dim, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiplicativeConfig(AlignmentBase):
    """A product scores the query with each state."""

    kind: Literal["dot", "general"] = "dot"
    """dot: the plain product, which needs equal widths; general: with a matrix between query and state."""
    normalizer: Normalizer = "softmax"
    """Turns scores into weights. sparsemax and entmax15 give most states a weight of exactly zero."""

    def check(self, query_dim: int, memory_dim: int) -> str | None:
        """Why this kind cannot handle queries and states of these widths, or None."""
        if self.kind == "general" or query_dim == memory_dim:
            return None
        return (
            f"the encoder's states ({memory_dim} wide) are not as wide as hidden_dim ({query_dim}); allowed: 'general', or "
            "an equal width, which encoder_dim sets for each direction"
        )

    def flops(self, query_dim: int, memory_dim: int, length: int) -> float:
        """FLOPs of one query: its projection, the scores and the mean."""
        return 2.0 * ((query_dim * memory_dim if self.kind == "general" else 0) + 2 * length * memory_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig(AlignmentBase):
    """Attention to a window of states, with the score of general."""

    kind: Literal["local_m", "local_p"] = "local_m"
    """local_m: the window is centred on the step's number; local_p: on a position predicted from the query, and the weights
    decay with the distance from it."""
    window: int = 10
    """Number of states in the window on each side of its centre."""
    dim: int | None = None
    """Width of the layer that predicts the position in local_p. null: hidden_dim."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "window", self.window >= 1, "allowed: 1 or more")
        check_dim(self)
        require(self, "dim", self.dim is None or self.kind == "local_p", "local_m predicts nothing; allowed: null")

    def flops(self, query_dim: int, memory_dim: int, length: int) -> float:
        """FLOPs of one query, for a full window."""
        D, E, A = query_dim, memory_dim, dim_of(self, query_dim)
        seen = min(2 * self.window + 1, length)
        return 2.0 * (D * E + 2 * seen * E + (D * A + A if self.kind == "local_p" else 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardConfig(AlignmentBase):
    """Attention to a single state, with the score of additive: drawn in training, the most likely one otherwise."""

    kind: Literal["hard"] = "hard"
    """Attention to a single state."""
    dim: int | None = None
    """Width of the scoring layer. null: hidden_dim."""
    temperature: float = 1.0
    """Temperature of the relaxed draw that provides the gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dim(self)
        require(self, "temperature", self.temperature > 0, "allowed: above 0")

    def flops(self, query_dim: int, memory_dim: int, length: int) -> float:
        """FLOPs of one query, and of one state's key."""
        return _additive_flops(dim_of(self, query_dim), query_dim, memory_dim, length)


class LastState(Alignment):
    """Returns the encoder's last state for every query."""

    def __init__(self, query_dim: int, memory_dim: int, config: NoAlignmentConfig, **options: Any) -> None:
        pass

    def __call__(
        self,
        query_BD: Float[Array, "B D"],
        source: Source,
        step_B: Int[Array, " B"],
        *,
        key: Keys | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B E"], None]:
        """The last state, and no weights."""
        return source.summary_BE, None


class ScoredAlignment(Alignment):
    """The mean of the states, weighted by normalised scores. A subclass defines the scores, and may define other weights."""

    config: Any

    def scores(self, query_B1D: Float[Array, "B 1 D"], source: Source) -> Float[Array, "B 1 S"]:
        """The score of the query with each state."""
        raise NotImplementedError

    def weights(
        self,
        query_B1D: Float[Array, "B 1 D"],
        source: Source,
        step_B: Int[Array, " B"],
        key: Keys | None,
    ) -> Float[Array, "B 1 S"]:
        """The weight of each state, in float32 or wider: the scores, normalised by the config's `normalizer`."""
        return NORMALIZERS[self.config.normalizer](self.scores(query_B1D, source), source.valid_BS[:, None])

    def __call__(
        self,
        query_BD: Float[Array, "B D"],
        source: Source,
        step_B: Int[Array, " B"],
        *,
        key: Keys | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B S"] | None]:
        """The context, and the weights if asked for."""
        with jax.named_scope("source_attention"):
            weights_B1S = self.weights(query_BD[:, None], source, step_B, key)
            return context(weights_B1S, source.states_BSE)[:, 0], weights_B1S[:, 0] if return_weights else None


class AdditiveAlignment(ScoredAlignment):
    """vᵀ tanh(W q + U k), with U k computed once per source.

    Args:
        query_dim, memory_dim: D and E.
        options: kernel_init, dtype, param_dtype and rngs of the linear layers.
    """

    def __init__(self, query_dim: int, memory_dim: int, config: AdditiveConfig | HardConfig, **options: Any) -> None:
        self.config = config
        A = dim_of(config, query_dim)
        self.query = projection(query_dim, A, use_bias=config.kind != "concat", **options)
        self.key = projection(memory_dim, A, **options)
        # It is read as it is kept (`additive_scores`).
        self.vector = projection(A, **options | {"dtype": wide(options.get("dtype", "float32"))})

    def prepare(
        self, states_BSE: Float[Array, "B S E"], valid_BS: Bool[Array, "B S"], summary_BE: Float[Array, "B E"]
    ) -> Source:
        """The states, and U k of each."""
        return Source(valid_BS, states_BSE, summary_BE, self.key(states_BSE))

    def scores(self, query_B1D: Float[Array, "B 1 D"], source: Source) -> Float[Array, "B 1 S"]:
        """vᵀ tanh(W q + U k)."""
        assert source.keys_BSA is not None
        return additive_scores(self.query(query_B1D), source.keys_BSA, self.vector.kernel[...])


class HardAlignment(AdditiveAlignment):
    """Attention to a single state, scored as in `AdditiveAlignment`."""

    def weights(
        self,
        query_B1D: Float[Array, "B 1 D"],
        source: Source,
        step_B: Int[Array, " B"],
        key: Keys | None,
    ) -> Float[Array, "B 1 S"]:
        """1 for a drawn state, or, without a key, for the most likely one."""
        assert isinstance(self.config, HardConfig)
        scores_B1S, allowed_B1S = self.scores(query_B1D, source), source.valid_BS[:, None]
        if key is None:
            return argmax_weights(scores_B1S, allowed_B1S)
        return gumbel_weights(scores_B1S, allowed_B1S, key=key, temperature=self.config.temperature)


class MultiplicativeAlignment(ScoredAlignment):
    """qᵀ k, or qᵀ W k.

    Args:
        query_dim, memory_dim: D and E.
        options: kernel_init, dtype, param_dtype and rngs of the linear layers.
    """

    def __init__(
        self, query_dim: int, memory_dim: int, config: MultiplicativeConfig | LocalConfig, **options: Any
    ) -> None:
        self.config = config
        self.query = None if config.kind == "dot" else projection(query_dim, memory_dim, **options)

    def scores(self, query_B1D: Float[Array, "B 1 D"], source: Source) -> Float[Array, "B 1 S"]:
        """The products of the query with each state."""
        return dot_scores(query_B1D if self.query is None else self.query(query_B1D), source.states_BSE)


class LocalAlignment(MultiplicativeAlignment):
    """Attention to a window of states, centred on the step's number or on a predicted position."""

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        config: LocalConfig,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(query_dim, memory_dim, config, dtype=dtype, rngs=rngs, **options)
        A = dim_of(config, query_dim)
        predicts = config.kind == "local_p"
        # With hundreds of states, a position in a narrow type would be off by a large part of the window.
        self.position = projection(query_dim, A, dtype=wide(dtype), rngs=rngs, **options) if predicts else None
        self.position_vector = projection(A, dtype=wide(dtype), rngs=rngs, **options) if predicts else None

    def weights(
        self,
        query_B1D: Float[Array, "B 1 D"],
        source: Source,
        step_B: Int[Array, " B"],
        key: Keys | None,
    ) -> Float[Array, "B 1 S"]:
        """Weights over the states of the window; in local_p they decay with the distance and sum to less than 1."""
        assert isinstance(self.config, LocalConfig)
        scores_B1S, mask = self.scores(query_B1D, source), AttentionMask.padding(source.valid_BS)
        if self.position is None or self.position_vector is None:
            return local_weights(scores_B1S, step_B[:, None], self.config.window, mask)
        centres_B1 = predicted_positions(
            self.position(widen(query_B1D)), self.position_vector.kernel[...], source.valid_BS.sum(-1)
        )
        return local_weights(scores_B1S, centres_B1, self.config.window, mask, gaussian=True)


def _additive_flops(dim: int, query_dim: int, memory_dim: int, length: int) -> float:
    return 2.0 * (memory_dim * dim + query_dim * dim + length * (dim + memory_dim))
