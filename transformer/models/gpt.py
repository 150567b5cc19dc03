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
from transformer.models.config import StackConfig, attention_flops, feed_forward_flops
from transformer.models.embed import embed, logits_of, make_output, make_positions, make_table
from transformer.models.layer_stack import Chosen, LayerStack, filled, router_loss, weights_of
from transformer.stack import restack
from transformer.types import Array, Float, Int, ModelOutput, PRNGKeyArray


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
        self.embed = make_table(c, c.vocab_size, rngs=rngs)
        self.positions = make_positions(c, rngs)
        self.layers = LayerStack(c, causal=True, rngs=rngs)
        self.head = None if c.tie_embeddings else make_output(c, rngs)

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
        x_BTD, positions_BT, key = embed(
            self.config, self.embed, self.positions, tokens_BT, positions_BT=positions_BT,
            start=0 if cache is None else filled(cache), key=key,
        )  # fmt: skip
        return self.layers(
            x_BTD, self._mask(positions_BT, segments_BT, prefix_B), positions_BT=positions_BT,
            valid_BT=None if segments_BT is None else segments_BT != 0, cache=cache, key=key,
            return_weights=return_weights,
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
            logits = logits_of(self.embed, self.head, hidden_BTD)
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
