"""The cases to certify and measure: masks and scores of softmax attention, and every other mechanism with its forms.

B batch, T query position, S key position, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.alignment.decomposable import DecomposableAttention
from transformer.alignment.hard import argmax_weights
from transformer.alignment.registry import AlignmentConfig, make_alignment
from transformer.alignment.scored import AdditiveConfig, LocalConfig, MultiplicativeConfig
from transformer.alignment.sparse_softmax import sparse_attention
from transformer.alignment.structured import StructuredAttention
from transformer.attention.linear.fast_weights import RULES, fast_weights
from transformer.attention.linear.feature_maps import unit_length
from transformer.attention.linear.linear_attention import linear_attention
from transformer.attention.spec.mask import AttentionMask
from transformer.layers.relative_embedding import RelativeEmbedding
from transformer.mixers.context import CAUSAL, Context
from transformer.mixers.differential import DifferentialAttention, DifferentialConfig
from transformer.mixers.disentangled import DisentangledAttention, DisentangledConfig
from transformer.mixers.latent import LatentAttention, LatentConfig
from transformer.mixers.lstmn import LSTMN, LSTMNConfig

B, N, H = 2, 4, 32
D = N * H
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}

Masks = dict[str, Callable[[int], AttentionMask]]


def _segments(length: int) -> jax.Array:
    """Two rows of packed documents, the second with padding at its end."""
    row = jnp.arange(length)
    return jnp.stack([1 + row * 5 // length, jnp.where(row < length * 7 // 8, 1 + row * 3 // length, 0)]).astype(
        jnp.int32
    )


def _layout(length: int) -> np.ndarray:
    blocks = -(-length // 16)
    return np.random.default_rng(0).random((blocks, blocks)) > 0.6


MASKS: Masks = {
    "none": lambda T: AttentionMask.none(),
    "causal": lambda T: AttentionMask.causal(),
    "window": lambda T: AttentionMask.causal() & AttentionMask.window(left=T // 6),
    "padding": lambda T: AttentionMask.padding(jnp.arange(T) < jnp.array([[T // 2], [T]])),
    "packed segments": lambda T: AttentionMask.causal() & AttentionMask.segments(_segments(T)),
    "prefix": lambda T: AttentionMask.causal() | AttentionMask.prefix(jnp.array([T // 4, T // 3])),
    "sinks + window": lambda T: (
        AttentionMask.causal() & (AttentionMask.window(left=T // 8) | AttentionMask.sinks(4))
    ),
    "global + local": lambda T: AttentionMask.window(8, 8) | AttentionMask.global_tokens(4),
    "dilated": lambda T: AttentionMask.causal() & AttentionMask.window(left=T // 2) & AttentionMask.dilated(4),
    "block sparse": lambda T: AttentionMask.block_sparse(_layout(T), 16) | AttentionMask.window(0, 1),
    "mask_mod": lambda T: AttentionMask.mod(lambda b, h, q, k: (q >= k) & ((q - k) % (h + 2) == 0)),
    "explicit": lambda T: AttentionMask.explicit(jnp.array(np.random.default_rng(1).random((B, N, T, T)) > 0.5)),
}  # fmt: skip


def _alibi(length: int) -> dict[str, Any]:
    def score_mod(score, b, h, q, k):
        return score - 0.5 ** (h + 1).astype(score.dtype) * jnp.abs(q - k).astype(score.dtype)

    return {"score_mod": score_mod}


SCORES: dict[str, Callable[[int], dict[str, Any]]] = {
    "bias": lambda T: {"bias_BNTS": jnp.asarray(normal((1, N, T, T))[0], jnp.float32)},
    "soft-cap": lambda T: {"logit_soft_cap": 5.0},
    "score_mod": _alibi,
}
"""Options of `attend` beyond the mask, for a length."""


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """A mechanism that is not softmax attention over dot products."""

    arrays: Callable[[int], list[np.ndarray]]
    """The arrays to differentiate by, for a length: parameters, then inputs."""
    forms: dict[str, Callable[..., jax.Array]]
    """Ways to compute it from those arrays; the first is its definition."""
    linear_time: bool = False
    differentiable: bool = True
    kinked: bool = False
    """Rounding in bfloat16 switches its ReLUs on and off, so its gradient in bfloat16 is not compared."""


CHUNKS: dict[str, int | None] = {"parallel": None, "chunked": 64, "recurrent": 1}
"""Chunk size of linear attention and fast weights."""


def normal(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Standard normal float64 arrays, always the same ones."""
    return [np.random.default_rng(seed).normal(size=shape) for seed, shape in enumerate(shapes)]


def _fast(rule: str, chunk: int | None) -> Callable[..., jax.Array]:
    def run(q, k, v, beta, decay):
        k = unit_length(k)
        beta = jax.nn.sigmoid(beta) if RULES[rule].erases else None
        decay = jax.nn.log_sigmoid(decay + 4) if RULES[rule].decays else None
        return fast_weights(q, k, v, beta, decay, rule=rule, chunk=chunk)[0]

    return run


def _linear(feature_map: str, chunk: int | None) -> Callable[..., jax.Array]:
    return lambda q, k, v: linear_attention(q, k, v, feature_map=feature_map, chunk=chunk)[0]


def _module(
    make: Callable[..., nnx.Module],
    call: Callable[..., jax.Array],
    *shapes: str,
    kinked: bool = False,
    spread: float = 0.3,
) -> Mechanism:
    """A mechanism by its module: `call(module, *inputs)`, differentiated by the parameters too.

    Args:
        spread: scale of the inputs. States of a recurrent network are well inside (-1, 1); outputs of a norm have unit variance.
    """

    def split(dtype: Any) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(make(dtype=dtype, rngs=nnx.Rngs(0)))

    def arrays(length: int) -> list[np.ndarray]:
        params = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(split(jnp.float32)[1])]
        sizes = {"T": length, "S": length * 2 // 3, "B": B, "D": D}
        inputs = normal(*(tuple(sizes[letter] for letter in shape) for shape in shapes))
        return params + [spread * x for x in inputs]

    def run(*arrays: jax.Array) -> jax.Array:
        graphdef, params = jax.eval_shape(lambda: split(arrays[0].dtype))
        params = jax.tree.unflatten(jax.tree.structure(params), arrays[: -len(shapes)])
        return call(nnx.merge(graphdef, params), *arrays[-len(shapes) :])

    return Mechanism(arrays, {"module": run}, kinked=kinked)


def _alignment(config: AlignmentConfig) -> Mechanism:
    """An alignment, applied to each of T queries."""

    def run(module: Any, query_BTD: jax.Array, states_BSD: jax.Array) -> jax.Array:
        source = module.prepare(states_BSD, jnp.ones(states_BSD.shape[:2], bool), states_BSD[:, 0])
        steps_T = jnp.arange(query_BTD.shape[1], dtype=jnp.int32)
        one = lambda query_BD, step: module(query_BD, source, jnp.broadcast_to(step, B))[0]  # noqa: E731
        return jax.vmap(one, in_axes=(1, 0), out_axes=1)(query_BTD, steps_T)

    return _module(lambda **kw: make_alignment(config, D, D, **_options(**kw)), run, "BTD", "BSD")


class _Disentangled(nnx.Module):
    """Disentangled attention with the table of distances that a stack of layers would have."""

    def __init__(self, **options: Any) -> None:
        config = DisentangledConfig(num_heads=N, max_distance=64, num_buckets=16, norm_embeddings=False)
        self.attention = DisentangledAttention(D, config, **options)
        table = {"init": nnx.initializers.normal(1.0), "dtype": options["dtype"], "rngs": options["rngs"]}
        self.table = RelativeEmbedding(D, max_distance=config.max_distance, num_buckets=config.num_buckets, **table)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.attention(x_BTD, Context(relative=self.table, is_causal=False))[0]


def _options(**fixed: Any) -> dict[str, Any]:
    return {"kernel_init": nnx.initializers.lecun_normal()} | fixed


def _both(**fixed: Any) -> dict[str, Any]:
    return _options(out_init=nnx.initializers.lecun_normal(), **fixed)


_QKV = lambda T: normal(*[(B, T, N, H)] * 3)  # noqa: E731
_GATED = lambda T: normal(*[(B, T, N, H)] * 3, *[(B, T, N)] * 2)  # noqa: E731

MECHANISMS: dict[str, Mechanism] = {
    "additive (Bahdanau 2014)": _alignment(AdditiveConfig(dim=H)),
    "dot, global (Luong 2015)": _alignment(MultiplicativeConfig(kind="dot")),
    "general, global (Luong 2015)": _alignment(MultiplicativeConfig(kind="general")),
    "concat, global (Luong 2015)": _alignment(AdditiveConfig(kind="concat", dim=H)),
    "general, local-m (Luong 2015)": _alignment(LocalConfig(kind="local_m", window=4)),
    "general, local-p (Luong 2015)": _alignment(LocalConfig(kind="local_p", window=4, dim=H)),
    "hard, argmax": Mechanism(
        _QKV,
        {"function": lambda q, k, v: argmax_weights(q[:, :, 0] @ k[:, :, 0].mT) @ v[:, :, 0]},
        differentiable=False,
    ),
    **{
        name: Mechanism(_QKV, {"function": lambda q, k, v, name=name: sparse_attention(q, k, v, normalizer=name)[0]})
        for name in ("sparsemax", "entmax15")
    },
    "LSTMN intra-attention (Cheng 2016)": _module(
        lambda **kw: LSTMN(D, LSTMNConfig(hidden_dim=H), **_both(**kw)), lambda m, x: m(x, CAUSAL)[0], "BTD"
    ),
    "structured (Lin 2017)": _module(
        lambda **kw: StructuredAttention(D, H, 4, **_options(**kw)), lambda m, x: m(x)[0], "BTD"
    ),
    "decomposable (Parikh 2016)": _module(
        lambda **kw: DecomposableAttention(D, H, 3, use_intra=True, **_options(**kw)),
        lambda m, a, b: m(a, b)[0],
        "BTD",
        "BSD",
        kinked=True,
    ),
    "multi-head latent (DeepSeek-AI 2024)": _module(
        lambda **kw: LatentAttention(
            D, LatentConfig(num_heads=N, latent_dim=H, head_dim=H, rotary_dim=16), **_both(**kw)
        ),
        lambda m, x: m(x, CAUSAL)[0],
        "BTD",
        spread=1.0,
    ),
    "differential (Ye et al. 2024)": _module(
        lambda **kw: DifferentialAttention(
            D, DifferentialConfig(num_heads=N, num_kv_heads=2, head_dim=H), **_both(**kw)
        ),
        lambda m, x: m(x, Context(layer=1))[0],
        "BTD",
        spread=1.0,
    ),
    "disentangled (He et al. 2021)": _module(
        lambda **kw: _Disentangled(**_both(**kw)), lambda m, x: m(x), "BTD", spread=1.0
    ),
    **{
        f"linear attention, {name}": Mechanism(
            _QKV, {form: _linear(name, chunk) for form, chunk in CHUNKS.items()}, linear_time=True
        )
        for name in ("elu", "dpfp", "favor")
    },
    **{
        f"fast weights, {rule}": Mechanism(
            _GATED, {form: _fast(rule, chunk) for form, chunk in CHUNKS.items()}, linear_time=True
        )
        for rule in RULES
    },
}
