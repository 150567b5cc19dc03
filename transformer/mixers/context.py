"""The inputs of a model's call in addition to the residual stream: one pytree, created once per call and given to every layer.

B batch, T query position, M memory position, D embed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention.spec.mask import AttentionMask
from transformer.hooks import Hooks
from transformer.layers.position import Alibi, RelativePosition, ScoreMod, token_positions
from transformer.layers.relative_embedding import RelativeEmbedding
from transformer.mixers.state import KVCache, State, WindowCache
from transformer.types import Array, Bool, Float, Int, Keys


def _batch() -> Any:
    """A field whose arrays have a leading B, which a pipeline cuts into microbatches."""
    return dataclasses.field(default=None, metadata={"batch": True})


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The parts of the mask, and other inputs that a mixer or a block may need.

    The mask's parts are kept separate because each mixer adds its own window, and because a pipeline divides arrays, not masks.
    """

    positions_BT: Int[Array, "B T"] | None = _batch()
    """Each token's position in its document; 0 to T-1 (after the state) by default."""
    segments_BT: Int[Array, "B T"] | None = _batch()
    """The packed document of each token; 0 is padding. With a state: 1, and 0 for padding at the end of a row."""
    lengths_BM: Int[Array, "B _"] | None = _batch()
    """The size of each of a row's documents, if these come one after the other from its first position on, and only padding
    follows (`AttentionMask.segments`)."""
    prefix_B: Int[Array, " B"] | None = _batch()
    """The number of first tokens of a row that all of its tokens see."""
    memory: Float[Array, "B M D"] | KVCache | None = _batch()
    """What cross-attention reads: the memory, or the keys and values computed from it."""
    memory_segments_BM: Int[Array, "B M"] | None = _batch()
    """As `segments_BT`, for the memory."""
    memory_lengths_BM: Int[Array, "B _"] | None = _batch()
    """As `lengths_BM`, for the memory."""
    mask: AttentionMask | None = None
    """A mask in addition to all of these, for any mixer that computes softmax weights."""
    score_mod: ScoreMod | None = _static(None)
    """A function of each score, `(score, row, head, query, key) -> score`, for any mixer that computes softmax weights; queries
    and keys count from the start of the row, also after a state."""
    relative: RelativePosition | RelativeEmbedding | None = None
    """The learned bias by distance that the layers share, or their embeddings of distances."""
    state: State | None = None
    """The state of one layer after the tokens before these."""
    layer: int | Int[Array, ""] = 0
    """This layer's number, from 0."""
    key: Keys | None = None
    """The key of one layer, or of one mixer; enables dropout."""
    adapter_key: Keys | None = None
    """The key of one layer; enables the dropout of adapters."""
    is_causal: bool = _static(True)
    """Whether a token sees only the tokens before it and itself."""
    return_weights: bool | tuple[int, ...] = _static(False)
    """Whether to return attention weights: of all heads, or of those listed."""
    hooks: Hooks | None = _static(None)
    """What keeps or changes values at named places; None, as in training: nothing does."""

    def at(self, name: str, value: Array) -> Array:
        """The value to continue with at a place of the hooks."""
        return value if self.hooks is None else self.hooks(name, value)

    def inside(self, name: str) -> Context:
        """The context of a part of the model, whose places begin with `name`."""
        return self if self.hooks is None else dataclasses.replace(self, hooks=self.hooks.inside(name))

    @property
    def valid_BT(self) -> Bool[Array, "B T"] | None:
        """Tokens that are not padding; None if all are."""
        return None if self.segments_BT is None else self.segments_BT != 0

    @property
    def start(self) -> int | Int[Array, " B"]:
        """How many tokens each row has read before these."""
        return 0 if self.state is None else self.state.length

    @property
    def room(self) -> int | None:
        """How many tokens each row can hold with its state, which says how long its text may become; None without one."""
        return None if self.state is None else getattr(self.state, "room", None)

    def positions(self, x_BTD: Float[Array, "B T D"]) -> Int[Array, "B T"]:
        """`positions_BT` with its default filled in."""
        B, T, _ = x_BTD.shape
        return token_positions(B, T, self.start) if self.positions_BT is None else self.positions_BT

    def self_mask(self, x_BTD: Float[Array, "B T D"], *, window: int | None = None, sinks: int = 0) -> AttentionMask:
        """The mask of self-attention, in positions of this call.

        Args:
            window: how many tokens before each token it sees; if attention is not causal, also after it. None: all.
            sinks: first tokens of each document that are seen beyond the window (Xiao et al. 2023).
        """
        mask = AttentionMask.causal() if self.is_causal else AttentionMask.none()
        if window is not None:
            near = AttentionMask.window(left=window, right=None if self.is_causal else window)
            if sinks and (self.segments_BT is None or self.state is not None):
                near |= AttentionMask.sinks(sinks)
            elif sinks:
                # Each packed document has its own sinks.
                near |= AttentionMask.padding(self.positions(x_BTD) < sinks)
            mask &= near
        if self.prefix_B is not None:
            mask |= AttentionMask.prefix(self.prefix_B)
        if self.segments_BT is not None and self.state is None:
            mask &= AttentionMask.segments(self.segments_BT, lengths_BM=self.lengths_BM)
        return mask if self.mask is None else mask & self.mask

    def cached_mask(self, mask: AttentionMask, state: Any) -> AttentionMask:
        """`mask` for the keys of `state`, which include those of this call, after the keys that were there before."""
        mask = mask.shift_queries(self.start)
        if self.is_causal and self.prefix_B is None:
            return mask
        # Slots that have not been written are hidden by causality alone.
        return mask & AttentionMask.padding(jnp.arange(state.room) < state.length[:, None])

    def window_mask(self, state: WindowCache) -> AttentionMask:
        """The mask of a token over the newest positions.

        Raises:
            ValueError: a mask, a prefix or a score_mod, which would need the order of the positions.
        """
        if self.mask is not None or self.prefix_B is not None or self.score_mod is not None:
            raise ValueError("attention: a window's cache takes no mask, prefix or score_mod")
        return AttentionMask.padding(state.seen)

    def memory_mask(self, x_BTD: Float[Array, "B T D"]) -> AttentionMask:
        """Which of the memory's positions each query sees: those of its own document, or those that are not padding."""
        if self.memory_segments_BM is None:
            return AttentionMask.none()
        if self.segments_BT is None or self.state is not None:
            return AttentionMask.padding(self.memory_segments_BM != 0)
        return AttentionMask.segments(
            self.segments_BT, self.memory_segments_BM, lengths_BM=self.lengths_BM, k_lengths_BM=self.memory_lengths_BM
        )

    def scores(self, position: Any, num_heads: int) -> ScoreMod | None:
        """The `score_mod` of a mixer: the bias of its positions, followed by the context's own; None without both."""
        bias: ScoreMod | None = None
        if position is not None and position.kind == "alibi":
            bias = Alibi(num_heads).score_mod(self.start)
        elif position is not None and position.kind == "relative":
            assert isinstance(self.relative, RelativePosition), "the stack of layers makes the shared bias"
            bias = self.relative.score_mod(self.start)
        if self.score_mod is None:
            return bias
        change, start = self.score_mod, self.start

        def both(score: Array, row: Array, head: Array, query: Array, key: Array) -> Array:
            before = start if isinstance(start, int) else start[row]
            return change(score if bias is None else bias(score, row, head, query, key), row, head, query + before, key)

        return both

    def batch_leaves(self) -> list[bool]:
        """Which of the leaves, in the order of `jax.tree.leaves`, have a leading B."""
        marked = {field.name for field in dataclasses.fields(self) if field.metadata.get("batch")}
        paths = jax.tree_util.tree_flatten_with_path(self)[0]
        return [path[0].name in marked for path, _ in paths]


NO_CONTEXT = Context(is_causal=False)
"""Every token sees every token."""
CAUSAL = Context()
"""Every token sees those up to itself."""
