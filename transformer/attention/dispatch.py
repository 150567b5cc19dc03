"""The entry point for softmax attention, and the table of its backends.

B batch, T query position, S key position, N query heads, K key/value heads, H head_dim, C value dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.attention.backends import blockwise, cudnn, pallas, ring, xla
from transformer.attention.backends.reference import attention_weights, reference
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec, Dropout, Score
from transformer.errors import UserError, nearest
from transformer.randomness import seeds_of
from transformer.sharding import axes_size, mesh_axes, platform_of_program
from transformer.types import Array, Float, Keys, wide


class BackendError(UserError, ValueError):
    """A backend that does not exist, or that cannot serve a call."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute attention. `supports` returns the reason why it cannot serve a request, or None."""

    attend: Callable[[Array, Array, Array, AttentionSpec], Array]
    supports: Callable[[AttentionShapes], str | None]


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference, lambda request: None),
    "xla": Backend(xla.xla, xla.supports_xla),
    "cudnn": Backend(cudnn.cudnn, cudnn.supports_cudnn),
    "blockwise": Backend(blockwise.blockwise, lambda request: None),
    "pallas": Backend(lambda *call: pallas.pallas(*call, platform=platform_of_program()), pallas.supports_pallas),
    "ring": Backend(ring.ring, ring.supports_ring),
    "ulysses": Backend(lambda *call: ring.ulysses(*call, attend=_by_auto), ring.supports_ulysses),
}

PREFERENCE = {"gpu": ("cudnn", "xla", "pallas"), "tpu": ("pallas", "xla"), "cpu": ("blockwise",)}
"""What `auto` tries, in order; `xla` only up to `SMALL` weights, and `blockwise` if none of them can serve the call."""

SMALL = 1 << 24
"""Number of weights on a device (rows × heads × queries × keys) from which on an array of them costs more than `blockwise`, which
creates none: 64 MiB in float32."""


def choose_backend(backend: str, request: AttentionShapes) -> str:
    """The backend that serves `request`.

    Raises:
        BackendError: an unknown name, or a named backend that cannot serve the request, and why.
    """
    if backend == "auto":
        if ring.slices_sequence(request):
            # Any other backend gathers the whole sequence on every device, so it has to be named explicitly.
            if reason := BACKENDS["ring"].supports(request):
                raise BackendError(
                    "attention: the sequence is sharded over the mesh, so backend 'auto' means 'ring', which cannot do this: "
                    f"{reason}. Or name a backend that gathers the whole sequence on every device, such as 'blockwise'"
                )
            return "ring"
        return _on_one_device(request)
    if backend not in BACKENDS:
        raise BackendError(
            f"attention backend {backend!r} does not exist; there are auto, {', '.join(BACKENDS)}."
            + nearest(backend, BACKENDS)
        )
    if reason := BACKENDS[backend].supports(request):
        raise BackendError(f"attention backend {backend!r} cannot do this: {reason}")
    return backend


def _on_one_device(request: AttentionShapes) -> str:
    order = PREFERENCE.get(request.platform, PREFERENCE["cpu"])
    if request.pairs > SMALL:
        order = tuple(name for name in order if name != "xla")
    return next((name for name in order if BACKENDS[name].supports(request) is None), "blockwise")


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKC: Float[Array, "B S K C"],
    mask: AttentionMask | None = None,
    bias_BNTS: Float[Array, "B_ N_ T_ S_"] | None = None,
    *,
    score_mod: Callable[..., Any] | None = None,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Keys | None = None,
    backend: str = "auto",
    return_weights: bool | tuple[int, ...] = False,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B n T S"] | None]:
    """Softmax attention (Vaswani et al. 2017, equation 1), multi-head, grouped-query or multi-query depending on K.

    Args:
        q_BTNH, k_BSKH, v_BSKC: queries, keys and values. N must be a multiple of K (Ainslie et al. 2023).
        mask: which keys each query may see; None: all. A query that sees nothing gives zeros.
        bias_BNTS: added to the logits; each dim may be 1.
        score_mod: `(score, b, h, q, k) -> score`, a function of one logit and four integers, after scale, soft-cap and bias
            (Dong et al. 2024). Arrays that it captures get gradients.
        scale: multiplies the logits; 1/√H by default.
        logit_soft_cap: c gives c·tanh(logits / c), before bias and mask.
        dropout_rate, dropout_key: weights are dropped only if a key is given, for the batch or for each row.
        backend: `auto` or a name of `BACKENDS`.
        return_weights: also recompute the weights with `reference` (before dropout); the output is still the backend's.
            A tuple lists the query heads to return; nothing of size T×S is created for the others.

    Returns:
        The output [B, T, N, C] in v's type, and the weights [B, n, T, S] in float32, of all heads or of those
        listed, in their order; or None.

    Raises:
        ValueError: inputs that are not floating-point, shapes that do not fit (the mask's too), a head that does not exist, or
            a named backend that cannot serve the call.
    """
    mask = AttentionMask.none() if mask is None else mask
    _check_inputs(q_BTNH, k_BSKH, v_BSKC, bias_BNTS)
    _check_options(mask, scale, logit_soft_cap, dropout_rate)
    (B, T, N, _), S, C = q_BTNH.shape, k_BSKH.shape[1], v_BSKC.shape[3]
    mask.check(B, N, T, S)
    _check_heads(return_weights, N)
    spec = AttentionSpec(
        mask,
        Score.of(q_BTNH, bias_BNTS, score_mod=score_mod, scale=scale, logit_soft_cap=logit_soft_cap),
        None if dropout_key is None or dropout_rate == 0 else Dropout(seeds_of(dropout_key, B), dropout_rate),
    )
    request = _request(q_BTNH, v_BSKC, spec)
    chosen = choose_backend(backend, request)
    for listener in _LISTENERS:
        listener(backend, chosen, request)
    if 0 in (B, T, S):
        # A softmax over no keys has no maximum.
        heads = N if isinstance(return_weights, bool) else len(return_weights)
        weights = jnp.zeros((B, heads, T, S), wide(q_BTNH.dtype)) if return_weights else None
        return jnp.zeros((B, T, N, C), v_BSKC.dtype), weights
    with jax.named_scope("attend"):
        out = BACKENDS[chosen].attend(q_BTNH, k_BSKH, v_BSKC, spec)
    if not return_weights:
        return out, None
    return out, attention_weights(q_BTNH, k_BSKH, spec, None if isinstance(return_weights, bool) else return_weights)


_LISTENERS: list[Callable[[str, str, AttentionShapes], object]] = []


@contextlib.contextmanager
def listening(listener: Callable[[str, str, AttentionShapes], object]) -> Iterator[None]:
    """Call `listener(name, backend, request)` for each call of `attend` that is traced or run inside: the name that was given,
    such as auto, and the backend that serves it."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def _by_auto(q: Array, k: Array, v: Array, spec: AttentionSpec) -> Array:
    """What `auto` uses if every device has the whole sequence."""
    return BACKENDS[_on_one_device(_request(q, v, spec))].attend(q, k, v, spec)


def _request(q_BTNH: Array, v_BSKC: Array, spec: AttentionSpec) -> AttentionShapes:
    platform = platform_of_program()
    capability = compute_capability() if platform == "gpu" else 0.0
    devices = axes_size(mesh_axes("batch")) * axes_size(mesh_axes("heads"))
    return AttentionShapes.of(q_BTNH, v_BSKC, spec, platform, compute_capability=capability, devices=devices)


def compute_capability() -> float:
    """Of the NVIDIA GPU that the call will run on: that at hand, or, where a program is compiled for absent ones, by its name."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    at_hand = {} if jax.default_backend() != "gpu" else {one.device_kind: one for one in jax.local_devices()}
    if device is None or device.device_kind in at_hand:
        one = next(iter(at_hand.values())) if device is None else at_hand[device.device_kind]
        # An AMD GPU's is not a number.
        found = re.fullmatch(r"\d+\.\d+", str(one.compute_capability))
        return float(found[0]) if found else 0.0
    named = re.search(r"\b(A|L|H|GH|B|GB)\d+", device.device_kind)
    return {"A": 8.0, "L": 8.9, "H": 9.0, "GH": 9.0, "B": 10.0, "GB": 10.0}[named[1]] if named else 0.0


def _check_options(mask: Any, scale: Any, soft_cap: Any, dropout_rate: Any) -> None:
    if not isinstance(mask, AttentionMask):
        given = type(mask).__name__
        raise ValueError(f"attend: mask is a {given}; expected an AttentionMask, such as AttentionMask.explicit(array)")
    numbers = int | float | np.number
    if scale is not None and not isinstance(scale, numbers):
        given = type(scale).__name__
        raise ValueError(f"attend: scale is a {given}; expected a plain number (multiply q by one that is learned)")
    if soft_cap is not None and not (isinstance(soft_cap, numbers) and soft_cap > 0):
        raise ValueError(f"attend: logit_soft_cap={soft_cap!r}; expected a number above 0, or None")
    if not (isinstance(dropout_rate, numbers) and 0 <= dropout_rate < 1):
        raise ValueError(f"attend: dropout_rate={dropout_rate!r}; expected a number from 0 to below 1")


def _check_heads(heads: Any, num_heads: int) -> None:
    if not isinstance(heads, bool | tuple):
        raise ValueError(f"attend: return_weights={heads!r}; expected True, False or a tuple of heads")
    wrong = [] if isinstance(heads, bool) else [head for head in heads if not 0 <= head < num_heads]
    if wrong:
        raise ValueError(f"attend: head {wrong[0]} does not exist; allowed in return_weights: 0 to {num_heads - 1}")


def _check_inputs(q: Any, k: Any, v: Any, bias: Any) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not hasattr(array, "ndim"):
            raise ValueError(f"attend: {name} is a {type(array).__name__}; expected an array with 4 dims")
        if array.ndim != 4:
            raise ValueError(
                f"attend: {name} has shape {array.shape}; expected 4 dims [batch, position, heads, head_dim]"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"attend: {name} is {array.dtype} {array.shape}; expected floating-point numbers")
        if 0 in array.shape[2:]:
            raise ValueError(f"attend: {name} has shape {array.shape}; heads and head_dim must be 1 or more")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attend: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; expected one type")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attend: k has shape {k.shape} and v {v.shape}; they differ before head_dim")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attend: q has shape {q.shape} and k {k.shape}; batch and head_dim must agree")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attend: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if bias is not None:
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise ValueError(f"attend: bias is {bias.dtype} {bias.shape}; expected floats (booleans are a mask's)")
        full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if bias.ndim != 4 or any(size not in (1, whole) for size, whole in zip(bias.shape, full, strict=True)):
            raise ValueError(f"attend: bias has shape {bias.shape}; it must broadcast to [B, N, T, S] = {full}")
