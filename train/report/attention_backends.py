"""Which backend of attention each kind of layer takes, on the devices at hand and on others, and why not a faster one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from transformer.attention.backends.cudnn import HOPPER
from transformer.attention.dispatch import BACKENDS, PREFERENCE, BackendError, choose_backend, listening
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
    own_reasons: tuple[str, ...]
    """Why not a faster one there."""
    elsewhere: tuple[tuple[str, str], ...]
    """For each of `PLATFORMS`, its name and the backend."""
    reasons: tuple[str, ...]
    """Why not a faster one, on any of these devices: a text for each that it prefers, and cannot use."""


@contextlib.contextmanager
def choices() -> Iterator[dict[Choice, None]]:
    """The different choices of the calls of attention that are traced inside, in the order of the first of each."""
    found: dict[Choice, None] = {}
    with listening(lambda *call: found.setdefault(_choice(*call))):
        yield found


def in_a_line(found: Iterable[Choice]) -> str:
    """The backends on the devices at hand, with the kinds of layer if they differ, and why not a faster one."""
    found = list(found)
    several = len({one.here for one in found}) > 1
    parts = dict[str, None]()
    for one in found:
        why = f", since {'; '.join(one.own_reasons)}" if one.own_reasons else ""
        parts.setdefault(f"{one.here} ({one.call}){why}" if several else f"{one.here}{why}")
    return f"attention: {'; '.join(parts)}"


def _choice(named: str, backend: str, request: AttentionShapes) -> Choice:
    elsewhere, reasons = [], dict.fromkeys(_reasons(request, backend) if named == "auto" else ())
    own = tuple(reasons)
    for name, device in PLATFORMS.items():
        asked = dataclasses.replace(request, **device)
        try:
            taken = choose_backend(named, asked)
        except BackendError:
            taken = "–"
        elsewhere.append((name, taken))
        if named == "auto":
            reasons |= dict.fromkeys(_reasons(asked, taken))
    return Choice(_described(request), backend, own, tuple(elsewhere), tuple(reasons))


def _reasons(request: AttentionShapes, taken: str) -> Iterator[str]:
    """Why the platform's backends that come before the one taken cannot serve the call; xla may be able to."""
    for faster in PREFERENCE.get(request.platform, ()):
        if faster == taken:
            return
        if faster != "xla" and (why := BACKENDS[faster].supports(request)) is not None:
            yield f"{faster}: {why}"


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
