"""The two ends of every Transformer: tokens with their positions at the bottom, the output projection at the top.

B batch, T position, D embed, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from transformer.layers.embedding import Embedding
from transformer.layers.linear import Linear
from transformer.layers.position import sinusoidal, token_positions
from transformer.loss import Projection
from transformer.models.config import StackConfig
from transformer.randomness import dropout, split
from transformer.sharding import constrain
from transformer.types import DTYPES, Array, Float, Int, Keys


def make_table(
    config: StackConfig,
    size: int,
    *,
    dim: int | None = None,
    axis: str | None = "vocab",
    std: float | None = None,
    rngs: nnx.Rngs,
) -> Embedding:
    """`size` rows of `dim` (by default as wide as the residual stream), normal with `std` (`config.init_std`)."""
    init = nnx.initializers.normal(config.init_std if std is None else std)
    width = config.embed_dim if dim is None else dim
    return Embedding(size, width, axes=(axis, "embed"), init=init, dtype=DTYPES[config.dtype], rngs=rngs)


def make_positions(config: StackConfig, rngs: nnx.Rngs, *, dim: int | None = None) -> Embedding | None:
    """A row for each of `max_length` positions, if the config has learned positions."""
    if config.embedded_positions != "learned":
        return None
    return make_table(config, config.max_length, dim=dim, axis=None, rngs=rngs)


def make_output(config: StackConfig, rngs: nnx.Rngs) -> Linear:
    """The output projection of a model whose embedding is not tied to it."""
    return Linear(
        (config.embed_dim,), (config.vocab_size,), axes=("embed", "vocab"), use_bias=False,
        kernel_init=nnx.initializers.normal(config.init_std), dtype=DTYPES[config.dtype], rngs=rngs,
    )  # fmt: skip


def embed(
    config: StackConfig,
    table: Embedding,
    positions: Embedding | None,
    tokens_BT: Int[Array, "B T"],
    *,
    positions_BT: Int[Array, "B T"] | None = None,
    start: int | Int[Array, ""] | Int[Array, " B"] = 0,
    scale: float | None = None,
    finish: Callable[[Array], Array] | None = None,
    key: Keys | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T"], Keys | None]:
    """Tokens with their positions added, the positions themselves, and a key for the layers above.

    Args:
        positions: the embedding of learned positions.
        positions_BT: the position of each token; from `start` on by default.
        scale: the factor of the token embeddings.
        finish: applied to the sum before dropout.
        key: enables dropout.

    Raises:
        ValueError: tokens that are not [B, T], ids beyond the vocabulary (as far as they are known before the program runs), or
            more tokens than learned positions.
    """
    check_tokens("tokens", tokens_BT, table.table.shape[0])
    B, T = tokens_BT.shape
    if positions is not None and config.max_length < T:
        raise ValueError(f"{T} tokens, but there are {config.max_length} learned positions (max_length)")
    if positions_BT is None:
        positions_BT = token_positions(B, T, start)
    embed_key, layers_key = (None, None) if key is None else split(key, 2)
    with jax.named_scope("embed"):
        x_BTD = table(tokens_BT)
        if scale is not None:
            x_BTD = x_BTD * scale
        if positions is not None:
            x_BTD += positions(positions_BT)
        elif config.embedded_positions in ("sinusoidal", "sinusoidal_halves"):
            in_halves = config.embedded_positions == "sinusoidal_halves"
            x_BTD += sinusoidal(positions_BT, x_BTD.shape[-1], in_halves=in_halves).astype(x_BTD.dtype)
        if finish is not None:
            x_BTD = finish(x_BTD)
        return dropout(constrain(x_BTD, "batch", "stream", None), config.dropout, embed_key), positions_BT, layers_key


def check_tokens(name: str, tokens: Array, vocab_size: int) -> None:
    """Raise a `ValueError` for tokens that are not [B, T], and for ids that are known while tracing and have no embedding."""
    if tokens.ndim != 2:
        raise ValueError(
            f"{name}: got shape {tokens.shape}; expected [batch, tokens], such as {name}[None] for one text"
        )
    if isinstance(tokens, jax.core.Tracer) or not tokens.size:
        return
    ids = np.asarray(tokens)
    if (least := int(ids.min())) < 0 or int(ids.max()) >= vocab_size:
        wrong = least if least < 0 else int(ids.max())
        raise ValueError(f"{name}: got id {wrong}; the vocabulary has 0 to {vocab_size - 1}")


def check_segments(segments: Array | None) -> None:
    """Raise a `ValueError` for segments that make all tokens padding, as far as they are known while tracing."""
    if segments is None or isinstance(segments, jax.core.Tracer) or not segments.size:
        return
    if not np.asarray(segments).any():
        raise ValueError("segments: all are 0, which is padding; number the documents of a row from 1")


def logits_of(table: Embedding, head: Linear | None, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Scores of each token of the vocabulary, float32: by the output projection, or, without one, by the tied table."""
    logits = table.attend(hidden_BTD) if head is None else head.logits(hidden_BTD)
    return constrain(logits.astype("float32"), "batch", "seq", "vocab")


def projection_of(
    table: Embedding, head: Linear | None, *, bias_V: Float[Array, " V"] | None = None, soft_cap: float | None = None
) -> Projection:
    """The operands of `logits_of`, for a loss in chunks."""
    kernel, dtype = (table.table, table.dtype) if head is None else (head.kernel, head.dtype)
    if head is not None and head.bias is not None:
        bias_V = head.bias[...] if bias_V is None else bias_V + head.bias[...]
    return Projection(kernel=kernel[...], is_table=head is None, bias_V=bias_V, dtype=dtype, soft_cap=soft_cap)
