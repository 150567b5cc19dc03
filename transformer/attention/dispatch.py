"""One call for softmax attention, and the table of backends behind it.

B batch, T query position, S key position, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from transformer.attention import blockwise, fused
from transformer.attention.mask import AttentionMask
from transformer.attention.reference import attention_weights, reference
from transformer.errors import UserError, nearest
from transformer.types import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a call asks for, as far as a backend's choice depends on it."""

    platform: str
    dtype: Any
    num_queries: int
    num_keys: int
    head_dim: int
    mask: AttentionMask
    has_bias: bool
    logit_soft_cap: float | None
    dropout: bool


class BackendError(UserError, ValueError):
    """A backend that does not exist, or that cannot serve a call."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute attention. `supports` gives the reason why it cannot serve a request, or None."""

    attend: Callable[..., Array]
    supports: Callable[[Request], str | None]


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference, lambda request: None),
    "xla": Backend(functools.partial(fused.fused, implementation="xla"), fused.supports_xla),
    "cudnn": Backend(functools.partial(fused.fused, implementation="cudnn"), fused.supports_cudnn),
    "blockwise": Backend(blockwise.blockwise, blockwise.supports),
}

PREFERENCE = {"gpu": ("cudnn", "xla", "reference"), "tpu": ("xla", "reference"), "cpu": ("blockwise", "reference")}
"""What `auto` tries, in order."""


def choose_backend(backend: str, request: Request) -> str:
    """The backend that serves `request`.

    Raises:
        BackendError: an unknown name, or a named backend that cannot serve the request, and why.
    """
    if backend == "auto":
        order = PREFERENCE.get(request.platform, PREFERENCE["cpu"])
        return next(name for name in order if BACKENDS[name].supports(request) is None)
    if backend not in BACKENDS:
        raise BackendError(
            f"attention backend {backend!r} does not exist; there are auto, {', '.join(BACKENDS)}."
            + nearest(backend, BACKENDS)
        )
    if reason := BACKENDS[backend].supports(request):
        raise BackendError(f"attention backend {backend!r} cannot do this: {reason}")
    return backend


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: AttentionMask | None = None,
    bias_BNTS: Float[Array, "B_ N_ T_ S_"] | None = None,
    *,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    backend: str = "auto",
    return_weights: bool | tuple[int, ...] = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B n T S"] | None]:
    """Softmax attention (Vaswani et al. 2017, equation 1), multi-head, grouped-query or multi-query by K.

    Args:
        q_BTNH, k_BSKH, v_BSKH: queries, keys and values. N must be a multiple of K (Ainslie et al. 2023).
        mask: who may see whom; None means everyone. A query that sees nothing gives zeros.
        bias_BNTS: added to the logits; each dim may be 1.
        scale: multiplies the logits; 1/√H by default.
        logit_soft_cap: c gives c·tanh(logits / c), before the mask.
        dropout_rate, dropout_key: weights are dropped only where a key is given.
        backend: `auto` or a name of `BACKENDS`.
        return_weights: also recompute the weights through `reference` (before dropout); the output stays the backend's.
            A tuple names the query heads to do it for; nothing of size T×S is made for the others.

    Returns:
        The output [B, T, N, H] in v's type, and the weights [B, n, T, S] in float32, of all heads or of those
        named, in their order; or None.

    Raises:
        ValueError: shapes that do not fit (the mask's too), a head that does not exist, or a named backend that cannot
            serve the call.
    """
    mask = AttentionMask.none() if mask is None else mask
    _check_shapes(q_BTNH, k_BSKH, v_BSKH, bias_BNTS)
    mask.check(q_BTNH.shape[1], k_BSKH.shape[1])
    _check_heads(return_weights, q_BTNH.shape[2])
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    dropout = dropout_rate > 0 and dropout_key is not None
    request = Request(
        platform=_platform(),
        dtype=q_BTNH.dtype,
        num_queries=q_BTNH.shape[1],
        num_keys=k_BSKH.shape[1],
        head_dim=q_BTNH.shape[-1],
        mask=mask,
        has_bias=bias_BNTS is not None,
        logit_soft_cap=logit_soft_cap,
        dropout=dropout,
    )
    options: dict[str, Any] = {}
    if logit_soft_cap is not None:
        options["logit_soft_cap"] = logit_soft_cap
    if dropout:
        options |= {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    with jax.named_scope("attend"):
        chosen = BACKENDS[choose_backend(backend, request)]
        out = chosen.attend(q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS, scale=scale, **options)
    if not return_weights:
        return out, None
    if not isinstance(return_weights, bool):
        q_BTNH, k_BSKH, mask, bias_BNTS = _of_heads(return_weights, q_BTNH, k_BSKH, mask, bias_BNTS)
    return out, attention_weights(q_BTNH, k_BSKH, mask, bias_BNTS, scale=scale, logit_soft_cap=logit_soft_cap)


def _of_heads(
    heads: tuple[int, ...], q: Array, k: Array, mask: AttentionMask, bias: Array | None
) -> tuple[Array, Array, AttentionMask, Array | None]:
    """The same call with some query heads alone, each beside its own copy of the keys that its group shares."""
    index = np.array(heads, int)

    def pick(x: Array) -> Array:
        return x if x.shape[1] == 1 else x[:, index]

    # Term by term, so that their conjunction too is of the chosen heads alone.
    terms = (AttentionMask((term,)).materialize(q.shape[1], k.shape[1]) for term in mask.terms)
    picked = (AttentionMask.explicit(pick(term)) for term in terms if term is not None)
    mask = functools.reduce(operator.and_, picked, AttentionMask.none())
    group = q.shape[2] // k.shape[2]
    return q[:, :, index], k[:, :, index // group], mask, None if bias is None else pick(bias)


def _platform() -> str:
    """The platform that the call will run on: the mesh's in force, or the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform == "cuda" else platform


def _check_heads(heads: bool | tuple[int, ...], num_heads: int) -> None:
    wrong = [] if isinstance(heads, bool) else [head for head in heads if not 0 <= head < num_heads]
    if wrong:
        raise ValueError(f"attend: there is no head {wrong[0]}; allowed in return_weights: 0 to {num_heads - 1}")


def _check_shapes(q: Array, k: Array, v: Array, bias: Array | None) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(
                f"attend: {name} has shape {array.shape}; expected 4 dims [batch, position, heads, head_dim]"
            )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attend: k has shape {k.shape} and v {v.shape}; they differ before head_dim")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attend: q has shape {q.shape} and k {k.shape}; batch and head_dim must agree")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attend: {q.shape[2]} query heads are no multiple of {k.shape[2]} key/value heads")
    if bias is not None:
        full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if bias.ndim != 4 or any(size not in (1, whole) for size, whole in zip(bias.shape, full, strict=True)):
            raise ValueError(f"attend: bias has shape {bias.shape}; it must broadcast to [B, N, T, S] = {full}")
