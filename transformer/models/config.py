"""What the configs of all Transformer families have in common: the shape of a stack of blocks."""

from __future__ import annotations

import dataclasses
from typing import Literal

from transformer.errors import require
from transformer.layers.feed_forward import ACTIVATIONS
from transformer.layers.position import RotaryScaling

Activation = Literal["relu", "gelu", "gelu_exact", "silu", "geglu", "geglu_exact", "swiglu"]
Position = Literal["learned", "sinusoidal", "sinusoidal_halves", "rotary", "alibi", "relative", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Fields that every Transformer has; a family adds its own, and its paper's defaults."""

    vocab_size: int = 50257
    """Number of token ids; at least the tokenizer's. A multiple of 128 runs faster on accelerators."""
    max_length: int = 1024
    """Longest context, in tokens."""
    num_layers: int = 12
    """Number of blocks."""
    embed_dim: int = 768
    """Width of the residual stream."""
    num_heads: int = 12
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads; num_heads must be a multiple of it. null: as many as query heads; 1: multi-query."""
    head_dim: int | None = None
    """Width of a head; null: embed_dim / num_heads."""
    mlp_dim: int | None = None
    """Width of the feed-forward layer; null: 4 embed_dim, or 8/3 embed_dim (rounded up to a multiple of 64) when gated."""
    activation: Activation = "gelu"
    """Feed-forward activation; geglu, geglu_exact and swiglu are gated. gelu and geglu have the tanh approximation, as GPT-2."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Kind of normalisation."""
    norm_first: bool = True
    """Normalise before each sublayer, and once at the end (pre-norm); false: after each sum (post-norm, Vaswani et al. 2017)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in a norm."""
    position: Position = "learned"
    """How the model knows where a token stands: added to its embedding (sinusoidal_halves: the sines before the cosines, as
    in Marian), rotary, or a bias of attention by distance that is fixed (alibi) or learned and shared by the layers
    (relative, T5's)."""
    rotary_period: float = 10_000.0
    """Longest period of rotary positions, over 2π (often called theta)."""
    rotary_fraction: float = 1.0
    """Part of a head's features, from the first on, that rotary positions rotate (GPT-NeoX: 0.25)."""
    rotary_scaling: RotaryScaling = RotaryScaling()
    """How rotary positions are stretched to a longer context than the model was trained at."""
    relative_buckets: int = 32
    """Distances that relative positions tell apart; half of them one by one, half in ranges that widen."""
    relative_distance: int = 128
    """From this distance on, in tokens, relative positions are all alike."""
    use_bias: bool = True
    """Biases in linear maps and layer norms, where the four fields below say nothing else."""
    attention_bias: bool | None = None
    """Biases in attention's linear maps; null: as use_bias."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; null: as attention_bias."""
    mlp_bias: bool | None = None
    """Biases in the feed-forward layer; null: as use_bias."""
    norm_bias: bool | None = None
    """Biases in layer norms; null: as use_bias."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same residual stream, each through its norm, and are added to it together
    (GPT-J, GPT-NeoX); false: one after the other."""
    qk_norm: bool = False
    """RMS-normalise queries and keys in each head."""
    attention_soft_cap: float | None = None
    """Bound c of the attention logits: c tanh(logits / c); null: none."""
    num_experts: int = 0
    """Feed-forward networks a block chooses from for each token (a mixture of experts); 0: one, for all tokens."""
    experts_per_token: int = 1
    """How many of them a token goes to: 1 is the Switch Transformer's, 2 Mixtral's."""
    expert_capacity: float | None = None
    """Most tokens an expert takes, as a multiple of an even share; the rest pass it by. null: as many as come."""
    balance_loss: float = 0.01
    """Weight of the loss that spreads tokens evenly over the experts."""
    router_z_loss: float = 0.001
    """Weight of the loss that keeps the router's logits small."""
    dropout: float = 0.0
    """Drop rate after the embedding, in attention and after each sublayer."""
    init_std: float = 0.02
    """Standard deviation of initial weights; those that write to the residual stream get it divided by sqrt(2 num_layers)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in. Parameters are always float32."""
    attention: Literal["auto", "reference", "xla", "cudnn", "pallas", "blockwise", "ring", "ulysses"] = "auto"
    """Attention backend; a named one that cannot run stops the program."""
    scan_layers: bool = True
    """One compiled block, scanned over the layers; false: an unrolled loop (slower to compile)."""
    remat: Literal["none", "light", "dots", "full"] = "none"
    """What the backward pass computes again to save memory: nothing; norms and activations; all but matrix products; all."""

    def __post_init__(self) -> None:
        for field in ("vocab_size", "max_length", "num_layers", "embed_dim", "num_heads", "experts_per_token"):
            require(self, field, getattr(self, field) >= 1, "allowed: 1 or more")
        for field in ("num_kv_heads", "head_dim", "mlp_dim"):
            require(
                self, field, getattr(self, field) is None or getattr(self, field) >= 1, "allowed: 1 or more, or null"
            )
        for field in ("attention_soft_cap", "expert_capacity"):
            require(self, field, getattr(self, field) is None or getattr(self, field) > 0, "allowed: above 0, or null")
        for field in ("norm_epsilon", "init_std", "rotary_period"):
            require(self, field, getattr(self, field) > 0, "allowed: above 0")
        for field in ("num_experts", "balance_loss", "router_z_loss"):
            require(self, field, getattr(self, field) >= 0, "allowed: 0 or more")
        require(
            self, "experts_per_token", self.experts_per_token <= max(self.num_experts, 1),
            f"there are num_experts = {self.num_experts}",
        )  # fmt: skip
        require(self, "rotary_fraction", 0 < self.rotary_fraction <= 1, "allowed: above 0, at most 1")
        require(self, "parallel_residual", self.norm_first or not self.parallel_residual, "it needs norm_first")
        require(self, "dropout", 0 <= self.dropout < 1, "allowed: 0 or more, below 1")
        require(
            self, "num_heads", self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            f"it must divide embed_dim ({self.embed_dim}), or set head_dim",
        )  # fmt: skip
        require(
            self, "num_kv_heads", self.num_heads % self.kv_heads == 0, f"it must divide num_heads ({self.num_heads})"
        )
        self._check_positions()

    def _check_positions(self) -> None:
        if self.position == "rotary":
            rotated = self.dim_of_rotary
            require(self, "head_dim", rotated % 2 == 0 and rotated > 0, f"rotary needs an even one (it is {rotated})")
        require(
            self, "rotary_scaling", self.rotary_scaling.kind == "none" or self.position == "rotary",
            f"it needs position: rotary (it is {self.position})",
        )  # fmt: skip
        if self.position == "relative":
            require(
                self, "relative_buckets", self.relative_buckets >= 2 and self.relative_buckets % 2 == 0,
                "allowed: an even number",
            )  # fmt: skip
            least = self.relative_buckets // 2
            require(self, "relative_distance", self.relative_distance > least, f"allowed: above {least}")
        if self.position in ("sinusoidal", "sinusoidal_halves"):
            require(self, "embed_dim", self.embed_dim % 2 == 0, "sinusoidal positions need an even one")

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads` with its default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def dim_of_head(self) -> int:
        """`head_dim` with its default filled in."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def dim_of_rotary(self) -> int:
        """Features of a head that rotary positions rotate."""
        return int(self.dim_of_head * self.rotary_fraction)

    def has_bias(self, part: Literal["qkv", "attention", "mlp", "norm"]) -> bool:
        """Whether that part has biases, `use_bias` filled in; `attention` is the way out of it, `qkv` the ways in."""
        of_attention = self.use_bias if self.attention_bias is None else self.attention_bias
        chosen, otherwise = {
            "qkv": (self.qkv_bias, of_attention),
            "attention": (self.attention_bias, self.use_bias),
            "mlp": (self.mlp_bias, self.use_bias),
            "norm": (self.norm_bias, self.use_bias),
        }[part]
        return otherwise if chosen is None else chosen

    @property
    def dim_of_mlp(self) -> int:
        """`mlp_dim` with its default filled in."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        gated = ACTIVATIONS[self.activation][1]
        return -(-8 * self.embed_dim // (3 * 64)) * 64 if gated else 4 * self.embed_dim


def attention_flops(config: StackConfig, seen: float) -> float:
    """Of one token's attention in one layer, its projections included, where it sees so many keys.

    A multiply-add counts as two; softmax, norms and biases by distance are left out.
    """
    width = config.num_heads * config.dim_of_head
    projections = 2 * config.embed_dim * (2 * width + 2 * config.kv_heads * config.dim_of_head)
    return projections + 2 * 2 * seen * width


def feed_forward_flops(config: StackConfig) -> float:
    """Of one token's feed-forward network in one layer; in a mixture, of the experts that it goes to and of the router."""
    matrices = 3 if ACTIVATIONS[config.activation][1] else 2
    one = 2.0 * matrices * config.embed_dim * config.dim_of_mlp
    return one if not config.num_experts else config.experts_per_token * one + 2 * config.embed_dim * config.num_experts
