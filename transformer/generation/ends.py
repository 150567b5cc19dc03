"""The tokens that end a text: one, or several of which any does.

B batch, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax.numpy as jnp

from transformer.types import Array, Bool, Float, Int

EndOfText = int | Iterable[int] | None
"""One id, several, or None if no token ends a text."""


def ends_of(end_of_text: EndOfText) -> tuple[int, ...]:
    """The ids as a tuple, each once; a finished row is filled with the first of them."""
    if end_of_text is None:
        return ()
    if isinstance(end_of_text, Iterable):
        return tuple(dict.fromkeys(map(int, end_of_text)))
    return (int(end_of_text),)


def is_end(tokens: Int[Array, "*dims"], ends: tuple[int, ...]) -> Bool[Array, "*dims"]:
    """Which of the tokens end a text."""
    found = jnp.zeros(tokens.shape, bool)
    for end in ends:
        found |= tokens == end
    return found


def first_end_for_all(log_probs: Float[Array, "*dims V"], ends: tuple[int, ...]) -> Float[Array, "*dims V"]:
    """The scores of the next tokens where the first end has the score of the likeliest end, and the others have -inf.

    So a text that ends is one hypothesis, whichever token ends it.
    """
    if len(ends) < 2:
        return log_probs
    best = jnp.max(log_probs[..., jnp.array(ends)], axis=-1)
    return log_probs.at[..., jnp.array(ends[1:])].set(-jnp.inf).at[..., ends[0]].set(best)


def before_end(tokens: Sequence[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens before the first that ends the text; all of them if none does."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])
