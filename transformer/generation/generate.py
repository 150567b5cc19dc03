"""Generation: one jitted prefill over the prompts, then jitted steps over states of fixed shapes.

B batch, T prompt position, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.generation.beam import Beams, BeamSearch, Hypothesis, beam_search, hypotheses
from transformer.generation.decoding import cache_length, for_decoding, padded_length, room_of, with_room
from transformer.generation.ends import EndOfText, before_end, ends_of, is_end
from transformer.generation.inputs import check_count, check_rows, check_seed
from transformer.generation.sampling import Sampling, next_token
from transformer.layers.mixture_of_experts import without_limit
from transformer.mixers.state import State
from transformer.models.gpt import GPT, GPTConfig
from transformer.models.layer_stack import cache_lengths
from transformer.types import Array, Bool, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerationState:
    """The state of a batch between two tokens."""

    states: list[State]
    """One per layer."""
    logits_BV: Float[Array, "B V"]
    """Scores of the next token."""
    done_B: Bool[Array, " B"]
    seen_BV: Bool[Array, "B V"] | None
    """Tokens that already occur in the row; only with a repetition penalty."""
    keys_B: Key[Array, " B"]


class Generator:
    """Compiled generation for one model; the parameters are passed at each call.

    Args:
        config: the model's config.
        end_of_text: the token that ends a row, or several of which any does; None if no such token exists.
        num_tokens: number of valid token ids, if the model's vocabulary is padded; other ids are never generated.
    """

    def __init__(self, config: GPTConfig, *, end_of_text: EndOfText = None, num_tokens: int | None = None) -> None:
        self.num_tokens = config.vocab_size if num_tokens is None else num_tokens
        self.config = dataclasses.replace(config, remat="none")
        self.ends = ends_of(end_of_text)
        self._fill = self.ends[0] if self.ends else 0

        def make(rngs: nnx.Rngs) -> GPT:
            # Dropless experts: with a capacity limit a token would depend on later ones, and on padding.
            return without_limit(GPT(self.config, rngs=rngs))

        self._graphdef = graphdef_of(make)
        self._decoding_graphdef = graphdef_of(lambda rngs: for_decoding(make(rngs)))
        self._for_decoding = jax.jit(lambda params: nnx.split(for_decoding(nnx.merge(self._graphdef, params)))[1])
        self._prefill = jax.jit(self._prefill_impl, static_argnames=("max_length", "sampling"))
        self._search = jax.jit(self._search_impl, static_argnames=("max_length", "width", "search"))
        self._decode = jax.jit(self._decode_impl, static_argnames=("width", "sampling"), donate_argnames="state")
        self._grow = jax.jit(with_room, static_argnames=("mixers", "room"))

    def generate(
        self,
        params: nnx.State,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        chunk: int | None = None,
    ) -> Iterator[Int[np.ndarray, "B n"]]:
        """Continue every prompt; yields the new tokens of all rows, one chunk at a time.

        A finished row is filled with the first `end_of_text`. Row b's tokens depend only on the model, its prompt, the seed and
        b, and not on the rest of the batch; with longrope also on whether the longest row ends beyond its boundary.

        Args:
            params: the model's `nnx.Param` state.
            prompts: token ids; rows may differ in length, none may be empty.
            max_tokens: maximum number of new tokens for each prompt.
            chunk: number of tokens in each result, for streaming; all tokens at once by default.

        Raises:
            UserError: no prompts, an empty one, a value that is not a token id, more tokens than the model's context, or an
                invalid count or seed.
        """
        check_seed(seed)
        if chunk is not None:
            check_count("chunk", chunk)
        sampling = Sampling() if sampling is None else sampling
        self.check(prompts, max_tokens)
        longest = max(map(len, prompts))
        max_length = self._room(longest, longest + max_tokens)
        tokens_BT, lengths_B = self._padded(prompts, max_length)
        key = jax.random.key(seed)
        state = self._prefill(params, tokens_BT, lengths_B, key, max_length=max_length, sampling=sampling)
        return self._chunks(params, state, longest, max_tokens, min(chunk or max_tokens, max_tokens), sampling)

    def _chunks(
        self, params: nnx.State, state: GenerationState, longest: int, max_tokens: int, chunk: int, sampling: Sampling
    ) -> Iterator[Int[np.ndarray, "B n"]]:
        ready, width = self._for_decoding(params), padded_length(chunk)
        total, fill = longest + max_tokens, self._fill
        for start in range(0, max_tokens, chunk):
            tokens_Bn = np.full((len(state.done_B), min(chunk, max_tokens - start)), fill, np.int32)
            written, is_done = 0, False
            while written < tokens_Bn.shape[1] and not is_done:
                filled = longest + start + written
                room = room_of(state.states)
                if room == filled:
                    room = self._room(filled + 1, total)
                    state = dataclasses.replace(state, states=self._grow(state.states, self.config.mixers(), room))
                left = tokens_Bn.shape[1] - written
                count = left if room is None else min(left, room - filled)
                state, found = self._decode(ready, state, np.int32(count), width=width, sampling=sampling)
                tokens_Bn[:, written : written + count] = np.asarray(found)[:, :count]
                written, is_done = written + count, bool(np.asarray(state.done_B).all())
            yield tokens_Bn
            if is_done:
                return

    def search(
        self,
        params: nnx.State,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        search: BeamSearch | None = None,
    ) -> list[list[Hypothesis]]:
        """The most likely continuations of every prompt, each up to its `end_of_text`, the best first.

        Args:
            params, prompts, max_tokens: as for `generate`.
            search: the search's settings; `BeamSearch()` by default.

        Raises:
            UserError: as for `generate`; no end of text; or a coverage penalty, which needs a source.
        """
        search = BeamSearch() if search is None else search
        if not self.ends:
            raise UserError("beam search ranks whole texts: it needs an end of text")
        self.check(prompts, max_tokens)
        total = max(map(len, prompts)) + max_tokens
        max_length = self._room(total, total)
        tokens_BT, lengths_B = self._padded(prompts, max_length)
        found = self._search(
            params, tokens_BT, lengths_B, jnp.int32(max_tokens), max_length=max_length, width=padded_length(max_tokens),
            search=search,
        )  # fmt: skip
        found = jax.device_get(found)
        return [hypotheses(found, row) for row in range(len(prompts))]

    def _room(self, filled: int, total: int) -> int:
        return cache_length(filled, total, self.config.max_length, self.config.position_boundary)

    def _padded(
        self, prompts: Sequence[Sequence[int]], room: int
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
        """The prompts padded to one width, for which there is room in the cache, and their lengths."""
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens_BT = np.zeros((len(prompts), min(padded_length(int(lengths_B.max())), room)), np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=True):
            row[: len(prompt)] = prompt
        return tokens_BT, lengths_B

    def check(self, prompts: Any, max_tokens: Any) -> None:
        """Raise a `UserError` for arguments that `generate` cannot handle, whatever their type."""
        check_rows("prompt", prompts, self.config.vocab_size)
        if not len(prompts):
            raise UserError("prompts: got none; expected at least one")
        check_count("max_tokens", max_tokens)
        longest, limit = max(map(len, prompts)), self.config.max_length
        if longest + max_tokens > limit:
            number = next(index for index, prompt in enumerate(prompts, start=1) if len(prompt) == longest)
            advice = f"ask for at most {limit - longest}" if longest < limit else f"shorten it to at most {limit - 1}"
            raise UserError(
                f"prompt {number} has {longest} tokens; with {max_tokens} new ones they exceed the model's context of {limit}; "
                f"{advice}"
            )

    def _prefill_impl(
        self, params: nnx.State, tokens_BT: Array, lengths_B: Array, key: Array, *, max_length: int, sampling: Sampling
    ) -> GenerationState:
        model = nnx.merge(self._graphdef, params)
        batch_size, width = tokens_BT.shape
        real_BT = jnp.arange(width) < lengths_B[:, None]
        # Padding is marked, so that it does not enter any state or use an expert's capacity.
        hidden_BTD, output = model.hidden(
            tokens_BT, segments_BT=real_BT.astype(jnp.int32), states=model.make_states(batch_size, max_length)
        )
        assert output.states is not None
        last_B1D = jnp.take_along_axis(hidden_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
        seen_BV = None
        if sampling.repetition_penalty != 1:
            rows = jnp.arange(batch_size)[:, None]
            seen_BV = jnp.zeros((batch_size, self.config.vocab_size), bool).at[rows, tokens_BT].max(real_BT)
        return GenerationState(
            with_room(output.states, self.config.mixers(), max_length),
            model.logits(last_B1D)[:, 0],
            jnp.zeros(batch_size, bool),
            seen_BV,
            jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch_size)),
        )

    def _search_impl(
        self,
        params: nnx.State,
        tokens_BT: Array,
        lengths_B: Array,
        max_tokens: Array,
        *,
        max_length: int,
        width: int,
        search: BeamSearch,
    ) -> Beams:
        model = nnx.merge(self._graphdef, params)
        # The search itself reads a prompt's last token, to score the first token that it generates.
        state = self._prefill_impl(
            params, tokens_BT, lengths_B - 1, jax.random.key(0), max_length=max_length, sampling=Sampling()
        )
        states = jax.tree.map(lambda x: jnp.repeat(x, search.beams, axis=0), state.states)
        model = for_decoding(model)

        def step(token_R: Array, states: list[State]) -> tuple[Array, list[State], None]:
            output = model(token_R[:, None], states=states)
            return output.logits[:, 0], output.states, None

        start_B = jnp.take_along_axis(tokens_BT, (lengths_B - 1)[:, None], axis=1)[:, 0]
        limit_B = jnp.full_like(lengths_B, max_tokens)
        return beam_search(
            step, states, start_B, limit_B, search=search, width=width, end_of_text=self.ends,
            num_tokens=self.num_tokens,
        )  # fmt: skip

    def _decode_impl(
        self, params: nnx.State, state: GenerationState, count: Array, *, width: int, sampling: Sampling
    ) -> tuple[GenerationState, Array]:
        """The next `count` tokens of each row, [B, `width`], and the state after them."""
        model = nnx.merge(self._decoding_graphdef, params)
        rows = jnp.arange(state.done_B.shape[0])

        def unfinished(carry: tuple[Array, GenerationState, Array]) -> Array:
            index, state, _ = carry
            return (index < count) & ~state.done_B.all()

        def step(carry: tuple[Array, GenerationState, Array]) -> tuple[Array, GenerationState, Array]:
            index, state, tokens_Bn = carry
            # The key is derived from the position, so that the text does not depend on how it is divided into chunks.
            keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, cache_lengths(state.states))
            logits_BV = state.logits_BV
            if self.num_tokens < self.config.vocab_size:
                logits_BV = jnp.where(jnp.arange(self.config.vocab_size) < self.num_tokens, logits_BV, -jnp.inf)
            token_B = next_token(logits_BV, sampling, keys_B, state.seen_BV)
            done_B = state.done_B
            if self.ends:
                token_B = jnp.where(done_B, self._fill, token_B)
                done_B = done_B | is_end(token_B, self.ends)
            seen_BV = None if state.seen_BV is None else state.seen_BV.at[rows, token_B].set(True)
            output = model(token_B[:, None], states=state.states)
            state = GenerationState(output.states, output.logits[:, 0], done_B, seen_BV, state.keys_B)
            return index + 1, state, tokens_Bn.at[:, index].set(token_B)

        tokens_Bn = jnp.full((rows.shape[0], width), self._fill, jnp.int32)
        _, state, tokens_Bn = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, tokens_Bn))
        return state, tokens_Bn


def until_end(chunks: Iterable[Int[np.ndarray, "B T"]], end_of_text: EndOfText) -> list[list[int]]:
    """The tokens that `Generator.generate` yields for each row, up to the end of its text."""
    written: list[list[int]] = []
    for chunk in chunks:
        written = written or [[] for _ in chunk]
        for row, tokens in zip(written, chunk, strict=True):
            row += map(int, tokens)
    return [before_end(row, ends_of(end_of_text)) for row in written]
