"""Models whose weights are set by hand, so that what each part does is known."""

from __future__ import annotations

import numpy as np
from flax import nnx

from transformer.layers.feed_forward import DenseConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig

V, T = 32, 16
D = 3 * V + T
TOKEN, PREVIOUS, OUT, PLACE = (slice(start, stop) for start, stop in ((0, V), (V, 2 * V), (2 * V, 3 * V), (3 * V, D)))
"""What each part of the residual stream holds: the token, the token before, the prediction, and the position, all one-hot."""
SHARP = 40.0


def set_to(param, value):
    param.set_value(np.asarray(value, np.float32))


def induction_model():
    """A GPT of two layers and two heads that continues a repeated sequence: [a b c a] is followed by b.

    Head 0 of layer 0 copies the token before to every position. Head 0 of layer 1 looks for a position whose token before is the
    current token, and writes the token there into the prediction. Heads 1 and the feed-forward layers write nothing.
    """
    config = GPTConfig(
        vocab_size=V, max_length=T, num_layers=2, embed_dim=D, norm="rms_norm", norm_eps=1e-12, tie_embeddings=False,
        attention=SoftmaxConfig(num_heads=2, head_dim=V, bias=False, scale=1.0), mlp=DenseConfig(dim=4, bias=False),
    )  # fmt: skip
    model = GPT(config, rngs=nnx.Rngs(0))
    eye = np.eye(V, dtype=np.float32)
    set_to(model.embed.table, np.pad(eye, ((0, 0), (0, D - V))))
    set_to(model.positions.table, np.pad(np.eye(T), ((0, 0), (3 * V, 0))))
    set_to(model.head.kernel, np.pad(eye, ((2 * V, T), (0, 0))))
    attention = model.layers.blocks.attention
    query, key, value, out = (np.zeros((2, D, 2, V), np.float32) for _ in range(4))
    # The norm multiplies a stream of k ones by sqrt(D / k).
    query[0, PLACE, 0, :T] = SHARP * np.eye(T)
    key[0, PLACE, 0, :T] = np.eye(T, k=1)
    value[0, TOKEN, 0] = eye / np.sqrt(D / 2)
    out[0, PREVIOUS, 0] = eye
    query[1, TOKEN, 0] = SHARP * eye
    key[1, PREVIOUS, 0] = eye
    value[1, TOKEN, 0] = eye / np.sqrt(D / 3)
    out[1, OUT, 0] = eye
    set_to(attention.query.kernel, query)
    set_to(attention.key.kernel, key)
    set_to(attention.value.kernel, value)
    set_to(attention.out.kernel, out.transpose(0, 2, 3, 1))
    for linear in nnx.iter_modules(model.layers.blocks.feed_forward):
        if hasattr(linear[1], "kernel"):
            set_to(linear[1].kernel, np.zeros(linear[1].kernel.shape))
    return model
