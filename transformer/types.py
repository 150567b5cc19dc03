"""Names shared by the whole library.

Axis legend, used by every module's shapes:
B batch, T query position, S key position, D embed, N query heads, K key/value heads, H head_dim, F mlp, V vocab, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, DTypeLike, Float, Int, Key, PRNGKeyArray, UInt32

    Keys = Key[Array, "..."] | UInt32[Array, "2"]
    """A random key, or one for each row of a batch (`transformer/randomness.py`)."""
else:
    try:
        from jaxtyping import Array, Bool, DTypeLike, Float, Int, Key, PRNGKeyArray, UInt32

        Keys = Key[Array, "..."] | UInt32[Array, "2"]
    except ImportError:
        # The test suite, which has jaxtyping, checks shapes; elsewhere nothing reads the annotations.
        Array = Bool = DTypeLike = Float = Int = Key = Keys = PRNGKeyArray = UInt32 = Any

__all__ = [
    "DTYPES", "Array", "Bool", "DTypeLike", "Float", "Int", "Key", "Keys", "ModelOutput", "PRNGKeyArray", "UInt32", "wide",
    "widen",
]  # fmt: skip

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
"""The compute types that a config may name."""


def wide(dtype: DTypeLike) -> DTypeLike:
    """The type for sums, statistics and softmax of `dtype`: float64 for float64, float32 for anything narrower."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def widen(x: Array) -> Array:
    """`x` in the type that `wide` gives."""
    return x.astype(wide(x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """The output of a model."""

    logits: Array
    """Scores, float32: [B, T, V] of a language model. Other heads document their own shape."""
    hidden: Array | None = None
    """[B, T, D] of a language model: what its output projection (`projection`) reads. A compiled program that computes its loss
    from these (`transformer/loss.py`) does not compute the logits."""
    pooled_logits: Array | None = None
    """[B, C] scores of a whole row, for a model that gives them in addition to its tokens'."""
    states: Any = None
    """The state of each layer after these tokens, for decoding, if states were given."""
    weights: Array | None = None
    """[L, B, N, T, S] attention weights, if asked for."""
    added_loss: Array | None = None
    """A scalar to add to the mean loss, from a head."""
    routers: tuple[Any, ...] = ()
    """For each stack of layers with a mixture of experts: the sums that the losses of its routers are made of (`RouterSums`)."""
