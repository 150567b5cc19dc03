"""The logit lens: what a model would answer after each of its layers (nostalgebraist 2020).

The final norm and the output projection are applied to the residual stream after every layer.

T position, L layers, C scores, K likeliest tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.hooks import Hooks
from transformer.interpret.interventions.subject import Inputs, Subject
from transformer.types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Lens:
    """Predictions before the first layer (0) and after each one. Of classes there is one position."""

    tokens_LTK: Int[np.ndarray, "L1 T K"]
    """The likeliest tokens or classes, the likeliest first."""
    probabilities_LTK: Float[np.ndarray, "L1 T K"]
    targets_T: Int[np.ndarray, " T"]
    """What is followed: the given target; at other positions the last layer's own prediction."""
    target_probability_LT: Float[np.ndarray, "L1 T"]
    target_rank_LT: Int[np.ndarray, "L1 T"]
    """1 for the likeliest."""


def logit_lens(subject: Subject, inputs: Inputs, *, top: int = 5, answer: int | None = None) -> Lens:
    """Read the stream of the stack that gives the answer, after each layer.

    Args:
        inputs: one row. Targets are its next tokens where it has some.
        top: how many of the likeliest tokens to return.
        answer: the target at the position of the answer.
    """
    prefix = subject.last
    stack = subject.stacks[prefix]
    places = [f"{prefix}embed", *(f"{prefix}layers.{layer}.out" for layer in range(stack.num_layers))]

    @jax.jit
    def read(params: nnx.State, inputs: Inputs, targets_T: Array) -> tuple[Array, ...]:
        hooks = Hooks(keep=places)
        model = subject.call(params, inputs, hooks)
        # The model's own stack, with the parameters of this call.
        norm = getattr(model, prefix.rstrip(".") or "layers").final_norm

        def of_layer(stream_BTD: Array) -> Array:
            hidden_BTD = stream_BTD if norm is None else norm(stream_BTD)
            return jax.nn.log_softmax(subject.readout(model, hidden_BTD, jnp.asarray(inputs.segments_BT))[0], axis=-1)

        streams = jnp.stack([hooks.kept[place] for place in places])
        last_TC = of_layer(streams[-1])
        followed_T = jnp.where(targets_T >= 0, targets_T, last_TC.argmax(-1).astype(jnp.int32))

        def summary(stream_BTD: Array) -> tuple[Array, ...]:
            # One layer at a time, so that the scores of one are in memory.
            logs_TC = of_layer(stream_BTD)
            best_TK, tokens_TK = jax.lax.top_k(logs_TC, min(top, logs_TC.shape[-1]))
            own_T = jnp.take_along_axis(logs_TC, followed_T[:, None], axis=1)
            return tokens_TK, jnp.exp(best_TK), jnp.exp(own_T[:, 0]), 1 + jnp.sum(logs_TC > own_T, axis=1)

        return (*jax.lax.map(summary, streams), followed_T)

    if subject.scores_rows:
        targets_T = np.array([-1 if answer is None else answer], np.int32)
    else:
        targets_T = np.where(np.asarray(inputs.weights_BT[0]) > 0, np.asarray(inputs.targets_BT[0]), -1).astype(
            np.int32
        )
        if answer is not None:
            targets_T[int(inputs.at_B[0])] = answer
    tokens, probabilities, own, rank, followed = map(np.asarray, read(subject.params, inputs, targets_T))
    return Lens(tokens, probabilities, followed, own, rank)
