"""Log-probabilities of given tokens under a language model, several texts packed into a row.

B batch, T position, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.data.examples.pack import best_fit_decreasing, with_lengths
from train.objectives.objective import places_of
from transformer.functional import graphdef_of
from transformer.generation.decoding import padded_length
from transformer.layers.mixture_of_experts import without_limit
from transformer.models.gpt import GPT, GPTConfig
from transformer.types import Array

SHORTEST_ROW = 128
BATCH_TOKENS = {"cpu": 1024}
"""Tokens in one call of the model, by JAX's backend."""
_LARGE_BATCH = 16_384


class Scored(NamedTuple):
    """The tokens of one text after its first."""

    log_probabilities: np.ndarray
    """[n - 1] float32: of each token, after those before it."""
    is_likeliest: np.ndarray
    """[n - 1] bool: whether no other token is likelier."""


class TokenScorer:
    """A language model that scores texts, compiled once for each length of rows."""

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        # Dropless experts: with a capacity limit a score would depend on the other texts.
        self._graphdef = graphdef_of(lambda rngs: without_limit(GPT(config, rngs=rngs)))
        self._run = jax.jit(self._run_impl)

    def __call__(self, params: nnx.State, texts: Sequence[Sequence[int]]) -> list[Scored]:
        """The scores of texts of up to max_length + 1 token ids; of a text of a single token they are empty."""
        empty = Scored(np.zeros(0, np.float32), np.zeros(0, bool))
        found = [empty] * len(texts)
        sizes = np.array([len(text) - 1 for text in texts], np.int64)
        for owns, batch in self._batches(texts, sizes):
            log_probabilities, is_likeliest = map(np.asarray, self._run(params, batch))
            for row, own in enumerate(owns):
                first = 0
                for number in own:
                    place = slice(first, first + sizes[number])
                    found[number] = Scored(log_probabilities[row, place], is_likeliest[row, place])
                    first += int(sizes[number])
        return found

    def _batches(
        self, texts: Sequence[Sequence[int]], sizes: np.ndarray
    ) -> Iterator[tuple[list[list[int]], dict[str, Array]]]:
        """Batches of rows, and which texts are in each row, one after the other."""
        lengths = np.array([self._row_length(int(size)) for size in sizes], np.int64)
        for length in sorted(set(lengths[sizes > 0].tolist())):
            own = np.flatnonzero((lengths == length) & (sizes > 0))
            rows: dict[int, list[int]] = {}
            for number, row in zip(own.tolist(), best_fit_decreasing(sizes[own], length).tolist(), strict=True):
                rows.setdefault(row, []).append(number)
            filled = [rows[row] for row in sorted(rows)]
            count = max(1, BATCH_TOKENS.get(jax.default_backend(), _LARGE_BATCH) // length)
            for first in range(0, len(filled), count):
                some = filled[first : first + count]
                yield some, self._arrays(texts, some, count, length)

    def _arrays(
        self, texts: Sequence[Sequence[int]], rows: list[list[int]], count: int, length: int
    ) -> dict[str, Array]:
        names = ("tokens", "targets", "segments", "positions")
        batch = {name: np.zeros((count, length), np.int32) for name in names}
        for row, own in enumerate(rows):
            first = 0
            for rank, number in enumerate(own):
                ids = np.asarray(texts[number], np.int32)
                place = slice(first, first + len(ids) - 1)
                batch["tokens"][row, place], batch["targets"][row, place] = ids[:-1], ids[1:]
                batch["segments"][row, place] = rank + 1
                batch["positions"][row, place] = np.arange(len(ids) - 1)
                first = place.stop
        most = max(map(len, rows))
        return {name: jnp.asarray(array) for name, array in with_lengths(batch, most).items()}

    def _row_length(self, size: int) -> int:
        return min(max(SHORTEST_ROW, padded_length(size)), self.config.max_length)

    def _run_impl(self, params: nnx.State, batch: dict[str, Array]) -> tuple[Array, Array]:
        model = nnx.merge(self._graphdef, params)
        logits_BTV = model(batch["tokens"], **places_of(batch)).logits.astype(jnp.float32)
        wanted_BT1 = batch["targets"][..., None]
        own_BT = jnp.take_along_axis(logits_BTV, wanted_BT1, axis=-1)[..., 0]
        return own_BT - jax.nn.logsumexp(logits_BTV, axis=-1), logits_BTV.argmax(-1) == batch["targets"]
