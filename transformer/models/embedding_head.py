"""The head that gives the vector of a text: its hidden states are pooled, and layers follow on the pooled vector.

Reimers & Gurevych 2019 (Sentence-BERT), section 3; the layers are those of the library sentence-transformers.

B batch, T position, K text of a row, D embed, P pooled (D for each pooling), O out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.errors import Config, require
from transformer.layers.feed_forward import ACTIVATIONS
from transformer.layers.linear import Linear
from transformer.layers.norm import LayerNorm
from transformer.precision import einsum
from transformer.types import Array, Bool, Float, Int, widen

Pooling = Literal["cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
PoolerActivation = Literal["tanh", "relu", "gelu_exact"]
VectorActivation = Literal["identity", "tanh", "relu", "gelu_exact", "silu", "sigmoid"]
VECTOR_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "relu": ACTIVATIONS["relu"][0],
    "gelu_exact": ACTIVATIONS["gelu_exact"][0],
    "silu": ACTIVATIONS["silu"][0],
    "sigmoid": jax.nn.sigmoid,
}
_NORM_EPSILON = 1e-5
_LEAST = 1e-24
"""Square of the smallest length that a vector is divided by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseLayerConfig(Config):
    """A linear layer with an activation."""

    kind: Literal["dense"] = "dense"
    """activation(x W + b)."""
    dim: int
    """Number of outputs."""
    activation: VectorActivation = "tanh"
    """Activation after the linear layer."""
    bias: bool = True
    """A bias in the linear layer."""
    residual: bool = False
    """Add the input to the output; another linear layer, without a bias, projects it if the two differ in size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "dim", self.dim >= 1, "allowed: 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormLayerConfig(Config):
    """A layer norm with a learned gain and bias."""

    kind: Literal["layer_norm"] = "layer_norm"
    """Ba et al. 2016; 1e-5 is added to the variance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizeLayerConfig(Config):
    """Scaling to length 1."""

    kind: Literal["normalize"] = "normalize"
    """Divides a vector by its Euclidean length, so that products of vectors are cosines."""


VectorLayerConfig = DenseLayerConfig | LayerNormLayerConfig | NormalizeLayerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingHeadConfig(Config):
    """The vector of a row."""

    kind: Literal["embedding"] = "embedding"
    """A vector for each row."""
    pooling: Pooling | tuple[Pooling, ...] = "cls"
    """The vector of a row, from those of its tokens: the first (cls), the last, the largest value of each dim (max), the mean,
    the sum over the square root of the number of tokens (mean_sqrt_len), or the mean weighted by position, from 1 up
    (weighted_mean). Of several, the vectors are concatenated."""
    layers: tuple[VectorLayerConfig, ...] = (NormalizeLayerConfig(),)
    """The layers on that vector, in order, by their kind: dense, layer_norm or normalize."""
    pooler: PoolerActivation | None = None
    """Activation of a layer on the first token's vector (BERT's pooler), whose output is kept in addition to the embedding for
    fine-tuning classifiers. null: no such layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "pooling", bool(self.poolings), f"allowed: one or several of {', '.join(POOLINGS)}")

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """`pooling` as a tuple."""
        return self.pooling if isinstance(self.pooling, tuple) else (self.pooling,)

    def dim(self, embed_dim: int) -> int:
        """Size of the vectors."""
        sizes = [layer.dim for layer in self.layers if isinstance(layer, DenseLayerConfig)]
        return sizes[-1] if sizes else embed_dim * len(self.poolings)


def pool(
    hidden_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None = None, *, pooling: Pooling
) -> Float[Array, "B D"]:
    """One vector per row, of its tokens that are not padding: see `EmbeddingHeadConfig.pooling`; zeros if there are none, except
    for `cls`. The tokens begin at the first position."""
    if pooling == "cls":
        return hidden_BTD[:, 0]
    if valid_BT is None:
        if pooling == "mean":
            return hidden_BTD.mean(1)
        valid_BT = jnp.ones(hidden_BTD.shape[:2], bool)
    if pooling == "max":
        largest_BD = jnp.where(valid_BT[..., None], hidden_BTD, -jnp.inf).max(1)
        return jnp.where(valid_BT.any(1)[:, None], largest_BD, jnp.zeros_like(largest_BD))
    T = hidden_BTD.shape[1]
    weights_B1T = _weights(valid_BT[:, None], jnp.broadcast_to(jnp.arange(T), valid_BT.shape), pooling)
    sums_BD = (widen(hidden_BTD) * weights_B1T[:, 0, :, None].astype(widen(hidden_BTD).dtype)).sum(1)
    return sums_BD.astype(hidden_BTD.dtype)


def pool_packed(
    hidden_BTD: Float[Array, "B T D"],
    segments_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    pooling: Pooling,
    num_texts: int,
    first: int = 0,
) -> Float[Array, "B K D"]:
    """As `pool`, of rows with several texts each, in float32 or wider; zeros for a text that a row does not have.

    Args:
        segments_BT: which text a token belongs to, from 1 up; 0 is padding.
        positions_BT: the position of a token in its text.
        num_texts: K.
        first: the tokens before this position of a text are not pooled.
    """
    hidden_BTD = widen(hidden_BTD)
    segments_BT = jnp.where(positions_BT >= first, segments_BT, 0)
    is_own_BKT = segments_BT[:, None] == jnp.arange(1, num_texts + 1)[:, None]
    if pooling == "max":
        largest = jax.vmap(lambda x_TD, own_T: jax.ops.segment_max(x_TD, own_T, num_segments=num_texts + 1))
        found_BKD = largest(hidden_BTD, segments_BT)[:, 1:]
        return jnp.where(is_own_BKT.any(-1)[..., None], found_BKD, jnp.zeros_like(found_BKD))
    weights_BKT = _weights(is_own_BKT, positions_BT, pooling, first).astype(hidden_BTD.dtype)
    return einsum("BKT,BTD->BKD", weights_BKT, hidden_BTD)


def _weights(is_own_BKT: Array, positions_BT: Array, pooling: Pooling, first: int = 0) -> Array:
    """The weight of each token in the vector of each text, [B, K, T] float32."""
    places_B1T = positions_BT[:, None]
    if pooling == "cls":
        return (is_own_BKT & (places_B1T == first)).astype(jnp.float32)
    if pooling == "last":
        ends_BK1 = jnp.where(is_own_BKT, places_B1T, -1).max(-1, keepdims=True)
        return (is_own_BKT & (places_B1T == ends_BK1)).astype(jnp.float32)
    own_BKT = is_own_BKT.astype(jnp.float32)
    if pooling == "weighted_mean":
        own_BKT = own_BKT * (places_B1T + 1).astype(jnp.float32)
    count_BK1 = jnp.maximum(own_BKT.sum(-1, keepdims=True), 1)
    return own_BKT / (jnp.sqrt(count_BK1) if pooling == "mean_sqrt_len" else count_BK1)


def unit(x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
    """Vectors scaled to length 1, in float32 or wider; one of zeros stays so."""
    x = widen(x)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), _LEAST))


class DenseLayer(nnx.Module):
    """The layer of a `DenseLayerConfig` with `dim_in` inputs."""

    def __init__(self, dim_in: int, config: DenseLayerConfig, **options: Any) -> None:
        self.function = VECTOR_ACTIVATIONS[config.activation]
        self.is_residual = config.residual
        self.linear = Linear((dim_in,), (config.dim,), axes=(None, None), use_bias=config.bias, **options)
        self.residual: Linear | None = None
        if config.residual and dim_in != config.dim:
            projection = Linear((dim_in,), (config.dim,), axes=(None, None), use_bias=False, **options)
            self.residual = nnx.data(projection)

    def __call__(self, x: Float[Array, "*dims I"]) -> Float[Array, "*dims O"]:
        """[..., dim_in] → [..., dim], in float32 or wider."""
        y = self.function(self.linear.logits(x))
        if not self.is_residual:
            return y
        return y + (x.astype(y.dtype) if self.residual is None else self.residual.logits(x))


class EmbeddingHead(nnx.Module):
    """The vector of a text: pooling and layers. The module for layer number N of the config is the attribute `layer_N`."""

    def __init__(self, embed_dim: int, config: EmbeddingHeadConfig, **options: Any) -> None:
        self.config = config
        dim = embed_dim * len(config.poolings)
        for number, layer in enumerate(config.layers):
            if isinstance(layer, DenseLayerConfig):
                setattr(self, f"layer_{number}", DenseLayer(dim, layer, **options))
                dim = layer.dim
            elif isinstance(layer, LayerNormLayerConfig):
                setattr(self, f"layer_{number}", LayerNorm(dim, epsilon=_NORM_EPSILON, axis=None, rngs=options["rngs"]))

    def __call__(
        self, hidden_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B O"]:
        """The vector of each row, which is one text, in float32 or wider."""
        with jax.named_scope("embedding_head"):
            parts = [pool(hidden_BTD, valid_BT, pooling=pooling) for pooling in self.config.poolings]
            return self.layers(widen(jnp.concatenate(parts, -1)), self.config)

    def packed(
        self,
        hidden_BTD: Float[Array, "B T D"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        *,
        num_texts: int,
        first: int = 0,
        config: EmbeddingHeadConfig | None = None,
    ) -> Float[Array, "B K O"]:
        """The vector of each of several texts of a row, in float32 or wider.

        Args:
            segments_BT, positions_BT, num_texts, first: as for `pool_packed`.
            config: with another pooling, or another last layer, than the head's own.
        """
        config = config or self.config
        with jax.named_scope("embedding_head"):
            parts = [
                pool_packed(hidden_BTD, segments_BT, positions_BT, pooling=one, num_texts=num_texts, first=first)
                for one in config.poolings
            ]
            return self.layers(jnp.concatenate(parts, -1), config)

    def layers(self, x: Float[Array, "*dims P"], config: EmbeddingHeadConfig) -> Float[Array, "*dims O"]:
        """The layers of `config` on pooled vectors."""
        for number, layer in enumerate(config.layers):
            x = unit(x) if isinstance(layer, NormalizeLayerConfig) else getattr(self, f"layer_{number}")(x)
        return x
