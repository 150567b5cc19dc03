"""The attention kernels that ship with JAX, written in Pallas: splash attention on TPUs, Triton's on GPUs.

B batch, T query position, S key position, N query heads, K key/value heads, H head_dim, C value dim.

tpu     `splash_attention`: a band of the T×S plane (causal, windows, offsets), packed segments, padding, grouped and
        multi-query heads, logit soft-cap, values of another width than keys. Blocks outside the band are never touched.
gpu     `attention.mha`: causal or no mask, packed segments of self-attention. JAX 0.12 deprecates it; if the installed JAX
        no longer has it, this backend is not available.

The kernels only handle whole blocks, and rows that see at least one key. Lengths are therefore padded to whole blocks, and the
padding is hidden by the band if possible, otherwise by segment numbers; a row that sees nothing gives zeros. The compiler
cannot partition a kernel, so under a mesh it runs in `jax.shard_map` on each device's share of the batch and the heads.

Neither the T×S array nor a mask of that size is created.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention.backends.blockwise import ATTENTION_RESIDUALS
from transformer.attention.backends.cudnn import AMPERE
from transformer.attention.backends.shares import shard_map_kernel
from transformer.attention.spec.band import Band
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.predicates import Causal, MaskPredicate, Padding, Prefix, Segments, Window
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec
from transformer.attention.spec.tile import filled
from transformer.differentiation import reverse_mode_only
from transformer.types import Array, Float

TPU_BLOCKS = (512, 256, 128)
"""Block sizes for splash attention; the largest one that pads a length by at most an eighth is used."""
GPU_BLOCK = 128
"""The GPU kernel's lengths are a multiple of this; shorter ones are one block of a power of two."""
GPU_BLOCKS = {64: (128, 128), 128: (128, 64), 256: (64, 32)}
"""Queries and keys in a block of the GPU kernel's forward pass, by the largest head_dim for which shared memory suffices."""

NO_LOGIT = -1e30
"""The logit of an extra key, visible to all and without a value: negligible next to a real logit, and dominant without one."""


def pallas(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKC: Float[Array, "B S K C"],
    spec: AttentionSpec,
    *,
    platform: str,
    interpret: bool = False,
) -> Float[Array, "B T N C"]:
    """Attention with a platform's kernel. Softmax in float32, the result in v's type. Reverse mode only, and only once.

    Args:
        platform: "tpu" or "gpu": which kernel to use.
        interpret: run the kernel's program step by step on any platform, for tests; slow. Types and lengths that the hardware
            would reject are then allowed.

    Raises:
        ValueError: the platform has no kernel, or its kernel does not compute this spec.
    """
    (B, T, N, _), S, C = q_BTNH.shape, k_BSKH.shape[1], v_BSKC.shape[3]
    request = AttentionShapes.of(q_BTNH, v_BSKC, spec, platform)
    if reason := _not_computed(request):
        raise ValueError(f"pallas: {reason}")
    band, ids = Band.of(spec.mask), _segment_ids(spec.mask, B, T, S)
    if band.is_empty(T, S):
        return jnp.zeros((B, T, N, C), v_BSKC.dtype)
    kernel = functools.partial(
        _on_tpu if platform == "tpu" else _on_gpu,
        band=band, scale=spec.score.scale, soft_cap=spec.score.soft_cap, interpret=interpret,
    )  # fmt: skip
    q_BTNH, k_BSKH, v_BSKC = reverse_mode_only(
        (q_BTNH, k_BSKH, v_BSKC),
        "attention backend 'pallas' has a gradient and no derivative in forward mode, nor a second one; "
        "use 'blockwise' or 'reference' for those",
    )
    # JAX's own functions mix types, even if the program runs under a stricter promotion rule.
    with jax.named_scope(f"pallas_{platform}"), jax.numpy_dtype_promotion("standard"):
        out = shard_map_kernel(kernel, q_BTNH, k_BSKH, v_BSKC, ids)
    return out.astype(v_BSKC.dtype)


pallas_interpret = functools.partial(pallas, interpret=True)
"""`pallas` on any platform, to compare a kernel with the reference: `pallas_interpret(q, k, v, spec, platform="tpu")`."""


def supports_pallas(request: AttentionShapes) -> str | None:
    """Why the platform's kernel cannot serve this call, or None."""
    return _not_computed(request) or _refused_by_hardware(request)


def _not_computed(request: AttentionShapes) -> str | None:
    """Why the kernel does not compute this spec on any machine."""
    if request.platform not in ("gpu", "tpu"):
        return f"it has kernels for GPUs and TPUs, and this is {request.platform}"
    score, where = request.spec.score, request.platform.upper()
    if request.spec.dropout is not None:
        return "it has no dropout"
    if score.bias_BNTS is not None:
        return "it has no bias"
    if score.mod is not None:
        return "it has no score_mod"
    if reason := _mask_not_computed(request.spec.mask):
        return reason
    if request.platform == "tpu":
        return None
    if _gpu_kernel() is None:
        return f"the installed JAX {jax.__version__} no longer ships the {where} kernel"
    if score.soft_cap is not None:
        return f"its {where} kernel has no logit soft-cap"
    if request.value_dim != request.head_dim:
        return (
            f"its {where} kernel needs values as wide as keys, and they are {request.value_dim} and {request.head_dim}"
        )
    if request.head_dim > max(GPU_BLOCKS):
        return f"its {where} kernel needs a head_dim of at most {max(GPU_BLOCKS)}, and this is {request.head_dim}"
    if request.num_queries != request.num_keys:
        return (
            f"its {where} kernel needs as many keys as queries, and there are {request.num_keys} and "
            f"{request.num_queries}"
        )
    if Band.of(request.spec.mask) not in (Band(), Band(None, 0)):
        return f"its {where} kernel knows causal attention without an offset, and no window"
    for term in request.spec.mask.predicates:
        if not isinstance(term, Causal | Window | Segments):
            return f"its {where} kernel does not support {type(term).__name__.lower()} masks"
        if isinstance(term, Segments) and term.q_BT is not term.k_BS:
            return (
                f"its {where} kernel takes one array of segment numbers for queries and keys: "
                "AttentionMask.segments(ids), made where attend is called"
            )
    return None


def _mask_not_computed(mask: AttentionMask) -> str | None:
    for term in mask.predicates:
        name = type(term).__name__
        if not isinstance(term, Causal | Window | Segments | Padding | Prefix):
            return f"it takes causal, window, segment, padding and prefix masks, and this one has {name}"
        if isinstance(term, Causal | Window) and not isinstance(term.offset, int):
            return f"it needs a {name.lower()} mask's offset as a plain number, and this one is an array"
    if sum(isinstance(term, Segments) for term in mask.predicates) > 1:
        return "it takes one array of segment numbers, and this mask has several"
    return None


def _refused_by_hardware(request: AttentionShapes) -> str | None:
    types = (jnp.bfloat16, jnp.float32) if request.platform == "tpu" else (jnp.bfloat16, jnp.float16)
    if request.dtype not in types:
        names = " or ".join(jnp.dtype(dtype).name for dtype in types)
        return f"it needs {names} on a {request.platform.upper()}, and q is {request.dtype}"
    if request.platform == "gpu" and request.compute_capability < AMPERE:
        return "it needs an NVIDIA GPU of the Ampere generation or newer"
    if request.platform == "tpu":
        shortest = min(request.num_queries, request.num_keys)
        if shortest < TPU_BLOCKS[-1]:
            return f"its blocks are at least {TPU_BLOCKS[-1]} positions, and {shortest} would be mostly padding"
    return None


Ids = tuple[Array, Array]
"""Segment numbers of queries, int32 [B, T], and of keys, [B, S]. Equal numbers see each other. No real query sees key 0, and a
query with number 0 gives zeros."""


def _segment_ids(mask: AttentionMask, B: int, T: int, S: int) -> Ids | None:
    """The segment numbers that a mask's other terms result in together."""
    segments = [term for term in mask.predicates if isinstance(term, Segments)]
    hidden = [_valid(term, S) for term in mask.predicates if isinstance(term, Padding | Prefix)]
    if not segments and not hidden:
        return None
    if segments:
        q_ids, k_ids = _rows(segments[0].q_BT, B), _rows(segments[0].k_BS, B)
    else:
        q_ids, k_ids = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    for valid_BS in hidden:
        k_ids = jnp.where(valid_BS, k_ids, 0)
    return q_ids, k_ids


def _valid(term: MaskPredicate, S: int) -> Array:
    if isinstance(term, Padding):
        return term.valid_BS
    assert isinstance(term, Prefix)
    length = term.length if isinstance(term.length, int) else term.length[:, None]
    return jnp.arange(S)[None] < length


def _rows(ids: Array, B: int) -> Array:
    return jnp.broadcast_to(ids.astype(jnp.int32), (B, ids.shape[1]))


# The functions below run on one device.


def _on_tpu(
    q: Array, k: Array, v: Array, ids: Ids | None, *, band: Band, scale: float, soft_cap: float | None, interpret: bool
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (B, T, N, _), S = q.shape, k.shape[1]
    rows, columns = _tpu_block(T), _tpu_block(S)
    T_padded, S_padded = _up_to(T, rows), _up_to(S, columns)
    if ids is None and S_padded > S and not band.excludes_padding(T, S):
        ids = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    full = band == Band()
    shape = (T_padded, S_padded)
    plane = masks.FullMask(shape) if full else masks.LocalMask(shape, (band.left, band.right), offset=0)
    attention = splash.make_splash_mha(
        masks.MultiHeadMask([plane] * N),
        block_sizes=splash.BlockSizes(
            block_q=rows, block_kv=columns, block_kv_compute=columns,
            block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=columns,
            block_q_dq=rows, block_kv_dq=columns,
        ),
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=ATTENTION_RESIDUALS,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
    # The kernel has no scale of its own.
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (
        filled(x, length, 1).transpose(0, 2, 1, 3) for x, length in ((scaled, T_padded), (k, S_padded), (v, S_padded))
    )
    of_rows = None if ids is None else splash.SegmentIds(filled(ids[0], T_padded, 1), filled(ids[1], S_padded, 1))
    # A row that sees no other key sees this one, so that its output and gradients are zeros rather than NaN.
    sinks = jnp.full((N,), max(NO_LOGIT, float(jnp.finfo(q.dtype).min)), q.dtype)
    out = jax.vmap(attention, in_axes=(0, 0, 0, 0, None))(q, k, v, of_rows, sinks)
    return _real(out.transpose(0, 2, 1, 3)[:, :T], ids)


def _on_gpu(
    q: Array, k: Array, v: Array, ids: Ids | None, *, band: Band, scale: float, soft_cap: float | None, interpret: bool
) -> Array:
    kernel = _gpu_kernel()
    assert kernel is not None and soft_cap is None
    B, T, N, _ = q.shape
    length = max(16, 1 << (T - 1).bit_length()) if T <= GPU_BLOCK else _up_to(T, GPU_BLOCK)
    is_causal = band.right == 0
    # Queries and keys share one array of numbers, as `supports_pallas` ensures.
    shared = None if ids is None else ids[0]
    if shared is None and length > T and not is_causal:
        shared = jnp.ones((B, T), jnp.int32)
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    q, k, v = (filled(x, length, 1) for x in (q, k, v))
    numbers = None if shared is None else filled(shared, length, 1)
    block_q, block_k = next(blocks for widest, blocks in GPU_BLOCKS.items() if q.shape[3] <= widest)
    blocks = dataclasses.replace(kernel.BlockSizes.get_default(), block_q=block_q, block_k=block_k)
    out = kernel.mha(q, k, v, numbers, sm_scale=scale, causal=is_causal, block_sizes=blocks, interpret=interpret)
    return _real(out[:, :T], ids)


def _gpu_kernel() -> Any:
    """JAX's module of the GPU kernel, or None where it no longer has it."""
    with warnings.catch_warnings():
        # JAX 0.12 warns that the module will be removed.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            from jax.experimental.pallas.ops.gpu import attention
        except ImportError:
            return None
    return attention


def _real(out: Array, ids: Ids | None) -> Array:
    """Zeros for queries without a segment, whose gradients are then zero too."""
    return out if ids is None else jnp.where((ids[0] != 0)[:, :, None, None], out, 0)


def _tpu_block(length: int) -> int:
    return next((size for size in TPU_BLOCKS if _up_to(length, size) * 8 <= length * 9), TPU_BLOCKS[-1])


def _up_to(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
