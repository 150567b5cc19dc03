"""Low-rank adapters (LoRA, DoRA): what fine-tuning adds to linear layers whose own parameters stay fixed.

I inputs of a layer, O outputs of it, r rank of the adapter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.errors import require
from transformer.layers.linear import dense
from transformer.precision import matmul
from transformer.randomness import dropout, fold_in
from transformer.resume import Ask
from transformer.sharding import with_axes
from transformer.types import Array, DTypeLike, Float, Keys, PRNGKeyArray

_NAME = "adapter"
_FIRST_NUMBER = 5
"""A block splits its key into this many; adapters fold higher numbers into it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters of the blocks' linear layers, which are trained instead of the layers' own parameters."""

    kind: Literal["lora", "dora"] = "lora"
    """lora: a product of two low-rank matrices is added to each kernel (Hu et al. 2021); dora: in addition, each output feature
    has a learned norm (Liu et al. 2024)."""
    rank: int = 8
    """Rank of the product: the width of the two matrices."""
    alpha: float = 16.0
    """The product is multiplied by alpha / rank."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead, which suits high ranks (Kalajdzievski 2023)."""
    dropout: Ask[float] = 0.0
    """Drop rate of the adapters' inputs."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers that are adapted, such as query, key, value, out, up, gate and down; null: all in the blocks
    except a mixture's router."""
    train_also: tuple[str, ...] | None = None
    """Parameters that are trained in addition to the adapters, as patterns of their paths, such as pooled_head.*; null: those of
    a head over classes."""

    def __post_init__(self) -> None:
        require(self, "rank", self.rank >= 1, "allowed: 1 or more")
        require(self, "alpha", 0 < self.alpha < math.inf, "allowed: above 0")
        require(self, "dropout", 0 <= self.dropout < 1, "allowed: 0 or more, below 1")
        require(self, "targets", self.targets is None or len(self.targets) > 0, "allowed: at least one name, or null")

    @property
    def scale(self) -> float:
        """The factor of the product of the two matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class Adapter(nnx.Module):
    """Gives a linear layer the kernel W + scale · A · B, or, with a learned norm m of each output feature,
    m (W + scale · A · B) / ‖W + scale · A · B‖, with the norm over the inputs.

    Hu et al. 2021, equation 3; Liu et al. 2024, equation 5, whose norm is a constant for the gradient (section 4.3). W gets no
    gradient unless asked for. At first B is zero and m is the norm of W, so the layer computes the same as before.

    Args:
        kernel: W, of one layer or of stacked ones.
        num_in: number of its dims that are inputs.
        number: the index of this adapter in its block, from which its dropout derives its own key.
    """

    def __init__(
        self, kernel: nnx.Param, num_in: int, config: AdapterConfig, *, number: int = 0, rngs: nnx.Rngs
    ) -> None:
        axes, shape = kernel.get_metadata()["out_sharding"], kernel.shape
        lead = int(axes[0] == "layers")
        split = lead + num_in
        self.scale, self.dropout_rate, self.number = config.scale, config.dropout, number
        bound = math.prod(shape[lead:split]) ** -0.5

        def uniform(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            # He et al. 2015 with a slope of sqrt(5), as in PEFT.
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def make(init: Any, shape: tuple[int, ...], *names: str | None) -> nnx.Param:
            return nnx.Param(with_axes(init, *names)(rngs.params(), shape, kernel.dtype))

        r = config.rank
        zeros = nnx.initializers.zeros
        self.lora_a = make(uniform, (*shape[:split], r), *axes[:split], None)
        self.lora_b = make(zeros, (*shape[:lead], r, *shape[split:]), *axes[:lead], None, *axes[split:])
        length = (shape[:lead] + shape[split:], *axes[:lead], *axes[split:])
        self.magnitude = make(zeros, *length) if config.kind == "dora" else None
        if self.magnitude is not None:
            self.magnitude.set_value(lengths(kernel[...], self.lora_a[...], self.lora_b[...]))

    def __call__(
        self,
        x: Float[Array, "*dims I"],
        kernel_IO: Float[Array, "I O"],
        bias_O: Float[Array, " O"] | None,
        key: Keys | None = None,
    ) -> Float[Array, "*dims O"]:
        """The layer's output with the adapter, for one layer. Computed in x's type, from a kernel in the parameters' type; a
        key enables dropout."""
        given = x if key is None else dropout(x, self.dropout_rate, fold_in(key, _FIRST_NUMBER + self.number))
        I, O = kernel_IO.shape  # noqa: E741
        a_Ir, b_rO = self.lora_a[...].reshape(I, -1), self.lora_b[...].reshape(-1, O)
        with jax.named_scope(_NAME):
            cast_IO = kernel_IO.astype(x.dtype)
            added = self.scale * dense(dense(given, a_Ir.astype(x.dtype), None), b_rO.astype(x.dtype), None)
            if self.magnitude is None:
                return dense(x, cast_IO, bias_O) + added
            norm_O = jax.lax.stop_gradient(_norms(kernel_IO + self.scale * matmul(a_Ir, b_rO)))
            gain_O = (self.magnitude[...].reshape(-1) / norm_O).astype(x.dtype)
            own = dense(given, cast_IO, None)
            y = _spread(gain_O, x.ndim) * (own + added)
            if given is x:
                return y if bias_O is None else y + _spread(bias_O, x.ndim)
            # The rescaling to the learned norm uses the input after dropout; the kernel's own output uses x, as in PEFT.
            return y + dense(x, cast_IO, bias_O) - own

    def merged(self, kernel: Float[Array, ...]) -> Float[Array, ...]:
        """The kernel of a plain layer that computes the same as this one with its adapter."""
        matrices = {"lora_a": self.lora_a, "lora_b": self.lora_b, "magnitude": self.magnitude}
        return merged_kernel(kernel, {name: m[...] for name, m in matrices.items() if m is not None}, self.scale)


def merged_kernel(kernel: Array, adapter: dict[str, Array], scale: float) -> Array:
    """The kernel of a plain layer that computes the same as an adapted one, for one layer or for stacked ones.

    Args:
        kernel: [*layers, *in, *out].
        adapter: its `lora_a` [*layers, *in, r], `lora_b` [*layers, r, *out], and `magnitude` [*layers, *out] where it has one.
    """
    total = _total(kernel, adapter["lora_a"], adapter["lora_b"], scale)
    if "magnitude" in adapter:
        total *= jnp.expand_dims(adapter["magnitude"].reshape(*total.shape[:-2], -1) / _norms(total), -2)
    return total.reshape(kernel.shape)


def lengths(kernel: Array, lora_a: Array, lora_b: Array) -> Array:
    """The norm of each output feature of a kernel alone [*layers, *out]; the shapes of the adapter's matrices define its dims."""
    return _norms(_total(kernel, lora_a, lora_b, 0.0)).reshape(*_lead(kernel, lora_a, lora_b), *_out(kernel, lora_a))


def merged(params: nnx.State, scale: float) -> nnx.State:
    """The parameters of the plain model that computes the same as an adapted one.

    Args:
        scale: the adapters' (`AdapterConfig.scale`).
    """
    flat, adapters = _apart(params)
    for place, adapter in adapters.items():
        kernel = flat[*place, "kernel"]
        values = {name: leaf.get_value() for name, leaf in adapter.items()}
        flat[*place, "kernel"] = kernel.replace(merged_kernel(kernel.get_value(), values, scale))
    return nnx.from_flat_state(flat)


def make_merge_fn(config: AdapterConfig | None) -> Callable[[nnx.State], nnx.State]:
    """A compiled function from a model's parameters to those of the plain model; without adapters it changes nothing."""
    if config is None:
        return lambda params: params
    return jax.jit(functools.partial(merged, scale=config.scale))


def reset_dora_magnitudes(params: nnx.State) -> nnx.State:
    """`params` with DoRA's norms set to those of the kernels, which were loaded after the adapters were made."""
    flat, adapters = _apart(params)
    fresh = {}
    for place, adapter in adapters.items():
        for name, leaf in adapter.items():
            if name == "magnitude":
                sources = (flat[*place, "kernel"], adapter["lora_a"], adapter["lora_b"])
                leaf = leaf.replace(lengths(*(source.get_value() for source in sources)))
            fresh[*place, _NAME, name] = leaf
    return nnx.from_flat_state(flat | fresh)


def is_adapter(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is an adapter's, by its path."""
    return path[-2:-1] == (_NAME,)


def _apart(
    params: nnx.State,
) -> tuple[dict[tuple[Any, ...], nnx.Variable], dict[tuple[Any, ...], dict[str, nnx.Variable]]]:
    """Parameters of the plain model by path, and those of each adapter by the path of its layer."""
    flat: dict[tuple[Any, ...], nnx.Variable] = {}
    adapters: dict[tuple[Any, ...], dict[str, nnx.Variable]] = {}
    for path, leaf in nnx.to_flat_state(params):
        if is_adapter(path):
            adapters.setdefault(path[:-2], {})[str(path[-1])] = leaf
        else:
            flat[path] = leaf
    return flat, adapters


def _total(kernel: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    """W + scale · A · B as matrices [*layers, I, O]."""
    lead = _lead(kernel, lora_a, lora_b)
    r = lora_a.shape[-1]
    a, b = lora_a.reshape(*lead, -1, r), lora_b.reshape(*lead, r, -1)
    return kernel.reshape(*lead, a.shape[-2], b.shape[-1]) + scale * matmul(a, b)


def _lead(kernel: Array, lora_a: Array, lora_b: Array) -> tuple[int, ...]:
    """Dims of a kernel that are neither inputs nor outputs: those of stacked layers."""
    return kernel.shape[: lora_a.ndim + lora_b.ndim - 2 - kernel.ndim]


def _out(kernel: Array, lora_a: Array) -> tuple[int, ...]:
    return kernel.shape[lora_a.ndim - 1 :]


def _norms(matrices: Array) -> Array:
    """The norm of each column: [..., I, O] → [..., O]."""
    return jnp.sqrt(jnp.square(matrices).sum(-2))


def _spread(features_O: Array, ndim: int) -> Array:
    """[O] → [1, ..., O]."""
    return jnp.expand_dims(features_O, range(ndim - 1))
