"""`manyheads-bench attention --support`: what each backend of softmax attention can do, as a Markdown table.

Made from the backends' own `supports`, for a typical call: bfloat16, heads of 64, 1024 queries and keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

from benchmarks.attention.cases import MASKS
from transformer.attention.backends.cudnn import HOPPER
from transformer.attention.dispatch import BACKENDS
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.mods import Mod
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec, Dropout, Score
from transformer.randomness import seeds_of

LENGTH = 1024


def table() -> str:
    """One column for each backend, one row for each feature, and the platforms of each backend."""
    rows = [["", *BACKENDS], ["---"] * (len(BACKENDS) + 1)]
    for name, changes in _features().items():
        cells = [_platforms(backend, changes) for backend in BACKENDS]
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _platforms(backend: str, changes: dict[str, Any]) -> str:
    with _sequence_axis():
        able = [name for name in ("cpu", "gpu", "tpu") if BACKENDS[backend].supports(_request(name, **changes)) is None]
    return "all" if len(able) == 3 else ", ".join(able).upper() or "–"


def _features() -> dict[str, dict[str, Any]]:
    arrays = jax.eval_shape(lambda: {name: make(LENGTH) for name, make in MASKS.items()})
    features: dict[str, dict[str, Any]] = {f"mask: {name}": {"mask": mask} for name, mask in arrays.items()}
    return features | {
        "bias": {"score": Score(0.125, bias_BNTS=jnp.zeros((1, 1, 1, LENGTH)))},
        "score_mod": {"score": Score(0.125, mod=Mod.score(lambda score, b, h, q, k: score, jnp.float32))},
        "logit soft-cap": {"score": Score(0.125, soft_cap=30.0)},
        "dropout": {"dropout": Dropout(seeds_of(jax.random.key(0), 2), 0.1)},
        "grouped queries": {"num_kv_heads": 4},
        "float32": {"dtype": jnp.dtype(jnp.float32)},
        "head_dim 256": {"head_dim": 256, "value_dim": 256},
        "values of another width": {"value_dim": 32},
        "documents with their lengths": {"mask": AttentionMask.causal() & _documents(8)},
        "padding with its length": {"mask": _documents(1)},
        "a window on both sides": {"mask": AttentionMask.window(left=64, right=64)},
        "an odd length": {"num_queries": 1001, "num_keys": 1001, "mask": MASKS["causal"](1001)},
        "a length of 1000": {"num_queries": 1000, "num_keys": 1000, "mask": MASKS["causal"](1000)},
    }


def _documents(number: int) -> AttentionMask:
    """Packed documents, as many as this in a row."""
    ids = jnp.repeat(jnp.arange(1, number + 1), LENGTH // number)[None]
    return AttentionMask.segments(ids, lengths_BM=jnp.full((1, number), LENGTH // number))


def _request(
    platform: str, mask: Any = None, score: Any = None, dropout: Any = None, **changes: Any
) -> AttentionShapes:
    mask = MASKS["causal"](LENGTH) if mask is None else mask
    request = AttentionShapes(
        platform=platform,
        dtype=jnp.dtype(jnp.bfloat16),
        batch_size=2,
        num_queries=LENGTH,
        num_keys=LENGTH,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        value_dim=64,
        compute_capability=HOPPER,
        spec=AttentionSpec(mask, Score(0.125) if score is None else score, dropout),
    )
    return dataclasses.replace(request, **changes)


@contextlib.contextmanager
def _sequence_axis() -> Iterator[None]:
    """A mesh over which ring and ulysses can shard."""
    mesh = jax.make_mesh((1,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh), nnx.logical_axis_rules((("seq", "sequence"),)):
        yield
