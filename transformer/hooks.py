"""Hooks: values at named places of a model, kept or changed on their way.

A stack of blocks has the places `embed` (its input), `layers.3.attention.heads` (what each head of layer 3 reads, before the
output projection), `layers.3.attention.out` and `layers.3.mlp.out` (what a sublayer adds to the residual stream), `layers.3.out`
(the stream after the layer) and `final` (after the final norm); with attention to a memory also `layers.3.cross.heads` and
`layers.3.cross.out`. The stacks of an encoder-decoder have `encoder.` or `decoder.` before these names. The places
`layers.3.attention.weights` (or `cross`), `positions` and `segments` can be kept, not changed.

B batch, T position, D embed, N query heads, H features of a head's output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from transformer.errors import nearest
from transformer.types import Array

_ONLY_KEPT = ("weights", "positions", "segments")

Change = Callable[[Array], Array]
"""A function of the value at a place, [B, T, D] or [B, T, N, H], that gives the value to continue with, of the same shape."""


class Hooks:
    """What to change and what to keep during one call of a model (`transformer.models.layer_stack.hooked`).

    Layers with hooks run one by one. Made anew for each call, or, under `jax.jit`, within the function that is traced.

    Args:
        change: by place.
        keep: places whose values, after any change, are in `kept` after the call.

    Raises:
        ValueError: a change at a place whose value can only be kept.
    """

    def __init__(self, change: Mapping[str, Change] | None = None, keep: Collection[str] = ()) -> None:
        self._change, self._keep, self._prefix = dict(change or {}), frozenset(keep), ""
        for place in self._change:
            if place.rpartition(".")[2] in _ONLY_KEPT:
                raise ValueError(f"change: {place!r} can be kept, not changed")
        self._met: set[str] = set()
        self.kept: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        """The value to continue with at a place."""
        place = self._prefix + name
        self._met.add(place)
        if place in self._change:
            value = self._change[place](value)
        if place in self._keep:
            self.kept[place] = value
        return value

    def wants(self, name: str) -> bool:
        """Whether the value at a place is kept: attention weights are computed only then."""
        return self._prefix + name in self._keep

    def check(self) -> None:
        """Call it after the model: a place that the model does not have would change and keep nothing, silently.

        Raises:
            ValueError: the model did not meet some of the places to change or to keep.
        """
        missing = sorted((self._keep | self._change.keys()) - self._met)
        if missing:
            named = " ".join(f"{place!r} was not met.{nearest(place, self._met)}" for place in missing)
            raise ValueError(f"hooks: {named} A mixer passes its heads through `context.at('heads', ...)`")

    def inside(self, name: str) -> Hooks:
        """The same hooks for a part of the model: the names of its places begin with `name` and a dot."""
        part = Hooks()
        part._change, part._keep, part.kept, part._met = self._change, self._keep, self.kept, self._met
        part._prefix = f"{self._prefix}{name}."
        return part
