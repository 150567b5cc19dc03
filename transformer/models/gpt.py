"""GPT: a decoder-only language model, in GPT-2's shape or in a modern one, from one config.

B batch, T position, D embed, V vocab, L layers, N query heads, K key/value heads, H head_dim, F mlp.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.mask import AttentionMask
from transformer.blocks import BlockOutput
from transformer.decode.cache import KVCache
from transformer.errors import require
from transformer.layers.embedding import Embedding
from transformer.layers.linear import Linear, dropout
from transformer.layers.position import sinusoidal, token_positions
from transformer.models.config import StackConfig, attention_flops, feed_forward_flops
from transformer.models.layer_stack import Chosen, LayerStack, filled, router_loss, weights_of
from transformer.sharding import constrain
from transformer.stack import restack
from transformer.types import DTYPES, Array, Float, Int, ModelOutput, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig(StackConfig):
    """The defaults are GPT-2's small model (Radford et al. 2019); `configs/` has the modern shape."""

    family: Literal["gpt"] = "gpt"
    """Kind of model."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection too."""
    logit_soft_cap: float | None = None
    """Bound c of the output logits: c tanh(logits / c); null: none."""
    window: int | None = None
    """Each token sees this many tokens before itself; null: all of them."""
    sinks: int = 0
    """With a window, each token also sees this many tokens at the start of its document (attention sinks)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "window", self.window is None or self.window >= 1, "allowed: 1 or more, or null")
        cap = self.logit_soft_cap
        require(self, "logit_soft_cap", cap is None or cap > 0, "allowed: above 0, or null")
        require(self, "sinks", self.sinks >= 0, "allowed: 0 or more")
        require(
            self, "sinks", self.sinks == 0 or self.window is not None, "it needs a window, which sinks are seen past"
        )


Cache = KVCache | list[KVCache]
"""A model's cache with a leading L, or, for a model with its blocks apart, one cache a layer."""


class GPT(nnx.Module):
    """A decoder-only Transformer.

    Radford et al. 2019; for the modern shape Touvron et al. 2023 (rotary, RMSNorm, SwiGLU), Ainslie et al. 2023 (grouped
    queries), Dehghani et al. 2023 (QK-norm), Gemma Team 2024 (soft-cap), Xiao et al. 2023 (sinks).
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        c = config
        init = nnx.initializers.normal(c.init_std)
        self.embed = Embedding(c.vocab_size, c.embed_dim, init=init, dtype=DTYPES[c.dtype], rngs=rngs)
        self.positions = (
            Embedding(c.max_length, c.embed_dim, axes=(None, "embed"), init=init, dtype=DTYPES[c.dtype], rngs=rngs)
            if c.position == "learned"
            else None
        )
        self.layers = LayerStack(c, causal=True, rngs=rngs)
        self.head = (
            None
            if c.tie_embeddings
            else Linear(
                (c.embed_dim,), (c.vocab_size,), axes=("embed", "vocab"), use_bias=False, kernel_init=init,
                dtype=DTYPES[c.dtype], rngs=rngs,
            )
        )  # fmt: skip

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        prefix_B: Int[Array, " B"] | None = None,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | Chosen = False,
    ) -> tuple[Float[Array, "B T D"], BlockOutput | list[BlockOutput]]:
        """The last block's output after the final norm, and what the blocks gave beside it; arguments as in `__call__`."""
        c = self.config
        if self.positions is not None and tokens_BT.shape[1] > c.max_length:
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens, but there are {c.max_length} learned positions (max_length)"
            )
        embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
        if positions_BT is None:
            B, T = tokens_BT.shape
            positions_BT = token_positions(B, T, 0 if cache is None else filled(cache))
        mask = self._mask(positions_BT, segments_BT, prefix_B)
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens_BT)
            if self.positions is not None:
                x_BTD += self.positions(positions_BT)
            elif c.position == "sinusoidal":
                x_BTD += sinusoidal(positions_BT, c.embed_dim).astype(x_BTD.dtype)
            x_BTD = dropout(constrain(x_BTD, "batch", "seq", None), c.dropout, embed_key)

        return self.layers(
            x_BTD, mask, positions_BT=positions_BT, valid_BT=None if segments_BT is None else segments_BT != 0,
            cache=cache, key=stack_key, return_weights=return_weights,
        )  # fmt: skip

    def _mask(self, positions_BT: Array, segments_BT: Array | None, prefix_B: Array | None) -> AttentionMask:
        """In positions of a call; a cache moves it."""
        c = self.config
        mask = AttentionMask.causal()
        if c.window is not None:
            near = AttentionMask.window(left=c.window)
            if c.sinks and segments_BT is None:
                near |= AttentionMask.sinks(c.sinks)
            elif c.sinks:
                # Each packed document has its own.
                near |= AttentionMask.padding(positions_BT < c.sinks)
            mask &= near
        if prefix_B is not None:
            mask |= AttentionMask.prefix(prefix_B)
        return mask if segments_BT is None else mask & AttentionMask.segments(segments_BT)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the next token, float32."""
        with jax.named_scope("logits"):
            logits = self.embed.attend(hidden_BTD) if self.head is None else self.head(hidden_BTD)
            logits = constrain(logits.astype(jnp.float32), "batch", "seq", "vocab")
            if self.config.logit_soft_cap is not None:
                logits = self.config.logit_soft_cap * jnp.tanh(logits / self.config.logit_soft_cap)
            return logits

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        prefix_B: Int[Array, " B"] | None = None,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | Chosen = False,
    ) -> ModelOutput:
        """Scores of each next token.

        Args:
            tokens_BT: token ids below vocab_size.
            positions_BT: where each token stands in its document; 0 to T-1 (behind the cache) by default.
            segments_BT: which packed document a token belongs to; 0 is padding. Nothing is seen across documents.
            prefix_B: how many first tokens of each row all of its tokens see (a prefix language model; Liu et al. 2018); none
                by default. A row is one document then.
            cache: keys and values of the tokens before these; `make_cache` makes an empty one.
            key: turns dropout on.
            return_weights: also give every layer's attention weights, recomputed beside the fast kernels; or those of some
                layers and heads alone, (layers, heads), in that order. For a choice the layers are run one by one.

        Raises:
            ValueError: more tokens than learned positions, or a layer or head that does not exist.
        """
        hidden_BTD, outputs = self.hidden(
            tokens_BT,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            prefix_B=prefix_B,
            cache=cache,
            key=key,
            return_weights=return_weights,
        )
        logits = self.logits(hidden_BTD)
        caches: Any = None if isinstance(outputs, list) else outputs.cache
        if cache is not None and isinstance(outputs, list):
            caches = [output.cache for output in outputs]
            caches = caches if isinstance(cache, list) else restack(caches)
        return ModelOutput(
            logits=logits,
            cache=caches,
            weights=weights_of(outputs, return_weights),
            router_loss=router_loss(self.config, outputs),
        )

    def unstacked(self) -> GPT:
        """The same model with its blocks apart, for decoding (`LayerStack.take_apart`)."""
        model = nnx.merge(*nnx.split(self))
        model.layers.take_apart()
        return model

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens."""
        return self.layers.make_cache(batch_size, max_length)


def count_parameters(config: GPTConfig) -> int:
    """Number of parameters, from the shapes of the model itself."""
    abstract = jax.eval_shape(lambda: nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def flops_per_token(config: GPTConfig, length: int) -> float:
    """Floating-point operations of one token's forward pass at context `length`; a training step takes three times that.

    A multiply-add counts as two. Counted: every matrix product, the output projection, and attention's two products
    over the keys that are really seen: the causal half once, a window at its width and its sinks. Not counted: lookups,
    norms, activations, softmax, biases by distance, and whatever rematerialisation repeats.
    """
    c = config
    seen = (length + 1) / 2
    if c.window is not None and (w := c.window + 1 + c.sinks) < length:
        seen = w - w * (w - 1) / (2 * length)
    return c.num_layers * (attention_flops(c, seen) + feed_forward_flops(c)) + 2 * c.embed_dim * c.vocab_size
