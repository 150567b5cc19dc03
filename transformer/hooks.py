"""Hooks: values at named places of a model, kept or changed on their way.

A stack of blocks has the places `embed` (its input), `layers.3.attention.heads` (what each head of layer 3 reads, before the
output projection), `layers.3.attention.out` and `layers.3.mlp.out` (what a sublayer adds to the residual stream), `layers.3.out`
(the stream after the layer) and `final` (after the final norm); with attention to a memory also `layers.3.cross.heads` and
`layers.3.cross.out`. The stacks of an encoder-decoder have `encoder.` or `decoder.` before these names. The places
`layers.3.attention.weights` (or `cross`), `positions` and `segments` can be kept, but a change of them has no effect.

B batch, T position, D embed, N query heads, H features of a head's output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from transformer.types import Array

Change = Callable[[Array], Array]
"""A function of the value at a place, [B, T, D] or [B, T, N, H], that gives the value to continue with, of the same shape."""


class Hooks:
    """What to change and what to keep during one call of a model (`transformer.models.layer_stack.hooked`).

    Layers with hooks run one by one. Made anew for each call, or, under `jax.jit`, within the function that is traced.

    Args:
        change: by place.
        keep: places whose values, after any change, are in `kept` after the call.
    """

    def __init__(self, change: Mapping[str, Change] | None = None, keep: Collection[str] = ()) -> None:
        self._change, self._keep, self._prefix = dict(change or {}), frozenset(keep), ""
        self.kept: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        """The value to continue with at a place."""
        place = self._prefix + name
        if place in self._change:
            value = self._change[place](value)
        if place in self._keep:
            self.kept[place] = value
        return value

    def wants(self, name: str) -> bool:
        """Whether the value at a place is kept: attention weights are computed only then."""
        return self._prefix + name in self._keep

    def inside(self, name: str) -> Hooks:
        """The same hooks for a part of the model: the names of its places begin with `name` and a dot."""
        part = Hooks()
        part._change, part._keep, part.kept = self._change, self._keep, self.kept
        part._prefix = f"{self._prefix}{name}."
        return part
