"""Alignments that read a memory of fixed size, written by the encoder's states: linear attention and the delta rule.

B batch, S source position, D features of the query, E features of an encoder state, A features of a key, M features and V value
features of fast weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from transformer.alignment.source import Alignment, AlignmentBase, Source, check_dim, dim_of, projection
from transformer.attention.linear.fast_weights import fast_weights
from transformer.attention.linear.feature_maps import dpfp, elu_plus_one, unit_length
from transformer.precision import einsum
from transformer.types import Array, Bool, Float, Int, Keys, widen


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastMemoryConfig(AlignmentBase):
    """Fast weights written by the source's states."""

    kind: Literal["linear", "delta"] = "linear"
    """Linear attention (Katharopoulos et al. 2020), whose weights are positive; or the delta rule (Schlag et al. 2021)."""
    dim: int | None = None
    """Width of the keys. null: hidden_dim."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dim(self)

    def flops(self, query_dim: int, memory_dim: int, length: int) -> float:
        """FLOPs of one query that reads and one state that writes; the delta rule also recalls what it erases."""
        D, E, A = query_dim, memory_dim, dim_of(self, query_dim)
        is_delta = self.kind == "delta"
        values, features, passes = (E, 2 * A, 3) if is_delta else (E + 1, A, 2)
        return 2.0 * (E * A + D * A + passes * features * values + (E if is_delta else 0))


class FastMemoryAlignment(Alignment):
    """φ(q)ᵀ F, with F written by all states, once per source.

    Args:
        query_dim, memory_dim: D and E.
        options: kernel_init, dtype, param_dtype and rngs of the linear layers.
    """

    def __init__(self, query_dim: int, memory_dim: int, config: FastMemoryConfig, **options: Any) -> None:
        A = dim_of(config, query_dim)
        self.query = projection(query_dim, A, **options)
        self.key = projection(memory_dim, A, **options)
        self.strength = projection(memory_dim, 1, use_bias=True, **options) if config.kind == "delta" else None

    def prepare(
        self, states_BSE: Float[Array, "B S E"], valid_BS: Bool[Array, "B S"], summary_BE: Float[Array, "B E"]
    ) -> Source:
        """The states, their keys, and the fast weights that they have written."""
        keys_BSA = self.key(states_BSE)
        values_BS1V, strength_BS1, rule = widen(states_BSE)[:, :, None], None, "delta"
        if self.strength is None:
            # A value of 1 next to the others sums the denominator of the weights.
            rule = "sum"
            values_BS1V = jnp.concatenate([values_BS1V, jnp.ones_like(values_BS1V[..., :1])], axis=-1)
        else:
            strength_BS1 = jax.nn.sigmoid(widen(self.strength(states_BSE)))
        keys_BS1A = keys_BSA[:, :, None]
        # Every state writes before any query reads.
        _, fast_B1MV = fast_weights(
            keys_BS1A[:, :, :0], keys_BS1A, values_BS1V, strength_BS1, rule=rule, feature_map=self.features,
            segments_BT=valid_BS.astype(jnp.int32),
        )  # fmt: skip
        return Source(valid_BS, states_BSE, summary_BE, keys_BSA, fast_B1MV[:, 0])

    def __call__(
        self,
        query_BD: Float[Array, "B D"],
        source: Source,
        step_B: Int[Array, " B"],
        *,
        key: Keys | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B S"] | None]:
        """The context of the query. Only linear attention's weights are a distribution; the delta rule returns none."""
        assert source.fast_BMV is not None and source.keys_BSA is not None
        with jax.named_scope("source_attention"):
            query_BM = self.features(widen(self.query(query_BD)))
            read_BV = einsum("BM,BMV->BV", query_BM, source.fast_BMV)
            if self.strength is not None:
                return read_BV.astype(source.states_BSE.dtype), None
            sums_B1 = read_BV[:, -1:] + 1e-6
            weights_BS = None
            if return_weights:
                scores_BS = einsum("BM,BSM->BS", query_BM, self.features(widen(source.keys_BSA)))
                weights_BS = jnp.where(source.valid_BS, scores_BS, 0) / sums_B1
            return (read_BV[:, :-1] / sums_B1).astype(source.states_BSE.dtype), weights_BS

    def features(self, x: Array) -> Array:
        """φ: DPFP of unit length for the delta rule, 1 + elu for linear attention."""
        # The normalisation after the feature map cancels that before it, which keeps small inputs above the later one's epsilon.
        return elu_plus_one(x) if self.strength is None else unit_length(dpfp(unit_length(x)))
