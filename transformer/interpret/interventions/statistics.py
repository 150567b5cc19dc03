"""What the heads of a model do over many texts: how much of their attention goes where.

B batch, T query position, S key position, N query heads, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import UserError
from transformer.hooks import Hooks
from transformer.interpret.capture import MAX_BYTES, readable
from transformer.interpret.interventions.subject import Inputs, Part, Subject
from transformer.types import Array, Float

MEASURES = ("entropy", "previous", "first", "distance")


@dataclasses.dataclass(frozen=True)
class HeadStatistics:
    """Means over the queries of all texts, by layer and head; nan where a layer has fewer heads or no distributions."""

    entropy: Float[np.ndarray, "L N"]
    """Of the distribution over keys, in bits."""
    previous: Float[np.ndarray, "L N"] | None
    """The weight of the token before, 0 to 1, over queries that have one. None for attention to a memory."""
    first: Float[np.ndarray, "L N"]
    """The weight of the first token of the document (a sink; Xiao et al. 2023), over all queries but that token's own."""
    distance: Float[np.ndarray, "L N"] | None
    """How many tokens away a head looks (Vig & Belinkov 2019). None for attention to a memory."""


def head_statistics(subject: Subject, inputs: Inputs, *, max_bytes: int = MAX_BYTES) -> dict[str, HeadStatistics]:
    """The statistics of each part of a model.

    The model runs with its own kernels. Only the weights of a few layers and rows at a time are computed in addition, so that
    memory stays below `max_bytes`.

    Raises:
        UserError: no layer has weights that are distributions, or one row of one layer needs more than `max_bytes`.
    """
    sums: dict[str, dict[str, np.ndarray]] = {}
    rows_at_once, layers_at_once = _sizes(subject, inputs, max_bytes)
    wanted = [(part, layer) for part in subject.parts.values() for layer, shown in enumerate(part.has_distributions)
              if shown]  # fmt: skip
    if not wanted:
        raise UserError("this model has no statistics: weights of its attention are not distributions")
    for some in chunks(wanted, layers_at_once):

        @jax.jit
        def measured(params: nnx.State, inputs: Inputs, some: Any = some) -> dict[str, dict[str, Array]]:
            hooks = Hooks(keep=kept_for(some))
            subject.call(params, inputs, hooks)
            return sums_of(some, hooks.kept)

        for start in range(0, len(inputs), rows_at_once):
            own = inputs.rows(start, rows_at_once)
            for place, found in jax.device_get(measured(subject.params, own)).items():
                before = sums.get(place)
                sums[place] = found if before is None else {name: before[name] + found[name] for name in found}
    return {part.name: _means(part, sums) for part in subject.parts.values() if any(part.has_distributions)}


def kept_for(wanted: Sequence[tuple[Part, int]]) -> list[str]:
    """The places whose values `sums_of` reads."""
    stacks = {part.stack for part, _ in wanted}
    return [part.place(layer, "weights") for part, layer in wanted] + [
        f"{stack}{name}" for stack in stacks for name in ("positions", "segments")
    ]


def sums_of(wanted: Sequence[tuple[Part, int]], kept: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Each head's sums over queries [N], and the numbers of queries, by the place of the weights. To be traced."""
    found = {}
    for part, layer in wanted:
        weights_BNTS = kept[part.place(layer, "weights")].astype(jnp.float32)
        _, _, T, S = weights_BNTS.shape
        positions_BT, valid_BT = kept[f"{part.stack}positions"], kept[f"{part.stack}segments"] != 0
        sums = {
            "entropy": _over(valid_BT, -jnp.sum(jax.scipy.special.xlogy(weights_BNTS, weights_BNTS), -1) / np.log(2))
        }
        later_BT = valid_BT & (positions_BT > 0)
        keys_S = jnp.arange(S)
        if part.reads_memory:
            sums["first"] = _over(valid_BT, weights_BNTS[..., 0])
        else:
            queries_T = jnp.arange(T)
            first_BTS = keys_S == (queries_T - positions_BT)[..., None]
            sums["first"] = _over(later_BT, jnp.sum(weights_BNTS * first_BTS[:, None].astype(jnp.float32), -1))
            previous_TS = keys_S == queries_T[:, None] - 1
            sums["previous"] = _over(later_BT, jnp.sum(weights_BNTS * previous_TS.astype(jnp.float32), -1))
            distance_TS = jnp.abs(queries_T[:, None] - keys_S).astype(jnp.float32)
            sums["distance"] = _over(valid_BT, jnp.sum(weights_BNTS * distance_TS, -1))
        found[part.place(layer, "weights")] = {
            **sums,
            "queries": jnp.sum(valid_BT), "later": jnp.sum(later_BT),
        }  # fmt: skip
    return found


def means_of(part: Part, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each head's means [N] from the sums of one layer."""
    counts = {"entropy": "queries", "distance": "queries", "previous": "later"}
    counts["first"] = "queries" if part.reads_memory else "later"
    return {
        name: np.asarray(sums[name], np.float64) / max(float(sums[counts[name]]), 1.0)
        for name in MEASURES
        if name in sums
    }


def induction_scores(subject: Subject, length: int = 32, rows: int = 8, seed: int = 0) -> Float[np.ndarray, "L N"]:
    """How much each head attends to the token after an earlier copy of the current one (Olsson et al. 2022).

    Each row is a random sequence of `length` tokens, twice. The score is the mean weight, from a token of the second copy, of the
    token that followed it in the first.

    Raises:
        UserError: a model that does not write from left to right, a context below two tokens, or no layer with distributions.
    """
    part = next(iter(subject.parts.values()))
    if len(subject.parts) > 1 or not part.is_causal:
        raise UserError(f"model.family: {subject.config.family!r} does not predict the next token; induction needs gpt")
    length = min(length, subject.config.max_length // 2)
    if length < 1:
        raise UserError(f"model.max_length: got {subject.config.max_length}; a repeated sequence needs 2 or more")
    if not any(part.has_distributions):
        raise UserError("this model has no induction scores: weights of its attention are not distributions")
    once = np.random.default_rng(seed).integers(0, subject.config.vocab_size, (rows, length))
    tokens_BT = np.concatenate([once, once], axis=1).astype(np.int32)
    ones_BT = np.ones(tokens_BT.shape, np.int32)
    inputs = Inputs(
        tokens_BT=tokens_BT, segments_BT=ones_BT, at_B=ones_BT[:, 0], targets_BT=0 * ones_BT,
        weights_BT=np.zeros(tokens_BT.shape, np.float32),
    )  # fmt: skip
    queries = np.arange(length, 2 * length)
    places = {part.place(layer, "weights"): layer for layer, shown in enumerate(part.has_distributions) if shown}

    @jax.jit
    def scores(params: nnx.State, inputs: Inputs) -> dict[str, Array]:
        hooks = Hooks(keep=places)
        subject.call(params, inputs, hooks)
        # The current token stood `length` before, and the one after it is next to that.
        return {
            place: weights[:, :, queries, queries - length + 1].mean((0, 2)) for place, weights in hooks.kept.items()
        }

    table = np.full((len(part.heads), max(part.heads)), np.nan)
    for place, found in scores(subject.params, inputs).items():
        table[places[place], : len(found)] = found
    return table


def _over(queries_BT: Array, values_BNT: Array) -> Array:
    chosen = queries_BT[:, None].astype(jnp.float32)
    return jnp.sum(values_BNT * chosen, axis=(0, 2))


def _means(part: Part, sums: Mapping[str, Mapping[str, np.ndarray]]) -> HeadStatistics:
    shape = (len(part.heads), max(part.heads))
    tables: dict[str, np.ndarray] = {}
    for layer, count in enumerate(part.heads):
        if part.has_distributions[layer]:
            for name, values in means_of(part, sums[part.place(layer, "weights")]).items():
                tables.setdefault(name, np.full(shape, np.nan))[layer, :count] = values
    return HeadStatistics(tables["entropy"], tables.get("previous"), tables["first"], tables.get("distance"))


def _sizes(subject: Subject, inputs: Inputs, max_bytes: int) -> tuple[int, int]:
    """How many rows and how many layers at a time."""
    T = inputs.tokens_BT.shape[1]
    S = T if inputs.source_BS is None else max(T, inputs.source_BS.shape[1])
    heads = max(max(part.heads) for part in subject.parts.values())
    # A layer's weights, and the arrays of this size by which they are computed and summed.
    one = 4 * 4 * heads * S * S
    if one > max_bytes:
        raise UserError(
            f"texts: the weights of one layer on {S:,} tokens need {readable(one)}, above the limit of "
            f"{readable(max_bytes)}; give shorter texts"
        )
    rows = max(1, min(len(inputs), max_bytes // one))
    return rows, max(1, max_bytes // (one * rows))


def chunks(wanted: list[tuple[Part, int]], size: int) -> Iterator[list[tuple[Part, int]]]:
    """Parts and layers, `size` at a time."""
    for first in range(0, len(wanted), size):
        yield wanted[first : first + size]
