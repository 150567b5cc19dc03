"""cuDNN's flash attention, on NVIDIA GPUs: causal masks, windows on the left, padding after the tokens, and packed documents.

B batch, T query position, S key position, N query heads, K key/value heads, H head_dim, M documents of a row.

JAX's function for it is called directly, since `jax.nn.dot_product_attention` has no packed documents. Those are given as the
place where each begins and its length, with -1 where a row has fewer than M. The kernel writes no gradient for a position that
belongs to no document, so what it leaves there is replaced by zeros.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention.backends.shares import shard_map_kernel
from transformer.attention.spec.band import Band
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.predicates import Causal, Segments, Window
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec
from transformer.differentiation import reverse_mode_only
from transformer.types import Array, Bool, Float, Int

MOST_DOCUMENTS = 48
"""Of a row: the kernel's time, and the statistic that it keeps for the backward pass, grow with the room for documents."""
AMPERE, HOPPER = 8.0, 9.0
"""Compute capabilities from which on cuDNN has flash attention, and packed documents and heads wider than 128."""


def cudnn(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    spec: AttentionSpec,
) -> Float[Array, "B T N H"]:
    """Attention by cuDNN. Softmax in float32, the result in v's type. Reverse mode only, and only once.

    Raises:
        UserError: a derivative in forward mode, or a second one.
    """
    layout = Layout.of(spec.mask)
    assert isinstance(layout, Layout)
    if layout.documents is not None:
        # The lengths of one row may be those of all.
        layout = dataclasses.replace(layout, documents=layout.documents.of_rows(q_BTNH.shape[0]))
    q_BTNH, k_BSKH, v_BSKH = reverse_mode_only(
        (q_BTNH, k_BSKH, v_BSKH),
        "attention backend 'cudnn' has a gradient and no derivative in forward mode, nor a second one; "
        "use 'blockwise' or 'reference' for those",
    )

    def call(q: Array, k: Array, v: Array, documents: Documents | None) -> Array:
        return _on_device(q, k, v, documents, layout, spec.score.scale)

    # Its own partitioning fails in a program that is manual over some of the mesh's axes, such as a pipeline.
    return shard_map_kernel(call, q_BTNH, k_BSKH, v_BSKH, layout.documents)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of each row of queries and of keys, one after the other from the first position on."""

    q_lengths_BM: Int[Array, "B M"]
    k_lengths_BM: Int[Array, "B M"]

    def of_rows(self, num_rows: int) -> Documents:
        """The same for this number of rows."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_rows, x.shape[1])), self)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mask in the form that cuDNN takes."""

    is_causal: bool = False
    window: int | None = None
    """How many keys a query sees at most, its own position included; only under a causal mask."""
    documents: Documents | None = None

    @staticmethod
    def of(mask: AttentionMask) -> Layout | str:
        """The layout of a mask, or why cuDNN has none for it."""
        documents = None
        for term in mask.predicates:
            if isinstance(term, Causal | Window):
                if not (isinstance(term.offset, int) and term.offset == 0):
                    return "its causal masks and windows count from the first key, and this mask has an offset"
            elif isinstance(term, Segments):
                if documents is not None:
                    return "it takes one array of segment numbers, and this mask has several"
                if term.q_lengths_BM is None or term.k_lengths_BM is None:
                    return "it needs the lengths of packed documents: AttentionMask.segments(..., lengths_BM=...)"
                several = max(term.q_lengths_BM.shape[1], term.k_lengths_BM.shape[1]) > 1
                if several and term.q_lengths_BM is not term.k_lengths_BM:
                    return "it takes several documents in a row only if queries and keys have the same ones"
                documents = Documents(term.q_lengths_BM, term.k_lengths_BM)
            else:
                name = type(term).__name__.lower()
                return f"it takes causal masks, windows and segments, and this mask has {name}"
        band = Band.of(mask)
        if band.right not in (None, 0) or (band.right is None and band.left is not None):
            seen = "all" if band.right is None else band.right
            return f"it has windows on the left of a causal mask only, and this one sees {seen} keys on the right"
        if band.left is not None and documents is not None:
            return "it has no window within packed or padded rows"
        # A window with nothing on the right is causal.
        return Layout(band.right == 0, None if band.left is None else band.left + 1, documents)


def supports_cudnn(request: AttentionShapes) -> str | None:
    """Why cuDNN cannot serve this call, or None."""
    if request.platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is {request.platform}"
    score, is_hopper = request.spec.score, request.compute_capability >= HOPPER
    if request.compute_capability < AMPERE:
        return "it needs an NVIDIA GPU of the Ampere generation or newer"
    if request.spec.dropout is not None:
        return "its dropout would drop the same weights in every step"
    if score.soft_cap is not None:
        return "it has no logit soft-cap"
    if score.mod is not None:
        return "it has no score_mod"
    if score.bias_BNTS is not None:
        return "its bias gradient is not reliable for every shape"
    if request.value_dim != request.head_dim:
        return f"it needs values as wide as keys, and they are {request.value_dim} and {request.head_dim}"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, and q is {request.dtype}"
    widest = 256 if is_hopper else 128
    if request.head_dim % 8 or request.head_dim > widest:
        return f"it needs a head_dim that is a multiple of 8 and at most {widest} on this GPU, and this is {request.head_dim}"
    if request.num_queries % 2 or request.num_keys % 2:
        # JAX requires this of calls with a bias, and treats every call as one.
        return (
            f"its gradient needs even lengths, and there are {request.num_queries} queries and {request.num_keys} keys"
        )
    layout = Layout.of(request.spec.mask)
    if isinstance(layout, str):
        return layout
    if layout.window is not None and request.num_queries != request.num_keys:
        return f"its windows need as many keys as queries, and there are {request.num_keys} and {request.num_queries}"
    most = 1 if layout.documents is None else layout.documents.q_lengths_BM.shape[1]
    if most > 1 and not is_hopper:
        return "it needs a GPU of the Hopper generation or newer for packed documents"
    if most > MOST_DOCUMENTS:
        return f"it is slow with more than {MOST_DOCUMENTS} documents in a row, and there is room for {most}"
    return None


def _on_device(q: Array, k: Array, v: Array, documents: Documents | None, layout: Layout, scale: float) -> Array:
    from jax._src.cudnn import fused_attention_stablehlo as kernel

    kinds = kernel.MaskType
    options: dict[str, Any] = {"scale": scale, "sliding_window_length": layout.window, "qkv_layout": "BTNH"}
    # JAX's own function mixes types, even if the program runs under a stricter promotion rule.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if documents is None:
            kind = kinds.CAUSAL if layout.is_causal else kinds.NO_MASK
            return kernel.dot_product_attention(q, k, v, mask_type=kind, **options)
        # Where there is a document: elsewhere the kernel reads nothing, and writes neither outputs nor gradients.
        q_real, k_real = _covered(documents.q_lengths_BM, q.shape[1]), _covered(documents.k_lengths_BM, k.shape[1])
        q, k, v = (jnp.where(real[..., None, None], x, 0) for real, x in ((q_real, q), (k_real, k), (k_real, v)))
        q_lengths, k_lengths = (_some(lengths) for lengths in (documents.q_lengths_BM, documents.k_lengths_BM))
        kind = kinds.PADDING_CAUSAL if layout.is_causal else kinds.PADDING
        lengths: dict[str, Any]
        if q_lengths.shape[1] == 1:
            lengths = {"q_seqlen": q_lengths[:, 0], "kv_seqlen": k_lengths[:, 0]}
        else:
            if jax.__version_info__ < (0, 11, 2):
                # JAX counted the offsets of shared keys by the number of query heads.
                k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
            lengths = {
                "q_seqlen": jnp.where(q_lengths > 0, q_lengths, -1), "kv_seqlen": jnp.where(k_lengths > 0, k_lengths, -1),
                "q_offsets": _starts(q_lengths), "kv_offsets": _starts(k_lengths),
            }  # fmt: skip
        out = kernel.dot_product_attention(q, k, v, mask_type=kind, **lengths, **options)
        return jnp.where(q_real[..., None, None], out, 0)


def _covered(lengths_BM: Array, size: int) -> Bool[Array, "B T"]:
    """Positions that belong to a document."""
    return jnp.arange(size)[None] < lengths_BM.sum(1, keepdims=True)


def _some(lengths_BM: Int[Array, "B M"]) -> Int[Array, "B M"]:
    """The lengths, with one token in a row that has no document; what becomes of it is replaced by zeros."""
    lengths_BM = lengths_BM.astype(jnp.int32)
    return lengths_BM.at[:, 0].set(jnp.maximum(lengths_BM[:, 0], 1))


def _starts(lengths_BM: Int[Array, "B M"]) -> Int[Array, "B M+1"]:
    """Where each document begins, -1 where there is none; the place after the last is not among them."""
    starts = jnp.cumsum(lengths_BM, axis=1, dtype=jnp.int32) - lengths_BM
    return jnp.pad(jnp.where(lengths_BM > 0, starts, -1), ((0, 0), (0, 1)), constant_values=-1)
