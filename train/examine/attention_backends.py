"""Which backend of attention each kind of layer takes, on the devices at hand and on others, and why not a faster one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from transformer.attention.backends.cudnn import HOPPER
from transformer.attention.dispatch import BACKENDS, PREFERENCE, choose_backend, listening
from transformer.attention.spec.predicates import Either
from transformer.attention.spec.shapes import AttentionShapes

PLATFORMS: dict[str, dict[str, Any]] = {
    "GPU": {"platform": "gpu", "compute_capability": HOPPER},
    "TPU": {"platform": "tpu"},
}
"""In addition to the devices at hand; the GPU is one of the Hopper generation or newer."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a kind of layer takes."""

    call: str
    """What it asks of attention, as text."""
    here: str
    """The backend on the devices at hand."""
    elsewhere: tuple[tuple[str, str], ...]
    """For each of `PLATFORMS`, its name and the backend."""
    reasons: tuple[str, ...]
    """Why not a faster backend: one text for each that a device prefers, and cannot use."""


def choices_of(trace: Callable[[], object]) -> list[Choice]:
    """The different choices of the calls of attention that `trace` makes, in the order of the first of each.

    Args:
        trace: traces a model, such as `jax.eval_shape` of its loss.
    """
    found: dict[Choice, None] = {}
    with listening(lambda backend, request: found.setdefault(_choice(backend, request))):
        trace()
    return list(found)


def _choice(backend: str, request: AttentionShapes) -> Choice:
    elsewhere, reasons = [], dict[str, None]()
    own = [("", request)] if request.platform != "cpu" else []
    others = [(name, dataclasses.replace(request, **device)) for name, device in PLATFORMS.items()]
    for name, asked in own + others:
        taken = backend if not name else choose_backend("auto", asked)
        for faster in PREFERENCE[asked.platform]:
            if faster == taken:
                break
            if (why := BACKENDS[faster].supports(asked)) is not None and faster != "xla":
                reasons.setdefault(f"{faster}: {why}")
        if name:
            elsewhere.append((name, taken))
    return Choice(_described(request), backend, tuple(elsewhere), tuple(reasons))


def _described(request: AttentionShapes) -> str:
    """Heads, lengths, mask and scores of a call."""
    r, score = request, request.spec.score
    heads = f"{r.num_heads}" if r.num_kv_heads == r.num_heads else f"{r.num_heads} over {r.num_kv_heads}"
    parts = [f"{heads} heads of {r.head_dim}, {r.num_queries} × {r.num_keys}", _mask(request)]
    parts += ["a bias"] if score.bias_BNTS is not None else []
    parts += ["a score function"] if score.mod is not None else []
    parts += ["a soft cap"] if score.soft_cap is not None else []
    parts += ["dropout"] if request.spec.dropout is not None else []
    return ", ".join(parts)


def _mask(request: AttentionShapes) -> str:
    names = [_term(term) for term in request.spec.mask.predicates]
    return " and ".join(dict.fromkeys(names)) or "all pairs"


def _term(term: Any) -> str:
    if isinstance(term, Either):
        sides = (" and ".join(map(_term, side)) for side in (term.one, term.other))
        return f"({' or '.join(sides)})"
    return type(term).__name__.lower()
