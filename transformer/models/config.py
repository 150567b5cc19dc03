"""What the configs of all Transformer families share: the shape of a stack of blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from flax import nnx

from transformer.errors import Config, ConfigError, check_size, require
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.layers.position import NO_SCALING, NoPositionConfig, RelativeConfig, RotaryScaling
from transformer.mixers.disentangled import DisentangledConfig
from transformer.mixers.registry import DROPS_WEIGHTS, MixerConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.resume import Ask, Free

MlpConfig = DenseConfig | ExpertsConfig
PositionEmbedding = Literal["learned", "sinusoidal", "sinusoidal_halves", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig(Config):
    """Fields that every Transformer has; a family adds its own, and its paper's defaults."""

    usual_positions: ClassVar[PositionEmbedding] = "learned"
    """The meaning of `position_embedding: null` if attention has no positions of its own."""

    vocab_size: int = 50257
    """Number of token ids; at least the tokenizer's. A multiple of 128 runs faster on accelerators."""
    max_length: int = 1024
    """Longest context, in tokens."""
    num_layers: int = 12
    """Number of blocks."""
    embed_dim: int = 768
    """Width of the residual stream."""
    attention: MixerConfig = SoftmaxConfig()
    """The sequence mixer of each block, by its kind."""
    pattern: tuple[MixerConfig, ...] = ()
    """Mixers that repeat through the layers instead of attention, such as three of gated_delta and one of softmax. In a file, a
    mixer of attention's kind inherits the fields that it omits from attention."""
    mlp: MlpConfig = DenseConfig()
    """The feed-forward part of each block: dense, or a mixture of experts."""
    position_embedding: PositionEmbedding | None = None
    """Positions that are added to the embeddings (sinusoidal_halves: sines before cosines, as in Marian). null: the family's
    usual ones, or none if attention has positions of its own."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Kind of normalisation."""
    norm_first: bool = True
    """Normalise before each sublayer, and once at the end (pre-norm); false: after each sum (post-norm, Vaswani et al. 2017)."""
    norm_outputs: bool = False
    """Also normalise what each sublayer adds to the residual stream (with norm_first; Ding et al. 2021, Gemma 2)."""
    norm_eps: float = 1e-5
    """Added to the variance in a norm."""
    norm_bias: bool | None = None
    """Biases in layer norms. null: true for layer_norm; rms_norm has none."""
    parallel_residual: bool = False
    """Attention and feed-forward both read the same residual stream, each through its norm, and both outputs are added to it
    (GPT-J, GPT-NeoX); false: one after the other."""
    dropout: Ask[float] = 0.0
    """Drop rate after the embedding and after each sublayer."""
    attention_dropout: Ask[float] = 0.0
    """Drop rate of attention weights, in mixers that compute a softmax."""
    init_std: float = 0.02
    """Standard deviation of initial weights; for those that write to the residual stream, divided by sqrt(2 num_layers)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in. Parameters are always float32."""
    scan_layers: Free[Literal["auto"] | bool] = "auto"
    """One compiled block, scanned over the layers; false: an unrolled loop, slower to compile, and faster on a GPU. auto: there
    a loop up to 24 layers, and a scan of 4 at a time beyond; elsewhere a scan."""
    remat: Free[Literal["none", "light", "dots", "full"]] = "none"
    """What the backward pass recomputes to save memory: nothing; norms and activations; all but matrix products; all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("vocab_size", "max_length", "num_layers", "embed_dim"):
            check_size(self, field)
        for field in ("norm_eps", "init_std"):
            require(self, field, getattr(self, field) > 0, "allowed: above 0")
        for field in ("dropout", "attention_dropout"):
            require(self, field, 0 <= getattr(self, field) < 1, "allowed: 0 or more, below 1")
        holds = self.norm_bias is None or self.norm == "layer_norm"
        require(self, "norm_bias", holds, "rms_norm has no biases; allowed: null")
        for field in ("parallel_residual", "norm_outputs"):
            require(self, field, self.norm_first or not getattr(self, field), "it needs norm_first; allowed: false")
        self._check_mixers()
        self._check_positions()
        drops = any(isinstance(mixer, DROPS_WEIGHTS) for mixer in self.mixers()) or self.has_cross
        require(
            self, "attention_dropout", drops or not self.attention_dropout, "no layer computes a softmax; allowed: 0"
        )

    def _check_mixers(self) -> None:
        depths = {self.num_layers, self.decoder_layers}
        if self.pattern and any(depth % len(self.pattern) for depth in depths):
            deep = " and ".join(map(str, sorted(depths)))
            raise ConfigError(
                type(self), "num_layers", self.num_layers,
                f"pattern has {len(self.pattern)} mixers, which have to divide the layers ({deep}); allowed: a multiple",
            )  # fmt: skip
        places = {f"pattern.{number}": mixer for number, mixer in enumerate(self.pattern)} or {
            "attention": self.attention
        }
        for place, mixer in places.items():
            if (wrong := mixer.check(self.embed_dim)) is not None:
                field, allowed = wrong
                raise ConfigError(type(self), f"{place}.{field}", getattr(mixer, field), allowed)
            if mixer.causal_only and self.has_encoder:
                raise ConfigError(
                    type(self), f"{place}.kind", mixer.kind,
                    "it reads only what came before, and an encoder sees both sides; allowed: softmax, latent,"
                    " differential, disentangled, linear",
                )  # fmt: skip

    def _check_positions(self) -> None:
        own = next((kind for mixer in self.mixers() if (kind := _position_kind(mixer)) != "none"), None)
        # What is learned by distance may come on top of positions in the embeddings (MPNet, DeBERTa).
        if self.position_embedding not in (None, "none") and own not in (None, "relative"):
            raise ConfigError(
                type(self), "position_embedding", self.position_embedding,
                f"attention has positions of its own ({own}); allowed: none, or null",
            )  # fmt: skip
        if self.embedded_positions in ("sinusoidal", "sinusoidal_halves"):
            require(
                self,
                "embed_dim",
                self.embed_dim % 2 == 0,
                "sinusoidal positions need an even number; allowed: a multiple of 2",
            )
        positions = [(mixer.num_heads, getattr(mixer, "position", None)) for mixer in self.mixers()]
        shared = {(heads, position) for heads, position in positions if isinstance(position, RelativeConfig)}
        if len(shared) > 1:
            allowed = "its layers share one bias by distance; allowed: equal num_heads and position"
            raise ConfigError(type(self), "pattern", self.pattern, allowed)
        boundaries = {scaling.boundary for mixer in self.mixers() if (scaling := _scaling(mixer)).boundary}
        if len(boundaries) > 1:
            allowed = "layers with positions of kind longrope; allowed: equal original_length in all of them"
            raise ConfigError(type(self), "pattern", self.pattern, allowed)
        embeddings = {mixer.shared for mixer in self.mixers() if isinstance(mixer, DisentangledConfig)}
        if len(embeddings) + len(shared) > 1:
            allowed = (
                "its layers share one bias or one table of embeddings by distance; allowed: of kind disentangled, equal "
                "max_distance, num_buckets and norm_embeddings; of position relative, none in addition"
            )
            raise ConfigError(type(self), "pattern", self.pattern, allowed)

    @property
    def has_encoder(self) -> bool:
        """Whether some of the layers see the tokens after a token."""
        return False

    @property
    def decoder_layers(self) -> int:
        """Depth of the second stack; for a model with one stack, its depth."""
        return self.num_layers

    @property
    def has_cross(self) -> bool:
        """Whether blocks attend to a memory."""
        return False

    def mixers(self, num_layers: int | None = None) -> tuple[MixerConfig, ...]:
        """The mixer of each of `num_layers` layers (by default all of the first stack), from the first on."""
        depth = self.num_layers if num_layers is None else num_layers
        turn = self.pattern or (self.attention,)
        return tuple(turn[layer % len(turn)] for layer in range(depth))

    @property
    def cross_attention(self) -> SoftmaxConfig:
        """Config of attention to a memory, without positions and window; its heads are those of the layers' softmax attention."""
        for mixer in (self.attention, *self.pattern):
            if isinstance(mixer, SoftmaxConfig):
                return dataclasses.replace(mixer, position=NoPositionConfig(), window=None, sinks=0)
        return SoftmaxConfig(num_heads=self.attention.num_heads)

    @property
    def embedded_positions(self) -> PositionEmbedding:
        """`position_embedding` with its default filled in."""
        if self.position_embedding is not None:
            return self.position_embedding
        own = any(_position_kind(mixer) != "none" for mixer in self.mixers())
        return "none" if own else self.usual_positions

    @property
    def relative_position(self) -> tuple[int, RelativeConfig] | None:
        """Heads and config of the learned bias by distance that the layers share, or None."""
        for mixer in self.mixers():
            if isinstance(position := getattr(mixer, "position", None), RelativeConfig):
                return mixer.num_heads, position
        return None

    @property
    def relative_embedding(self) -> DisentangledConfig | None:
        """The first mixer with relative embeddings, which the layers share, or None."""
        return next((mixer for mixer in self.mixers() if isinstance(mixer, DisentangledConfig)), None)

    @property
    def position_boundary(self) -> int | None:
        """The number of tokens beyond which a text has other rotary frequencies (longrope), or None."""
        return next((scaling.boundary for mixer in self.mixers() if (scaling := _scaling(mixer)).boundary), None)

    @property
    def has_norm_bias(self) -> bool:
        """`norm_bias` with its default filled in."""
        return self.norm == "layer_norm" and self.norm_bias is not False

    def initialisers(self, num_layers: int) -> tuple[Any, Any]:
        """Initialisers of kernels, and of those that write to the residual stream, a sum over layers (Radford et al. 2019)."""
        init = nnx.initializers.normal(self.init_std)
        return init, nnx.initializers.normal(self.init_std / (2 * num_layers) ** 0.5) if self.norm_first else init


def stack_flops(config: StackConfig, length: int, *, causal: bool, num_layers: int | None = None) -> float:
    """FLOPs of one token in a stack at context `length`, without embedding and head.

    A multiply-add counts as two; softmax, norms, activations and biases by distance are not counted.
    """
    return sum(
        mixer.flops(config.embed_dim, length, causal=causal) + config.mlp.flops(config.embed_dim)
        for mixer in config.mixers(num_layers)
    )


def _scaling(mixer: MixerConfig) -> RotaryScaling:
    scaling = getattr(mixer, "scaling", None) or getattr(getattr(mixer, "position", None), "scaling", None)
    return scaling if isinstance(scaling, RotaryScaling) else NO_SCALING


def _position_kind(mixer: MixerConfig) -> str:
    if mixer.kind in ("latent", "disentangled"):
        return "rotary" if mixer.kind == "latent" else "relative"
    position = getattr(mixer, "position", None)
    return "none" if position is None else position.kind
