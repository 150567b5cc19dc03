"""`manyheads-bench experts`: the time of a mixture of experts over the number of tokens, compared with a dense layer's.

N tokens, T position, D embed, E experts, k experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.record import in_turn, ratio, save, seconds_per_call, summary
from transformer.layers.feed_forward import FeedForward
from transformer.layers.linear import DEFAULT_INIT
from transformer.layers.mixture_of_experts import MixtureOfExperts

TOKENS = (1024, 2048, 4096, 8192, 16384)
LENGTH = 1024
NUM_EXPERTS, EXPERTS_PER_TOKEN = 8, 2
EMBED_DIM, MLP_DIM = 64, 128
CAPACITIES = {"dropless": None, "capacity 1.25": 1.25}


def run(rounds: int, tokens: Sequence[int] = TOKENS) -> dict[str, Any]:
    """Seconds of a forward and backward pass at each number of tokens, in turn, without and with a limit of capacity.

    The peer is a dense feed-forward network of equal active FLOPs: as wide as the experts of a token together.
    """
    result = measure(rounds, tokens)
    save("experts", f"manyheads-bench experts --rounds {rounds}", result)
    return result


def measure(rounds: int, tokens: Sequence[int]) -> dict[str, Any]:
    """The result of `run`, which is not stored."""
    candidates = {f"{name}, {count}": _step(name, count) for count in tokens for name in (*CAPACITIES, "dense")}
    for function in candidates.values():
        seconds_per_call(function, 1)
    taken = in_turn({name: functools.partial(seconds_per_call, step, 1) for name, step in candidates.items()}, rounds)

    def of(name: str, count: int) -> list[float]:
        return taken[f"{name}, {count}"]

    return {
        "num_experts": NUM_EXPERTS,
        "experts_per_token": EXPERTS_PER_TOKEN,
        "embed_dim": EMBED_DIM,
        "mlp_dim": MLP_DIM,
        "tokens": list(tokens),
        "experts": {
            name: {
                "seconds": {str(count): summary(of(name, count)) for count in tokens},
                "over_dense": {str(count): ratio(of(name, count), of("dense", count)) for count in tokens},
                "most_over_fewest_tokens": ratio(of(name, tokens[-1]), of(name, tokens[0])),
            }
            for name in CAPACITIES
        },
        "dense": {
            "seconds": {str(count): summary(of("dense", count)) for count in tokens},
            "most_over_fewest_tokens": ratio(of("dense", tokens[-1]), of("dense", tokens[0])),
        },
    }


def _step(name: str, count: int) -> Callable[[], Any]:
    """The gradients of a layer's parameters and inputs."""
    rngs = nnx.Rngs(0)
    layer: MixtureOfExperts | FeedForward
    if name == "dense":
        layer = FeedForward(EMBED_DIM, EXPERTS_PER_TOKEN * MLP_DIM, use_bias=False, rngs=rngs)
    else:
        layer = MixtureOfExperts(
            EMBED_DIM, MLP_DIM, num_experts=NUM_EXPERTS, experts_per_token=EXPERTS_PER_TOKEN, capacity=CAPACITIES[name],
            kernel_init=DEFAULT_INIT, out_init=DEFAULT_INIT, rngs=rngs,
        )  # fmt: skip
    graphdef, params = nnx.split(layer)
    length = min(LENGTH, count)
    x_BTD = jax.random.normal(jax.random.key(count), (count // length, length, EMBED_DIM), jnp.float32)

    @jax.jit
    def gradients(params: Any, x_BTD: jax.Array) -> Any:
        def loss(params: Any, x_BTD: jax.Array) -> jax.Array:
            out = nnx.merge(graphdef, params)(x_BTD)
            return jnp.sum(jnp.square(out[0] if isinstance(out, tuple) else out))

        return jax.grad(loss, (0, 1))(params, x_BTD)

    return lambda: gradients(params, x_BTD)
