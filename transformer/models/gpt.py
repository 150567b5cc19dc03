"""GPT: a decoder-only language model, in GPT-2's shape or in a modern one, from one config.

B batch, T position, D embed, V vocab, L layers, N query heads, K key/value heads, H head_dim, F mlp.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.spec.mask import AttentionMask
from transformer.errors import require
from transformer.layers.position import ScoreMod
from transformer.loss import Projection
from transformer.mixers.context import Context
from transformer.mixers.state import State
from transformer.models.config import StackConfig, stack_flops
from transformer.models.embed import embed, logits_of, make_output, make_positions, make_table, projection_of
from transformer.models.layer_stack import Chosen, LayerStack, StackOutput, cache_lengths
from transformer.types import Array, Float, Int, Keys, ModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig(StackConfig):
    """The defaults are GPT-2's small model (Radford et al. 2019); `configs/` has the modern shape."""

    family: Literal["gpt"] = "gpt"
    """Kind of model."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection too."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(embed_dim) (Vaswani et al. 2017, section 3.4; Gemma)."""
    logit_soft_cap: float | None = None
    """Soft cap c of the output logits: c tanh(logits / c). null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cap = self.logit_soft_cap
        require(self, "logit_soft_cap", cap is None or cap > 0, "allowed: above 0, or null")


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
        lengths_BM: Int[Array, "B M"] | None = None,
        prefix_B: Int[Array, " B"] | None = None,
        mask: AttentionMask | None = None,
        score_mod: ScoreMod | None = None,
        states: list[State] | None = None,
        key: Keys | None = None,
        return_weights: bool | Chosen = False,
    ) -> tuple[Float[Array, "B T D"], StackOutput]:
        """The last block's output after the final norm, and the other outputs of the blocks; arguments as in `__call__`."""
        x_BTD, positions_BT, key = embed(
            self.config, self.embed, self.positions, tokens_BT, positions_BT=positions_BT,
            start=0 if states is None else cache_lengths(states), key=key,
            scale=math.sqrt(self.config.embed_dim) if self.config.scale_embeddings else None,
        )  # fmt: skip
        context = Context(
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            lengths_BM=lengths_BM,
            prefix_B=prefix_B,
            mask=mask,
            score_mod=score_mod,
        )
        return self.layers(x_BTD, context, states=states, key=key, return_weights=return_weights)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the next token, float32."""
        with jax.named_scope("logits"):
            logits = logits_of(self.embed, self.head, hidden_BTD)
            if self.config.logit_soft_cap is not None:
                logits = self.config.logit_soft_cap * jnp.tanh(logits / self.config.logit_soft_cap)
            return logits

    def projection(self) -> Projection:
        """What turns the output's `hidden` into its `logits`."""
        return projection_of(self.embed, self.head, soft_cap=self.config.logit_soft_cap)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        lengths_BM: Int[Array, "B M"] | None = None,
        prefix_B: Int[Array, " B"] | None = None,
        mask: AttentionMask | None = None,
        score_mod: ScoreMod | None = None,
        states: list[State] | None = None,
        key: Keys | None = None,
        return_weights: bool | Chosen = False,
    ) -> ModelOutput:
        """Scores of each next token.

        Args:
            tokens_BT: token ids below vocab_size.
            positions_BT: each token's position in its document; 0 to T-1 (after what the states hold) by default.
            segments_BT: which packed document a token belongs to; 0 is padding. Nothing is seen across documents. With states:
                1, and 0 for padding at the end of a row.
            lengths_BM: size of each document of a row, if they come one after the other from its first position on, and only
                padding follows. The result is the same; kernels for packed documents need it.
            prefix_B: number of first tokens of each row that all of its tokens see (a prefix language model; Liu et al. 2018);
                none by default. With a prefix, a row is one document.
            mask: in addition to causality, windows, documents and prefix; for softmax attention.
            score_mod: a function of each score, `(score, row, head, query, key) -> score`, in softmax attention.
            states: the states of the layers after the tokens before these; `make_states` makes empty ones.
            key: enables dropout.
            return_weights: also return every layer's attention weights, recomputed in addition to the fast kernels; or only those
                of some layers and heads, (layers, heads), in that order. With a selection the layers are run one by one.

        Raises:
            ValueError: more tokens than learned positions, a layer or head that does not exist, or states without room.
        """
        hidden_BTD, output = self.hidden(
            tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, lengths_BM=lengths_BM, prefix_B=prefix_B, mask=mask,
            score_mod=score_mod, states=states, key=key, return_weights=return_weights,
        )  # fmt: skip
        return ModelOutput(
            logits=self.logits(hidden_BTD), hidden=hidden_BTD, states=output.states, weights=output.weights,
            routers=output.routers,
        )  # fmt: skip

    def unstacked(self) -> GPT:
        """The same model with separate blocks, for decoding (`LayerStack.unstack_layers`)."""
        model = nnx.merge(*nnx.split(self))
        model.layers.unstack_layers()
        return model

    def make_states(self, batch_size: int, max_length: int) -> list[State]:
        """The states before the first token, one per layer, for `batch_size` rows of up to `max_length` tokens."""
        return self.layers.make_states(batch_size, max_length)


def flops_per_token(config: GPTConfig, length: int) -> float:
    """Floating-point operations of one token's forward pass at context `length`; a training step takes three times that.

    A multiply-add counts as two. Counted: every matrix product, the output projection, and attention's two products
    over the keys that are really seen: the causal half once, a window at its width and its sinks. Not counted: lookups,
    norms, activations, softmax, biases by distance, and whatever rematerialisation repeats.
    """
    return stack_flops(config, length, causal=True) + 2 * config.embed_dim * config.vocab_size
