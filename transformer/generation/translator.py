"""Translation: sources in, hypotheses out, for every model that encodes a source and decodes step by step.

B batch, R = B times beams, S source position.

A model needs three methods: `encode(source_tokens_BS, source_segments_BS=...)`, which returns a memory;
`begin(memory, max_length)`, which returns a state; and `step(token_B, state, memory)`, which returns the next token's logits
and the next state. Memory and state are pytrees whose arrays all have a leading B.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import UserError
from transformer.functional import ModelFactory, graphdef_of
from transformer.generation.beam import Beams, BeamSearch, Hypothesis, beam_search, hypotheses, sample_translations
from transformer.generation.decoding import for_decoding
from transformer.generation.ends import EndOfText, ends_of
from transformer.generation.inputs import check_count, check_rows, check_seed
from transformer.generation.sampling import Sampling
from transformer.layers.mixture_of_experts import without_limit
from transformer.types import Array

LENGTH_MULTIPLE = 16
"""Sources and translations are padded to a multiple of this, so that one compiled program serves many lengths."""
MAX_RATIO = 2.0
"""Maximum number of tokens of a translation for each source token, if no other limit is given."""


class Translator:
    """Compiled translation for one model; the parameters are passed at each call.

    Args:
        make_model: makes the model, which has `encode`, `begin` and `step`.
        start_token: the token that the decoder reads first.
        end_of_text: the token that ends a translation, or several of which any does.
        num_tokens: number of valid target token ids, if the vocabulary is padded; other ids are never generated.
        batch_size: maximum number of sources translated at a time.

    Raises:
        ValueError: an end of text that can never be generated.
    """

    def __init__(
        self,
        make_model: ModelFactory,
        *,
        start_token: int,
        end_of_text: EndOfText,
        num_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        self.ends = ends_of(end_of_text)
        if not self.ends or (num_tokens is not None and not all(0 <= end < num_tokens for end in self.ends)):
            raise ValueError(f"Translator: end_of_text={end_of_text} is not one of the {num_tokens} tokens")
        self.start_token, self.num_tokens = start_token, num_tokens
        self.batch_size = batch_size
        self._graphdef = graphdef_of(lambda rngs: without_limit(make_model(rngs)))
        config = getattr(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))), "config", None)
        self._max_length: int | None = getattr(config, "max_length", None)
        self._source_vocab: int | None = getattr(config, "source_vocab_size", getattr(config, "vocab_size", None))
        self._run = jax.jit(self._run_impl, static_argnames=("width", "how"))

    def translate(
        self,
        params: nnx.State,
        sources: Sequence[Sequence[int]],
        *,
        max_tokens: int | None = None,
        max_ratio: float | None = None,
        search: BeamSearch | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> list[list[Hypothesis]]:
        """The best translations of each source, or one random sample.

        A source's translations do not depend on the rest of the batch. There may be fewer than `num_best`.

        Args:
            params: the model's `nnx.Param` state.
            sources: token ids in the form that the model was trained on, including any end token; none may be empty.
            max_tokens: maximum number of tokens of a translation.
            max_ratio: maximum number of tokens of a translation for each source token, with 8 more added; 2 if there is no
                `max_tokens` either. With both, the lower limit applies.
            search: the search's settings; `BeamSearch()` by default.
            sampling: sample with these settings instead of searching.
            seed: of the sampling.

        Raises:
            UserError: an empty source, a value that is not a token id, more tokens than the model's context, an invalid count or
                seed, both a search and a sampling, or a coverage penalty for a model without weights.
        """
        if search is not None and sampling is not None:
            raise UserError("search and sampling: give one of them")
        check_seed(seed)
        how = sampling or search or BeamSearch()
        self._check(sources, max_tokens, max_ratio)
        limits = [self._limit(len(source), max_tokens, max_ratio) for source in sources]
        key = jax.random.key(seed)
        results: list[list[Hypothesis]] = [[] for _ in sources]
        # Sources of similar length share a batch.
        order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            # A power of two, so that few programs are compiled; rows that only fill the group up end at once.
            size = min(1 << (len(group) - 1).bit_length(), self.batch_size)
            S = self._padded(max(len(sources[index]) for index in group))
            tokens_BS, segments_BS = np.zeros((size, S), np.int32), np.zeros((size, S), np.int32)
            limit_B, index_B = np.zeros(size, np.int32), np.zeros(size, np.uint32)
            for row, index in enumerate(group):
                length = len(sources[index])
                tokens_BS[row, :length], segments_BS[row, :length] = sources[index], 1
                limit_B[row], index_B[row] = limits[index], index
            # A row of padding alone would not be a valid sentence.
            segments_BS[len(group) :, 0] = 1
            width = -(-int(limit_B.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
            found = jax.device_get(
                self._run(params, tokens_BS, segments_BS, limit_B, index_B, key, width=width, how=how)
            )
            for row, index in enumerate(group):
                results[index] = hypotheses(found, row)
        return results

    def _run_impl(
        self,
        params: nnx.State,
        tokens_BS: Array,
        segments_BS: Array,
        limit_B: Array,
        index_B: Array,
        key: Array,
        *,
        width: int,
        how: BeamSearch | Sampling,
    ) -> Beams:
        # Once before the loop, rather than once per token.
        model = for_decoding(nnx.merge(self._graphdef, params))
        beams = how.beams if isinstance(how, BeamSearch) else 1
        weighs = isinstance(how, BeamSearch) and how.coverage_penalty > 0
        memory = model.encode(tokens_BS, source_segments_BS=segments_BS)
        # All beams of a source share its memory, so that only the state has to be reordered.
        memory = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), memory)

        def step(token_R: Array, state: Any) -> tuple[Array, Any, Array | None]:
            if weighs:
                return model.step(token_R, state, memory, return_weights=True)
            return (*model.step(token_R, state, memory), None)

        # The last of `width` tokens is read too, so that the end token can follow it.
        room = width + 1 if self._max_length is None else min(width + 1, self._max_length)
        state = model.begin(memory, room)
        start_B = jnp.full(limit_B.shape, self.start_token, jnp.int32)
        options: dict[str, Any] = {
            "width": width, "end_of_text": self.ends, "num_tokens": self.num_tokens
        }  # fmt: skip
        if isinstance(how, BeamSearch):
            return beam_search(step, state, start_B, limit_B, search=how, valid_BS=segments_BS != 0, **options)
        keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(index_B)
        return sample_translations(step, state, start_B, limit_B, keys_B, sampling=how, **options)

    def _padded(self, length: int) -> int:
        padded = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        return padded if self._max_length is None else min(padded, self._max_length)

    def _limit(self, source_length: int, max_tokens: int | None, max_ratio: float | None) -> int:
        """Maximum number of tokens of a translation; the model reads a start token before them."""
        limits = [] if max_tokens is None else [max_tokens]
        if max_ratio is not None or max_tokens is None:
            limits.append(math.ceil((MAX_RATIO if max_ratio is None else max_ratio) * source_length) + 8)
        if self._max_length is not None:
            limits.append(max(self._max_length - 1, 1))
        return min(limits)

    def _check(self, sources: Any, max_tokens: Any, max_ratio: Any) -> None:
        """Raise a `UserError` for arguments that `translate` cannot handle, whatever their type."""
        check_rows("source", sources, self._source_vocab)
        for index, source in enumerate(sources):
            if self._max_length is not None and len(source) > self._max_length:
                raise UserError(
                    f"source {index + 1}: {len(source)} tokens exceed the model's context of {self._max_length}"
                )
        if max_tokens is not None:
            check_count("max_tokens", max_tokens)
        if max_ratio is not None and not (_is_number(max_ratio) and 0 < max_ratio < math.inf):
            raise UserError(f"max_ratio: got {max_ratio!r}; allowed: a number above 0")
        if max_tokens is not None and self._max_length is not None and max_tokens >= self._max_length:
            raise UserError(
                f"max_tokens: got {max_tokens}; a model with a context of {self._max_length} writes at most "
                f"{self._max_length - 1}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
