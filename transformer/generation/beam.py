"""Beam search and sampling for any model that decodes step by step.

B batch, K beams, R = B K rows, S source position, V vocab, n tokens written, Q hypotheses returned.

The only requirement is one function of a token and a state; the state is a pytree whose arrays have a leading B.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer.errors import UserError, require
from transformer.generation.ends import EndOfText, ends_of, first_end_for_all, is_end
from transformer.generation.sampling import Sampling, next_token
from transformer.types import Array, Bool, Float, Int, Key

MIN_COVERED = 1e-6
"""Lower bound on a source token's total attention in the coverage penalty, so that no score is -inf."""

Step = Callable[[Array, Any], tuple[Array, Any, Array | None]]
"""(token_R, state) -> (logits_RV, next state, weights_RS or None)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """How translations are searched for and ranked.

        score(Y) = log p(Y) / lp(Y) + cp(X, Y)                               Wu et al. 2016, equation 14
        lp(Y) = ((5 + |Y|) / (5 + 1))^α
        cp(X, Y) = β Σ_s log(min(Σ_t p_ts, 1))

    |Y| includes the end token. The beam itself is ordered by log p(Y), over hypotheses of the same length.
    """

    beams: int = 4
    """Hypotheses kept for each source, finished ones included. 1: greedy search."""
    length_penalty: float = 0.6
    """α; 0 favours short translations."""
    coverage_penalty: float = 0.0
    """β; 0: no penalty. Above 0, the model must provide attention weights."""
    num_best: int = 1
    """Translations returned for each source, the best first."""
    min_tokens: int = 0
    """Minimum number of tokens in a translation, as far as its maximum length allows."""

    def __post_init__(self) -> None:
        require(self, "beams", self.beams >= 1, "allowed: 1 or more")
        require(self, "length_penalty", self.length_penalty >= 0, "allowed: 0 or more")
        require(self, "coverage_penalty", self.coverage_penalty >= 0, "allowed: 0 or more")
        require(self, "num_best", 1 <= self.num_best <= self.beams, f"allowed: 1 to beams ({self.beams})")
        require(self, "min_tokens", self.min_tokens >= 0, "allowed: 0 or more")


class Beams(NamedTuple):
    """The hypotheses found, the best first. Unused places have a score of -inf."""

    tokens_BQn: Int[Array, "B Q n"]
    """Without the end token."""
    length_BQ: Int[Array, "B Q"]
    """Number of tokens of each, without the end token."""
    score_BQ: Float[Array, "B Q"]
    log_probability_BQ: Float[Array, "B Q"]
    """Log-probability of the tokens, and of the end token if it was written."""


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One hypothesis, on the host."""

    tokens: list[int]
    """Without the end token."""
    score: float
    """The score that it was ranked by."""
    log_probability: float
    """Log-probability of the tokens and the end token, in nats; a sample that was cut off at its limit has no end token."""


def hypotheses(found: Beams, row: int) -> list[Hypothesis]:
    """The hypotheses found for one row, the best first; `found` is on the host (`jax.device_get`)."""
    return [
        Hypothesis(tokens[:length].tolist(), float(score), float(log_probability))
        for tokens, length, score, log_probability in zip(*(part[row] for part in found), strict=True)
        if score > -math.inf
    ]


class _Search(NamedTuple):
    written: Array
    """Number of tokens in the unfinished hypotheses."""
    state: Any
    tokens_BKn: Array
    last_BK: Array
    log_probability_BK: Array
    """Log-probability of unfinished hypotheses; -inf in unused places."""
    coverage_BKS: Array | None
    found: Beams


def length_penalty(length: Float[Array, "*dims"], alpha: float) -> Float[Array, "*dims"]:
    """lp = ((5 + |Y|) / (5 + 1))^α (Wu et al. 2016, equation 14)."""
    return ((5 + length) / 6) ** alpha


def beam_search(
    step: Step,
    state: Any,
    start_B: Int[Array, " B"],
    limit_B: Int[Array, " B"],
    *,
    search: BeamSearch,
    width: int,
    end_of_text: EndOfText,
    num_tokens: int | None = None,
    valid_BS: Bool[Array, "B S"] | None = None,
) -> Beams:
    """Search for the most likely continuations of each row. Call it under `jax.jit`.

    A hypothesis that ends leaves the beam, which then has one place fewer (Sutskever et al. 2014, section 3.2); a hypothesis
    of `limit_B` tokens must end. A row is done when none of its unfinished hypotheses can still reach the score of its
    `num_best`-th finished one, so stopping early does not change the result.

    Args:
        step: maps the tokens and the state of R = B · beams rows to the logits [R, V] of the next tokens, the next state, and,
            for a coverage penalty, the attention weights [R, S]. Row b · beams + k is beam k of row b.
        state: the state before the first step, for R rows; every array has a leading R and is reordered with the hypotheses.
        start_B: the token that the first step reads.
        limit_B: maximum number of tokens of a row's hypotheses, at most `width`.
        width: number of tokens to allocate.
        end_of_text: ends a hypothesis. Of several, the likeliest stands for all: they are one way to end.
        num_tokens: number of valid token ids, if the vocabulary is padded; other ids are never generated.
        valid_BS: source positions that coverage counts; all by default.

    Raises:
        UserError: a coverage penalty, but no attention weights.
    """
    B, K, Q = start_B.shape[0], search.beams, search.num_best
    ends = ends_of(end_of_text)
    end = ends[0]
    base_B1 = jnp.arange(B)[:, None] * K
    alone_K = jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)
    nothing = Beams(
        jnp.full((B, K, width), end, jnp.int32),
        jnp.zeros((B, K), jnp.int32),
        jnp.full((B, K), -jnp.inf),
        jnp.full((B, K), -jnp.inf),
    )

    def unfinished(now: _Search) -> Array:
        return jnp.isfinite(now.log_probability_BK).any()

    def advance(now: _Search) -> _Search:
        logits_RV, state, weights_RS = step(now.last_BK.reshape(-1), now.state)
        V = logits_RV.shape[-1]
        log_probs_BKV = first_end_for_all(_log_probabilities(logits_RV, num_tokens), ends).reshape(B, K, V)
        is_end_V = jnp.arange(V) == end
        must_end_B = now.written >= limit_B
        may_end_B = must_end_B | (now.written >= search.min_tokens)
        allowed_BV = jnp.where(is_end_V, may_end_B[:, None], ~must_end_B[:, None])
        log_probs_BKV = jnp.where(allowed_BV[:, None], log_probs_BKV, -jnp.inf)

        # The most likely of all continuations, one for each place in the beam.
        sums_BKV = now.log_probability_BK[:, :, None] + log_probs_BKV
        best_BK, where_BK = _top(sums_BKV, K)
        parent_BK, token_BK = where_BK // V, (where_BK % V).astype(jnp.int32)
        places_B1 = K - jnp.isfinite(now.found.score_BQ).sum(-1, keepdims=True)
        best_BK = jnp.where(jnp.arange(K) < places_B1, best_BK, -jnp.inf)

        tokens_BKn = jnp.take_along_axis(now.tokens_BKn, parent_BK[..., None], axis=1)
        coverage_BKS: Array | None = None
        penalty_BK: Array | float = 0.0
        if now.coverage_BKS is not None:
            assert weights_RS is not None  # checked before the loop
            coverage_BKS = now.coverage_BKS + weights_RS.astype(jnp.float32).reshape(B, K, -1)
            coverage_BKS = jnp.take_along_axis(coverage_BKS, parent_BK[..., None], axis=1)
            logs_BKS = jnp.log(jnp.clip(coverage_BKS, MIN_COVERED, 1))
            if valid_BS is not None:
                logs_BKS = jnp.where(valid_BS[:, None], logs_BKS, 0)
            penalty_BK = search.coverage_penalty * logs_BKS.sum(-1)

        ends_BK = token_BK == end
        length = now.written.astype(jnp.float32) + 1
        score_BK = best_BK / length_penalty(length, search.length_penalty) + penalty_BK
        ended = Beams(
            tokens_BKn,
            jnp.broadcast_to(now.written, (B, K)),
            jnp.where(ends_BK, score_BK, -jnp.inf),
            jnp.where(ends_BK, best_BK, -jnp.inf),
        )
        found = _best(jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), now.found, ended), K)

        log_probability_BK = jnp.where(ends_BK, -jnp.inf, best_BK)
        # Log-probabilities never rise, and no length penalty favours a hypothesis more than that of the greatest length.
        longest_B = length_penalty(limit_B.astype(jnp.float32) + 1, search.length_penalty)
        reachable_B = log_probability_BK.max(-1) / longest_B
        going_B = reachable_B > found.score_BQ[:, Q - 1]
        log_probability_BK = jnp.where(going_B[:, None], log_probability_BK, -jnp.inf)

        if K > 1:
            # A single hypothesis continues itself: its state, which may be large, stays where it is.
            rows_R = (base_B1 + parent_BK).reshape(-1)
            state = jax.tree.map(lambda x: x[rows_R], state)
        return _Search(
            now.written + 1,
            state,
            tokens_BKn.at[:, :, now.written].set(token_BK, mode="drop"),
            token_BK,
            log_probability_BK,
            coverage_BKS,
            found,
        )

    with jax.named_scope("beam_search"):
        coverage_BKS = None
        if search.coverage_penalty:
            weights = jax.eval_shape(lambda: step(jnp.repeat(start_B, K), state)[2])
            if weights is None:
                raise UserError("coverage_penalty: this model's attention has no weights; only 0 is possible")
            coverage_BKS = jnp.zeros((B, K, weights.shape[-1]))
        first = _Search(
            jnp.int32(0),
            state,
            jnp.full((B, K, width), end, jnp.int32),
            jnp.broadcast_to(start_B[:, None], (B, K)).astype(jnp.int32),
            jnp.broadcast_to(alone_K, (B, K)),
            coverage_BKS,
            nothing,
        )
        found = jax.lax.while_loop(unfinished, advance, first).found
        return jax.tree.map(lambda x: x[:, :Q], found)


def sample_translations(
    step: Step,
    state: Any,
    start_B: Int[Array, " B"],
    limit_B: Int[Array, " B"],
    keys_B: Key[Array, " B"],
    *,
    sampling: Sampling,
    width: int,
    end_of_text: EndOfText,
    num_tokens: int | None = None,
) -> Beams:
    """Sample one continuation of each row, token by token; a row that reaches `limit_B` tokens stops without an end token.

    Arguments are as for `beam_search`, with one row in place of `beams` rows. A row's tokens depend only on its own key. The
    score is the log-probability under the model, before the filters.
    """
    B = start_B.shape[0]
    rows_B = jnp.arange(B)
    ends = ends_of(end_of_text)
    end = ends[0]

    def unfinished(now: tuple) -> Array:
        return ~now[-1].all()

    def advance(now: tuple) -> tuple:
        index, state, tokens_Bn, last_B, length_B, sum_B, seen_BV, done_B = now
        logits_BV, state, _ = step(last_B, state)
        log_probs_BV = _log_probabilities(logits_BV, num_tokens)
        keys = jax.vmap(functools.partial(jax.random.fold_in, data=index))(keys_B)
        logits_BV = jnp.where(jnp.isfinite(log_probs_BV), logits_BV.astype(jnp.float32), -jnp.inf)
        token_B = jnp.where(done_B, end, next_token(logits_BV, sampling, keys, seen_BV))
        sum_B = jnp.where(done_B, sum_B, sum_B + log_probs_BV[rows_B, token_B])
        done_B = done_B | is_end(token_B, ends)
        length_B = jnp.where(done_B, length_B, index + 1)
        seen_BV = None if seen_BV is None else seen_BV.at[rows_B, token_B].set(True)
        tokens_Bn = tokens_Bn.at[:, index].set(token_B)
        return index + 1, state, tokens_Bn, token_B, length_B, sum_B, seen_BV, done_B | (index + 1 >= limit_B)

    with jax.named_scope("sample_translations"):
        seen_BV = None
        if sampling.repetition_penalty != 1:
            V = jax.eval_shape(lambda: step(start_B, state)[0]).shape[-1]
            seen_BV = jnp.zeros((B, V), bool)
        tokens_Bn = jnp.full((B, width), end, jnp.int32)
        first = (
            jnp.int32(0), state, tokens_Bn, start_B.astype(jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B), seen_BV,
            limit_B <= 0,
        )  # fmt: skip
        _, _, tokens_Bn, _, length_B, sum_B, _, _ = jax.lax.while_loop(unfinished, advance, first)
        return Beams(tokens_Bn[:, None], length_B[:, None], sum_B[:, None], sum_B[:, None])


def _log_probabilities(logits_RV: Array, num_tokens: int | None) -> Array:
    """In float32, over the valid tokens; -inf for all others."""
    logits_RV = logits_RV.astype(jnp.float32)
    if num_tokens is not None and num_tokens < logits_RV.shape[-1]:
        logits_RV = jnp.where(jnp.arange(logits_RV.shape[-1]) < num_tokens, logits_RV, -jnp.inf)
    return jax.nn.log_softmax(logits_RV, axis=-1)


def _top(sums_BKV: Array, count: int) -> tuple[Array, Array]:
    """The greatest `count` of each row's K · V sums, and their indices; -inf where there are fewer."""
    flat = sums_BKV.reshape(sums_BKV.shape[0], -1)
    if flat.shape[-1] < count:
        flat = jnp.pad(flat, ((0, 0), (0, count - flat.shape[-1])), constant_values=-jnp.inf)
    best, where = jax.lax.top_k(flat, count)
    # Padded entries do not belong to a hypothesis, so any valid index will do.
    return best, jnp.minimum(where, sums_BKV.shape[1] * sums_BKV.shape[2] - 1)


def _best(found: Beams, count: int) -> Beams:
    """The `count` hypotheses with the highest scores."""
    score, order = jax.lax.top_k(found.score_BQ, count)
    return Beams(
        jnp.take_along_axis(found.tokens_BQn, order[..., None], axis=1),
        jnp.take_along_axis(found.length_BQ, order, axis=1),
        score,
        jnp.take_along_axis(found.log_probability_BQ, order, axis=1),
    )
