"""The output projection and the cross-entropy as one operation, in chunks of tokens: the logits of all tokens never exist.

B batch, T position, N tokens of a device, n tokens of a chunk, D embed, V vocab.

The gradient of a chunk is made while its logits are at hand, so that no product is computed twice, as in Hsu et al. 2024
(Liger kernel, section 3.2). The loss is a scalar, so the backward pass only multiplies these gradients by its gradient.
(Wijmans et al. 2024 compute the logits a second time instead.)

Each device takes its own tokens, in `jax.shard_map` over the whole mesh: the projection is gathered once before the loop
over chunks, and its gradient is summed over devices once after it. A sharded vocabulary stays sharded; inside the loop only
statistics of single tokens are exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transformer.differentiation import with_backward
from transformer.sharding import axes_to_map, dividing_axes
from transformer.types import Array, DTypeLike, Float, Int, wide

CHUNK_BYTES = 512 * 2**20
"""The most bytes of float32 logits that a device holds with chunks of `auto`, unless `CHUNK_TOKENS` need more."""
TILE = 128
"""Tokens of a chunk are a multiple of this: the tiles in which a GPU and a TPU compute matrix products."""
CHUNK_TOKENS = 1024
"""The fewest tokens of a chunk of `auto`: with fewer, adding up the projection's gradient takes a visible share of the time."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "bias_V"),
    meta_fields=("is_table", "dtype", "soft_cap"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """A model's output projection: what turns hidden states into logits."""

    kernel: Array
    """A table [V, D], usually the token embedding, or a kernel [D, V]."""
    is_table: bool
    """Whether the kernel is [V, D]."""
    bias_V: Array | None = None
    """Added to the logits."""
    dtype: DTypeLike = jnp.float32
    """The type of the products' operands; they are accumulated in float32, and the logits are not rounded."""
    soft_cap: float | None = None
    """Soft cap c of the logits: c tanh(logits / c)."""


def token_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    projection: Projection,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: Literal["auto"] | int | None = "auto",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted sums over tokens of the loss and of the negative log-likelihood, in float32.

    Label smoothing is that of Szegedy et al. 2016, the z-loss that of Chowdhery et al. 2022, section 5. Only the loss has a
    gradient, with regard to hidden states, kernel and bias; the likelihood and the weights are constants to it. Without
    differentiation, only the forward pass of each chunk is computed.

    Args:
        hidden_BTD: what the projection reads.
        targets_BT: a token id for each position.
        weights_BT: of each position; 0: it is not counted.
        z_loss: weight of log(Z)².
        label_smoothing: the probability that is spread uniformly over the vocabulary.
        chunk: the most tokens of a device whose logits exist at the same time; None: all of them; auto: as many as fit into
            `CHUNK_BYTES`, but at least `CHUNK_TOKENS`.
    """
    kernel, bias_V = projection.kernel, projection.bias_V
    B, T = targets_BT.shape
    V, D = kernel.shape if projection.is_table else kernel.shape[::-1]
    layout = _layout({"batch": B, "seq": T, "vocab": V, "embed": D})
    task = _Task(projection.is_table, projection.dtype, projection.soft_cap, z_loss, label_smoothing, chunk, V, layout)
    args = hidden_BTD, kernel, bias_V, targets_BT, weights_BT
    loss, nll = with_backward(task.forward, _backward, *args, value=task.value)
    return loss, jax.lax.stop_gradient(nll)


def tokens_of_chunk(chunk: Literal["auto"] | int | None, tokens: int, vocab_size: int) -> int:
    """The most tokens of a chunk.

    Args:
        chunk: as for `token_cross_entropy`.
        tokens: of a device.
        vocab_size: of its part of the vocabulary.
    """
    if chunk == "auto":
        chunk = max(CHUNK_BYTES // (4 * vocab_size), CHUNK_TOKENS)
    return tokens if chunk is None else min(chunk, tokens)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The mesh axes over which each dim is split; empty for a dim that they do not divide."""

    batch: tuple[str, ...]
    seq: tuple[str, ...]
    vocab: tuple[str, ...]
    embed: tuple[str, ...]
    """Of the projection only: a device has its tokens' whole features."""

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.batch + self.seq


def _layout(sizes: dict[str, int]) -> _Layout:
    placed = {axis: dividing_axes(axis, size) for axis, size in sizes.items()}
    # Devices that split the features of the projection, but not the tokens, would all compute the same.
    if not set(placed["embed"]) <= {*placed["batch"], *placed["seq"]}:
        placed["embed"] = ()
    return _Layout(**placed)


@dataclasses.dataclass(frozen=True)
class _Task:
    """Everything static about one call."""

    is_table: bool
    dtype: DTypeLike
    soft_cap: float | None
    z_loss: float
    label_smoothing: float
    chunk: Literal["auto"] | int | None
    vocab_size: int
    layout: _Layout

    def value(self, *args: Any) -> tuple[Array, Array]:
        """Loss and negative log-likelihood."""
        return self._on_devices(False, *args)[0]

    def forward(self, *args: Any) -> tuple[tuple[Array, Array], tuple[Array, Array, Array | None]]:
        """The same, and the loss's gradients with regard to hidden states, kernel and bias."""
        return self._on_devices(True, *args)

    def _on_devices(self, with_gradients: bool, *args: Any) -> Any:
        own = functools.partial(self._own, with_gradients)
        at = self.layout
        if not (at.tokens or at.vocab):
            return own(*args)
        mapped = axes_to_map()
        assert mapped is not None, "an axis of several devices is free"
        tokens, vocab, embed = PartitionSpec(at.batch or None, at.seq or None), at.vocab or None, at.embed or None
        kernel = PartitionSpec(vocab, embed) if self.is_table else PartitionSpec(embed, vocab)
        bias = None if args[2] is None else PartitionSpec(vocab)
        gradients = (tokens, kernel, bias) if with_gradients else None
        return jax.shard_map(
            own,
            in_specs=(tokens, kernel, bias, tokens, tokens),
            out_specs=((PartitionSpec(), PartitionSpec()), gradients),
            axis_names=mapped,
            check_vma=False,
        )(*args)

    def _own(
        self, with_gradients: bool, hidden: Array, kernel: Array, bias_V: Array | None, targets: Array, weights: Array
    ) -> Any:
        """The sums over all devices, and this device's part of the gradients."""
        at, wide_type = self.layout, wide(self.dtype)
        whole = kernel.astype(self.dtype)
        embed_dim, vocab_dim = (1, 0) if self.is_table else (0, 1)
        if at.embed:
            whole = jax.lax.all_gather(whole, at.embed, axis=embed_dim, tiled=True)
        bias = None if bias_V is None else bias_V.astype(wide_type)
        N = targets.size
        n = _even(tokens_of_chunk(self.chunk, N, whole.shape[vocab_dim]), N)
        parts = -(-N // n)

        def cut(x: Array) -> Array:
            """[B, T, ...] → [parts, n, ...]; what is missing from the last chunk has weight 0."""
            x = x.reshape(N, *x.shape[2:])
            if parts * n > N:
                x = jnp.pad(x, [(0, parts * n - N)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(parts, n, *x.shape[1:])

        chunks = cut(hidden.astype(self.dtype)), cut(targets), cut(weights)
        of_chunk = functools.partial(self._chunk, with_gradients, whole, bias)
        if parts == 1:
            sums, dx = of_chunk(jax.tree.map(lambda x: x[0], chunks))
            dx = jax.tree.map(lambda x: x[None], dx)
        else:
            first = jax.tree.map(lambda x: x[0], chunks)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_chunk, first)[0])

            def add(total: Any, chunk: Any) -> tuple[Any, Array | None]:
                sums, dx = of_chunk(chunk)
                return jax.tree.map(jnp.add, total, sums), dx

            sums, dx = jax.lax.scan(add, zeros, chunks)
        loss_and_nll, gradients = sums
        loss_and_nll = jax.tree.map(lambda x: _sum(x, at.tokens), loss_and_nll)
        if not with_gradients:
            return loss_and_nll, None
        dkernel, dbias = gradients
        assert dx is not None
        dhidden = _sum(dx, at.vocab).reshape(parts * n, -1)[:N].reshape(hidden.shape)
        dkernel = _sum(dkernel, tuple(name for name in at.tokens if name not in at.embed))
        if at.embed:
            dkernel = jax.lax.psum_scatter(dkernel, at.embed, scatter_dimension=embed_dim, tiled=True)
        dbias = None if bias_V is None else _sum(dbias, at.tokens).astype(bias_V.dtype)
        return loss_and_nll, (dhidden.astype(hidden.dtype), dkernel.astype(kernel.dtype), dbias)

    def _chunk(
        self, with_gradients: bool, kernel: Array, bias_V: Array | None, chunk: tuple[Array, Array, Array]
    ) -> tuple[Any, Array | None]:
        """((loss, nll), (kernel's gradient, bias's gradient)), and the gradient of the hidden states, of one chunk."""
        x_nD, targets_n, weights_n = chunk
        wide_type, V, vocab = wide(self.dtype), self.vocab_size, self.layout.vocab
        embed_dim, vocab_dim = (1, 0) if self.is_table else (0, 1)
        logits_nV = _contract(x_nD, kernel, 1, embed_dim)
        if bias_V is not None:
            logits_nV = logits_nV + bias_V[None]
        if (cap := self.soft_cap) is not None:
            capped_nV = jnp.tanh(logits_nV / cap)
            logits_nV = cap * capped_nV
        weights_n = weights_n.astype(wide_type)
        greatest_n = _max(jax.lax.stop_gradient(logits_nV.max(-1)), vocab)
        exp_nV = jnp.exp(logits_nV - greatest_n[:, None])
        z_n = _sum(exp_nV.sum(-1), vocab)
        log_z_n = jnp.log(z_n) + greatest_n
        # A masked sum instead of a gather: it needs no communication when the vocabulary is sharded.
        first = jax.lax.axis_index(vocab).astype(targets_n.dtype) * logits_nV.shape[1] if vocab else 0
        ids_nV = jax.lax.broadcasted_iota(targets_n.dtype, logits_nV.shape, 1)
        is_target_nV = ids_nV == (targets_n - first)[:, None]
        nll_n = log_z_n - _sum(jnp.where(is_target_nV, logits_nV, 0).sum(-1), vocab)
        loss_n, smoothing = nll_n, self.label_smoothing
        if smoothing:
            uniform_n = log_z_n - _sum(logits_nV.sum(-1), vocab) / V
            loss_n = (1 - smoothing) * nll_n + smoothing * uniform_n
        if self.z_loss:
            loss_n = loss_n + self.z_loss * jnp.square(log_z_n)
        sums = jnp.sum(loss_n * weights_n), jnp.sum(nll_n * weights_n)
        if not with_gradients:
            return (sums, None), None
        # The gradient of log Z is the softmax, that of the target's logit one at the target.
        factor_n = weights_n * (1 + 2 * self.z_loss * log_z_n) / z_n if self.z_loss else weights_n / z_n
        at_target_n = (1 - smoothing) * weights_n
        dlogits_nV = factor_n[:, None] * exp_nV - jnp.where(is_target_nV, at_target_n[:, None], 0)
        if smoothing:
            dlogits_nV = dlogits_nV - (smoothing / V * weights_n)[:, None]
        if cap is not None:
            dlogits_nV = dlogits_nV * (1 - jnp.square(capped_nV))
        dbias_V = None if bias_V is None else dlogits_nV.sum(0)
        # As everywhere, the operands of the products are in the compute type.
        dlogits_nV = dlogits_nV.astype(self.dtype)
        dx_nD = _contract(dlogits_nV, kernel, 1, vocab_dim)
        # Parts of a sum over devices are not rounded.
        dx_nD = dx_nD if vocab else dx_nD.astype(self.dtype)
        if self.is_table:
            dkernel = _contract(dlogits_nV, x_nD, 0, 0)
        else:
            # With an operand that is really transposed, XLA:CPU's product is 8% of the whole faster; elsewhere the copy is small.
            x_Dn = jax.lax.optimization_barrier(x_nD.T)
            dkernel = _contract(x_Dn, dlogits_nV, 1, 0)
        return (sums, (dkernel, dbias_V)), dx_nD


def _backward(saved: tuple[Array, Array, Array | None], douts: tuple[Array, Array]) -> tuple[Array | None, ...]:
    """The gradients of the arguments of `_Task.forward`; the likelihood's is zero."""
    dloss, _ = douts
    scaled = jax.tree.map(lambda x: (x.astype(dloss.dtype) * dloss).astype(x.dtype), saved)
    return (*scaled, None, None)


def _even(most: int, tokens: int) -> int:
    """The size of chunks of at most this size that leaves the last one the least to fill up, in whole tiles of `TILE`."""
    if most >= tokens or most < TILE:
        return -(-tokens // -(-tokens // most))
    sizes = range(most // TILE * TILE, most // 2, -TILE)
    return min(sizes, key=lambda size: -(-tokens // size) * size, default=most)


def _contract(a: Array, b: Array, a_dim: int, b_dim: int) -> Array:
    """The product of two matrices, accumulated in float32 (float64 for float64 operands)."""
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=wide(a.dtype))


def _sum(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def _max(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.pmax(x, axes) if axes else x
