"""A model in the form that decoding reads fastest, and the sizes that its programs are compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from transformer.layers.embedding import Embedding
from transformer.layers.linear import Linear
from transformer.layers.mixture_of_experts import MixtureOfExperts
from transformer.mixers.registry import MixerConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.mixers.state import KVCache, MatrixState, State, WindowCache

SMALLEST = 32
"""Prompts and caches are padded to at least this length."""
SHORT_CACHE = 512
"""Up to this length a cache is made for all tokens to come; beyond it, it grows with what it holds."""


def for_decoding(model: Any) -> Any:
    """The model for steps of one token: with separate blocks, if it has a stack of them, and with every large array in the type
    that its layer computes in.

    A step reads each weight once, so its time is that of reading them: casts are made once, and not once per token.
    """
    # A copy with its own variables, so that the given model keeps its arrays.
    model = jax.tree.map(lambda leaf: leaf, model.unstacked() if hasattr(model, "unstacked") else model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Embedding | MixtureOfExperts):
            module.cast_parameters()
    return model


def padded_length(length: int) -> int:
    """The first of 32, 48, 64, 96, 128, 192, ... that is no smaller.

    So few programs serve all lengths, and beyond the first of them at most a third is padding.
    """
    size = SMALLEST
    while size < length:
        # From 2^k to 1.5 · 2^k, and from there to 2^(k+1).
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def cache_length(filled: int, total: int, limit: int, boundary: int | None = None) -> int:
    """The length of a cache that holds `filled` positions, and will hold `total`, of at most `limit`.

    Attention reads all of a cache, so a long one grows as it is filled, by a factor of about two.

    Args:
        boundary: the length beyond which rotary positions have other frequencies (longrope). Keys are stored rotated, so all
            caches of a text are on the side of its `total`.
    """
    room = min(padded_length(min(total, max(2 * filled, SHORT_CACHE))), limit)
    if boundary is None:
        return room
    return min(room, boundary) if total <= boundary else max(room, min(padded_length(boundary + 1), limit))


def room_of(states: Sequence[State]) -> int | None:
    """How many positions the states can hold; None if their sizes do not depend on it."""
    return min((state.room for state in states if not isinstance(state, _OF_ONE_SIZE)), default=None)


def with_room(states: Sequence[State], mixers: Sequence[MixerConfig], room: int) -> list[State]:
    """The states for steps of one token, with room for `room` positions, no fewer than they have.

    A layer with a window keeps what it sees, if that is less.

    Args:
        mixers: configs of the layers.
    """
    return [_with_room(*layer, room) for layer in zip(states, mixers, strict=True)]


def _with_room(state: State, mixer: MixerConfig, room: int) -> State:
    if isinstance(state, _OF_ONE_SIZE):
        return state
    size = mixer.window_size if isinstance(mixer, SoftmaxConfig) else None
    if isinstance(state, KVCache) and size is not None and size < room:
        return WindowCache.of(state, size)
    return state.with_room(room)


_OF_ONE_SIZE = (MatrixState, WindowCache)
