"""Which of a model's parameters are trained, and which are frozen."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from transformer.errors import UserError
from transformer.layers.adapter import AdapterConfig, is_adapter
from transformer.pipeline import is_stacked

ParameterPath = tuple[Any, ...]


BELOW = frozenset(
    ("embed", "source_embed", "positions", "source_positions", "types", "embed_norm", "embedding_projection")
)
"""First names of the parameters below a model's blocks."""


@dataclasses.dataclass(frozen=True)
class TrainableMask:
    """All parameters except frozen ones, which have no gradient and no optimiser statistics."""

    frozen: frozenset[ParameterPath] = frozenset()

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """The trained and the frozen part of a model's parameters."""
        if not self.frozen:
            return params, nnx.State({})
        flat = dict(nnx.to_flat_state(params))
        parts = [
            {path: leaf for path, leaf in flat.items() if (path in self.frozen) == frozen} for frozen in (False, True)
        ]
        return nnx.from_flat_state(parts[0]), nnx.from_flat_state(parts[1])

    def select(self, params: nnx.State) -> nnx.State:
        """The trained part."""
        return self.split(params)[0]

    def merge(self, trained: nnx.State, params: nnx.State) -> nnx.State:
        """`params` with another trained part."""
        return nnx.merge_state(trained, self.split(params)[1]) if self.frozen else trained

    def counted(self, params: nnx.State) -> str:
        """The number of parameters and of trained ones, as text."""
        total, trained = size(params), size(self.select(params))
        if not self.frozen:
            return f"{total:,} parameters"
        return f"{trained:,} of {total:,} parameters ({trained / total:.1%}) trained"

    def flops_factor(self, params: nnx.State) -> float:
        """The matrix products of a training step, in units of forward passes: the forward pass itself; the gradients of
        activations, unless only heads are trained; and those of parameters, by the fraction that is trained."""
        trained = self.select(params)
        share = size(trained) / size(params)
        is_stack = any(is_stacked(leaf) for _, leaf in nnx.to_flat_state(params))
        deep = any(is_stacked(leaf) or path[0] in BELOW for path, leaf in nnx.to_flat_state(trained))
        return 2 + share if deep or not is_stack else 1 + 2 * share


ALL = TrainableMask()


_FRESH = ("pooled_head.*", "token_head.*", "embedding_head.*")
"""Heads over classes, and layers on embeddings, which are usually not pretrained."""


def chosen(params: nnx.State, freeze: Sequence[str], adapter: AdapterConfig | None) -> TrainableMask:
    """The parameters that a config trains.

    Args:
        params: the model's, or their description.
        freeze: patterns of dotted paths, such as `layers.blocks.attention.*` (`fnmatch`).
        adapter: if given, only its parameters and those it names are trained.

    Raises:
        UserError: a pattern that matches no parameter, or no parameter left to train.
    """
    paths = {dotted(path): path for path, _ in nnx.to_flat_state(params)}
    frozen = {path for pattern in freeze for path in _matching(paths, pattern, "optimizer.freeze")}
    if adapter is not None:
        fresh = tuple(pattern for pattern in _FRESH if fnmatch.filter(paths, pattern))
        also = fresh if adapter.train_also is None else adapter.train_also
        kept = {path for pattern in also for path in _matching(paths, pattern, "adapter.train_also")}
        frozen |= {path for path in paths.values() if not is_adapter(path)} - kept
    if len(frozen) == len(paths):
        raise UserError(f"optimizer.freeze: got {list(freeze)}, which leaves no parameter to train; remove a pattern")
    return TrainableMask(frozenset(frozen))


def _matching(paths: Mapping[str, ParameterPath], pattern: str, field: str) -> set[ParameterPath]:
    """Paths that a pattern matches."""
    found = {paths[name] for name in fnmatch.filter(paths, pattern)}
    if not found:
        near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
        raise UserError(f"{field}: {pattern!r} matches no parameter; the nearest are {', '.join(near)}")
    return found


def dotted(path: ParameterPath) -> str:
    """A parameter's path in dotted form."""
    return ".".join(map(str, path))


def size(params: nnx.State | Mapping[ParameterPath, nnx.Variable]) -> int:
    """Total number of elements of all parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
