"""The sequence mixers that a config can name. To add one, add a file and a line here.

A mixer takes `(x, context)` and returns `(out, state, weights)`; `make_state(batch_size, max_length)` makes its decoding state.
"""

from __future__ import annotations

from typing import Any

from transformer.mixers.differential import DifferentialAttention, DifferentialConfig
from transformer.mixers.disentangled import DisentangledAttention, DisentangledConfig
from transformer.mixers.fast_weights import FastWeightAttention, FastWeightConfig
from transformer.mixers.latent import LatentAttention, LatentConfig
from transformer.mixers.linear import LinearAttention, LinearAttentionConfig
from transformer.mixers.lstmn import LSTMN, LSTMNConfig
from transformer.mixers.softmax import MultiHeadAttention, SoftmaxConfig

MixerConfig = (
    SoftmaxConfig
    | LatentConfig
    | DifferentialConfig
    | DisentangledConfig
    | LinearAttentionConfig
    | FastWeightConfig
    | LSTMNConfig
)
Mixer = (
    MultiHeadAttention
    | LatentAttention
    | DifferentialAttention
    | DisentangledAttention
    | LinearAttention
    | FastWeightAttention
    | LSTMN
)

MIXERS: dict[type, type] = {
    SoftmaxConfig: MultiHeadAttention,
    LatentConfig: LatentAttention,
    DifferentialConfig: DifferentialAttention,
    DisentangledConfig: DisentangledAttention,
    LinearAttentionConfig: LinearAttention,
    FastWeightConfig: FastWeightAttention,
    LSTMNConfig: LSTMN,
}

DROPS_WEIGHTS = (SoftmaxConfig, LatentConfig, DifferentialConfig, DisentangledConfig)
"""Mixers with softmax weights, to which attention dropout applies."""


def make_mixer(config: MixerConfig, embed_dim: int, *, dropout_rate: float, norm_eps: float, **options: Any) -> Mixer:
    """The mixer for a config.

    Args:
        dropout_rate: of attention weights, for mixers that have them.
        norm_eps: of the norms of queries and keys in softmax attention.
        options: kernel_init, out_init, dtype, param_dtype and rngs.
    """
    if isinstance(config, DROPS_WEIGHTS):
        options |= {"dropout_rate": dropout_rate}
    if isinstance(config, SoftmaxConfig):
        options |= {"norm_eps": norm_eps}
    return MIXERS[type(config)](embed_dim, config, **options)
