"""A mixture of experts: many feed-forward networks, a few of which process each token.

B batch, T position, D embed, F mlp, E experts, k experts per token, M choices in the order of their experts.

The work is that of the experts that the tokens go to, with or without a limit: each device sorts the choices of its tokens by
expert, and the experts' products are grouped (`layers/grouped_matmul.py`; dropless, as in MegaBlocks, Gale et al. 2022). A choice
beyond an expert's capacity is in no group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import Config, require
from transformer.layers.expert_parallel import run_experts
from transformer.layers.feed_forward import ACTIVATIONS, Activation, mlp_width, num_matrices
from transformer.layers.grouped_matmul import grouped_matmul
from transformer.layers.linear import Linear
from transformer.resume import Ask
from transformer.sharding import constrain, with_axes
from transformer.types import Array, Bool, DTypeLike, Float, Int, widen

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Config):
    """A mixture of experts: several feed-forward networks, a few of which process each token."""

    kind: Literal["experts"] = "experts"
    """A router sends each token to a few of several networks."""
    num_experts: int = 8
    """Number of networks in a block."""
    experts_per_token: int = 1
    """Number of experts that each token goes to: 1 in the Switch Transformer, 2 in Mixtral."""
    capacity_factor: Ask[float | None] = None
    """Tokens that an expert takes, as a multiple of an even share; tokens beyond that skip it. null: no limit (dropless)."""
    dim: int | None = None
    """Width of each network's hidden layer. null: same as in a dense one."""
    activation: Activation = "gelu"
    """geglu, geglu_exact and swiglu are gated. gelu and geglu use the tanh approximation, as in GPT-2."""
    balance_loss: Ask[float] = 0.01
    """Weight of the load-balancing loss, which spreads tokens evenly over the experts."""
    router_z_loss: float = 0.001
    """Weight of the loss that keeps the router's logits small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "num_experts", self.num_experts >= 1, "allowed: 1 or more")
        allowed = f"allowed: 1 to num_experts ({self.num_experts})"
        require(self, "experts_per_token", 1 <= self.experts_per_token <= self.num_experts, allowed)
        for field in ("dim", "capacity_factor"):
            require(self, field, getattr(self, field) is None or getattr(self, field) > 0, "allowed: above 0, or null")
        for field in ("balance_loss", "router_z_loss"):
            require(self, field, getattr(self, field) >= 0, "allowed: 0 or more")

    def width(self, embed_dim: int) -> int:
        """`dim` with its default filled in."""
        return mlp_width(self.dim, self.activation, embed_dim)

    def flops(self, embed_dim: int) -> float:
        """FLOPs of one token, in its experts and the router; a multiply-add counts as two."""
        one = 2.0 * num_matrices(self.activation) * embed_dim * self.width(embed_dim)
        return self.experts_per_token * one + 2 * embed_dim * self.num_experts


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("choices_E", "probability_E", "z", "tokens"),
    meta_fields=("balance_loss", "router_z_loss"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSums:
    """What a router's losses are made of, as sums over the tokens that are not padding: those of the parts of a batch add up to
    those of the batch. A stack adds a leading layers axis. They may be abstract (`jax.eval_shape`)."""

    choices_E: Any
    """[*L, E] of int32: number of tokens that have chosen an expert."""
    probability_E: Any
    """[*L, E]: the router's probability of an expert."""
    z: Any
    """[*L]: log² Σ_e exp(logit_e)."""
    tokens: Any
    """[*L] of int32: number of tokens."""
    balance_loss: float
    router_z_loss: float
    """Weights of the losses, as in the config."""

    def coefficients(self, weight: Float[Array, ""]) -> RouterCoefficients:
        """The coefficients of these sums in `weight` times the mean losses of the tokens, from the sums of a whole batch.

        The load-balancing loss is E Σ_e f_e P_e with f the fraction of choices of an expert, a constant to the gradient, and P
        the router's mean probability (Fedus et al. 2021, equation 4): 1 if even. The z-loss is the mean of `z` (Zoph et al. 2022,
        equation 5).
        """
        num_experts, dtype = self.choices_E.shape[-1], self.z.dtype
        each = weight / jnp.maximum(self.tokens, 1).astype(dtype)
        choices = jnp.maximum(self.choices_E.sum(-1, keepdims=True), 1).astype(dtype)
        share_E = self.choices_E.astype(dtype) / choices if self.balance_loss else jnp.zeros_like(self.probability_E)
        return RouterCoefficients(
            probability_E=self.balance_loss * num_experts * each[..., None] * share_E, z=self.router_z_loss * each
        )

    def loss(self, coefficients: RouterCoefficients) -> Float[Array, ""]:
        """The part of the routers' losses that is due to these tokens, summed over the layers."""
        c = coefficients
        return jnp.sum(c.probability_E * self.probability_E) + jnp.sum(c.z * self.z)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterCoefficients:
    """By what a whole batch's loss grows with the sums of a part of it."""

    probability_E: Float[Array, "*L E"]
    z: Float[Array, "*L"]


def route(
    logits_BTE: Float[Array, "B T E"],
    valid_BT: Bool[Array, "B T"],
    capacity_B: Int[Array, " B"],
    *,
    experts_per_token: int,
    balance_loss: float,
    router_z_loss: float,
) -> tuple[Int[Array, "B T k"], Int[Array, "B T k"], Float[Array, "B T k"], RouterSums]:
    """Route the tokens: Switch (Fedus et al. 2021, section 2.1) with one expert per token, top-k (Shazeer et al. 2017) with more.

    Each row of the batch fills the experts' capacity separately: every token's first choice before any second, and in the
    row's order. Padding takes no part.

    Args:
        valid_BT: tokens that are not padding; only these use capacity and count in the sums.
        capacity_B: number of tokens of each row that an expert takes.

    Returns:
        Each choice's expert; its place in the expert's capacity, -1 if there was none left; and its weight: the router's
        probability for one expert, normalised over the choices for several (Mixtral; Jiang et al. 2024); and the sums for the
        losses.
    """
    num_experts = logits_BTE.shape[-1]
    probabilities_BTE = jax.nn.softmax(logits_BTE)
    experts_BTk, chosen_BTkE = _largest(probabilities_BTE, experts_per_token)
    weights_BTk = jnp.where(chosen_BTkE, probabilities_BTE[..., None, :], 0).sum(-1)
    if experts_per_token > 1:
        weights_BTk = weights_BTk / weights_BTk.sum(-1, keepdims=True)
    B, T, k = experts_BTk.shape
    chosen_BTkE = jnp.where(valid_BT[..., None, None], chosen_BTkE.astype(jnp.int32), 0)
    # Choice by choice, then token by token: the earlier entry in this order gets the earlier place.
    in_order = chosen_BTkE.swapaxes(1, 2).reshape(B, k * T, num_experts)
    places = ((jnp.cumsum(in_order, axis=1) - in_order) * in_order).sum(-1)
    places_BTk = places.reshape(B, k, T).swapaxes(1, 2)
    places_BTk = jnp.where(valid_BT[..., None] & (places_BTk < capacity_B[:, None, None]), places_BTk, -1)
    log_z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    sums = RouterSums(
        choices_E=chosen_BTkE.sum((0, 1, 2)),
        probability_E=jnp.where(valid_BT[..., None], probabilities_BTE, 0).sum((0, 1)),
        z=jnp.where(valid_BT, jnp.square(log_z_BT), 0).sum(),
        tokens=valid_BT.sum(),
        balance_loss=balance_loss,
        router_z_loss=router_z_loss,
    )
    return experts_BTk, places_BTk, weights_BTk, sums


def _largest(x_BTE: Array, k: int) -> tuple[Array, Array]:
    """The places of the k largest numbers, in their order, [B, T, k], and the same as a mask [B, T, k, E].

    As `jax.lax.top_k`, which is not partitioned: each device would sort the whole batch.
    """
    E = x_BTE.shape[-1]
    places, masks, rest_BTE = [], [], x_BTE
    for _ in range(k):
        places.append(jnp.argmax(rest_BTE, axis=-1).astype(jnp.int32))
        masks.append(places[-1][..., None] == jnp.arange(E, dtype=jnp.int32))
        rest_BTE = jnp.where(masks[-1], -jnp.inf, rest_BTE)
    return jnp.stack(places, axis=-1), jnp.stack(masks, axis=-2)


class MixtureOfExperts(nnx.Module):
    """Feed-forward networks in parallel, along the logical axis `expert`, and a router.

    Args:
        experts_per_token: number of experts that each token goes to.
        capacity: tokens that an expert takes, as a multiple of an even share of a row's tokens, padding not counted; a token
            beyond that skips the expert and gets no output from it. None: no limit, which is exact.
        activation: a name of `ACTIVATIONS`.
        balance_loss, router_z_loss: weights of the router's losses.
        kernel_init, out_init: initialisers of the input projections, and of the output projection to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        num_experts: int,
        experts_per_token: int = 1,
        capacity: float | None = 1.25,
        activation: str = "gelu",
        balance_loss: float = 0.01,
        router_z_loss: float = 0.001,
        kernel_init: Callable[..., Array],
        out_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_experts, self.experts_per_token, self.capacity = num_experts, experts_per_token, capacity
        self.activation, self.dtype = activation, dtype
        self.balance_loss, self.router_z_loss = balance_loss, router_z_loss
        # Routing depends on small differences, so it uses the parameters' type, whatever type the experts compute in.
        self.router = Linear(
            (embed_dim,), (num_experts,), axes=("embed", "expert"), use_bias=False, kernel_init=kernel_init,
            dtype=param_dtype, param_dtype=param_dtype, is_exact=True, rngs=rngs,
        )  # fmt: skip

        def make(init: Callable[..., Array], shape: tuple[int, int], *axes: str) -> nnx.Param:
            # Each expert is initialised separately, so that an initialiser that uses the fan gets that of one expert.
            each = jax.vmap(functools.partial(init, shape=shape, dtype=param_dtype))

            def stacked(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
                return each(jax.random.split(key, num_experts))

            return nnx.Param(with_axes(stacked, "expert", *axes)(rngs.params(), (num_experts, *shape), param_dtype))

        self.up_EDF = make(kernel_init, (embed_dim, mlp_dim), "embed", "mlp")
        self.gate_EDF = make(kernel_init, (embed_dim, mlp_dim), "embed", "mlp") if ACTIVATIONS[activation][1] else None
        self.down_EFD = make(out_init, (mlp_dim, embed_dim), "mlp", "embed")

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], RouterSums]:
        """The weighted outputs of each token's experts, zeros for padding and for a token that got no place; and the sums for the
        router's losses."""
        B, T, _ = x_BTD.shape
        with jax.named_scope("mixture_of_experts"):
            valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
            capacities = self.capacities(T)
            experts_BTk, places_BTk, weights_BTk, sums = route(
                self.router(widen(x_BTD)), valid_BT, jnp.asarray(capacities)[valid_BT.sum(1)],
                experts_per_token=self.experts_per_token, balance_loss=self.balance_loss, router_z_loss=self.router_z_loss,
            )  # fmt: skip
            experts_BTk = jnp.where(places_BTk < 0, -1, experts_BTk)
            kernels = [
                None if p is None else p[...].astype(self.dtype) for p in (self.up_EDF, self.gate_EDF, self.down_EFD)
            ]
            out_BTD = run_experts(
                self._network, x_BTD.astype(self.dtype), experts_BTk, weights_BTk, kernels, capacity=int(capacities[T])
            )
            return constrain(out_BTD.astype(x_BTD.dtype), "batch", "stream", None), sums

    def cast_parameters(self) -> None:
        """Keep the experts' kernels in `dtype`, for inference, as `Linear.cast_parameters`."""
        for kernel in (self.up_EDF, self.gate_EDF, self.down_EFD):
            if kernel is not None:
                kernel.set_value(kernel[...].astype(self.dtype))

    def _network(self, x_MD: Array, sizes_E: Array, kernels: Sequence[Array | None]) -> Array:
        """The output of each expert for its own tokens, which are consecutive."""
        up_EDF, gate_EDF, down_EFD = kernels
        assert up_EDF is not None and down_EFD is not None
        function, _ = ACTIVATIONS[self.activation]
        hidden_MF = grouped_matmul(x_MD, up_EDF, sizes_E)
        if gate_EDF is None:
            hidden_MF = function(hidden_MF)
        else:
            hidden_MF *= function(grouped_matmul(x_MD, gate_EDF, sizes_E))
        return grouped_matmul(hidden_MF, down_EFD, sizes_E)

    def capacities(self, num_tokens: int) -> Int[np.ndarray, " {num_tokens}+1"]:
        """Number of tokens that an expert takes from a row of 0, 1, ... `num_tokens` tokens, padding not counted."""
        count = np.arange(num_tokens + 1)
        if self.capacity is None:
            return count.astype(np.int32)
        even = count * self.experts_per_token / self.num_experts
        return np.minimum(np.maximum(np.ceil(self.capacity * even), 1), count).astype(np.int32)


def without_limit(model: ModuleT) -> ModuleT:
    """The model, changed in place: its experts take every token (dropless), so that a token's output does not depend on which
    experts other tokens choose. For inference."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MixtureOfExperts):
            module.capacity = None
    return model


def has_router_losses(model: nnx.Module) -> bool:
    """Whether routers add to the model's loss, so that the loss of a part of a batch depends on the other parts."""
    mixtures = (module for _, module in nnx.iter_modules(model) if isinstance(module, MixtureOfExperts))
    return any(one.balance_loss or one.router_z_loss for one in mixtures)
