"""Settings of a recurrent translator, and the widths that follow from them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from transformer.alignment.registry import AlignmentConfig
from transformer.alignment.scored import AdditiveConfig
from transformer.errors import Config, ConfigError, check_size, require
from transformer.resume import Ask, Free


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig(Config):
    """The defaults are near RNNsearch-50 (Bahdanau et al. 2014)."""

    family: Literal["recurrent"] = "recurrent"
    """Kind of model."""
    source_vocab_size: int = 30_000
    """Number of the source's token ids."""
    vocab_size: int = 30_000
    """Number of the target's token ids. A multiple of 128 runs faster on accelerators."""
    max_length: int = 50
    """Longest source and longest target, in tokens."""
    cell: Literal["gru", "lstm"] = "gru"
    """Recurrent unit of encoder and decoder."""
    style: Literal["bahdanau", "luong"] = "bahdanau"
    """bahdanau: the decoder's state before a step attends to the source, and the context is an input of the step; luong: the
    state after the step attends, and the context and the state form an attentional state."""
    attention: AlignmentConfig = AdditiveConfig()
    """The kind of attention to the source."""
    embed_dim: int = 620
    """Width of the embeddings, and of the maxout or tanh layer before the output in style bahdanau."""
    hidden_dim: int = 1000
    """Width of the decoder's state."""
    encoder_dim: int | None = None
    """Width of the encoder's state, in each direction; null: hidden_dim, but half of it for both directions in style luong."""
    num_layers: int = 1
    """Number of recurrent layers, in the encoder and in the decoder."""
    bidirectional: bool = True
    """The encoder reads the source in both directions."""
    input_feeding: bool = True
    """In style luong, the attentional state is a part of the next step's input."""
    readout: Literal["maxout", "tanh"] = "maxout"
    """In style bahdanau, the layer before the output."""
    dropout: Ask[float] = 0.0
    """Drop rate of embeddings, between layers and before the output; recurrent connections have no dropout."""
    init_std: float = 0.05
    """Standard deviation of initial weights; recurrent weights are initialised as orthogonal."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in. Parameters and recurrent states are always float32."""
    remat: Free[Literal["none", "full"]] = "none"
    """What the backward pass recomputes to save memory: nothing; each step of the decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("source_vocab_size", "vocab_size", "max_length", "embed_dim", "hidden_dim", "num_layers"):
            check_size(self, field)
        holds = self.encoder_dim is None or self.encoder_dim >= 1
        require(self, "encoder_dim", holds, "allowed: 1 or more, or null")
        require(self, "init_std", self.init_std > 0, "allowed: above 0")
        require(self, "dropout", 0 <= self.dropout < 1, "allowed: 0 or more, below 1")
        require(
            self, "hidden_dim", self.encoder_dim is not None or self.style == "bahdanau" or not self.bidirectional
            or self.hidden_dim % 2 == 0, "the encoder's two directions share it; allowed: an even number, or set encoder_dim",
        )  # fmt: skip
        if (wrong := self.attention.check(self.hidden_dim, self.memory_dim)) is not None:
            raise ConfigError(type(self), "attention.kind", self.attention.kind, wrong)

    @property
    def dim_of_encoder(self) -> int:
        """`encoder_dim` with its default filled in."""
        if self.encoder_dim is not None:
            return self.encoder_dim
        return self.hidden_dim // 2 if self.style == "luong" and self.bidirectional else self.hidden_dim

    @property
    def memory_dim(self) -> int:
        """Width of an encoder state, both directions taken together."""
        return self.dim_of_encoder * (2 if self.bidirectional else 1)

    @property
    def copies_states(self) -> bool:
        """Whether the decoder starts from the encoder's own states: in style luong, if their widths are equal."""
        return self.style == "luong" and self.memory_dim == self.hidden_dim

    @property
    def bridge_dim(self) -> int:
        """Width of what the decoder's first state is computed from, where it is not a copy."""
        return self.dim_of_encoder if self.style == "bahdanau" else self.memory_dim

    @property
    def fed_dim(self) -> int:
        """Width of a step's input in addition to the token: the context, or the last attentional state."""
        if self.style == "bahdanau":
            return self.memory_dim
        return self.hidden_dim if self.input_feeding else 0

    @property
    def combined_dim(self) -> int:
        """Width of what the layer before the output reads."""
        return self.hidden_dim + self.memory_dim + (self.embed_dim if self.style == "bahdanau" else 0)
