"""Small models of ours, written as checkpoints."""

from __future__ import annotations

import functools

import jax
import ml_dtypes
import numpy as np

from tests.made import made
from transformer.hf import checkpoint
from transformer.models.bert import BertConfig
from transformer.models.encoder_decoder import T5Config
from transformer.models.families import described_parameters, make_model
from transformer.models.gpt import GPTConfig

BERT = BertConfig(
    vocab_size=50, max_length=20, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, head="embedding", pooler=True
)
MODERN = BertConfig(
    vocab_size=50, max_length=20, num_layers=4, embed_dim=16, num_heads=2, mlp_dim=24, activation="geglu_exact",
    norm_first=True, first_norm=False, token_types=0, position="rotary", local_window=3, use_bias=False, head_bias=False,
    dropout=0.0, norm_epsilon=1e-5,
)  # fmt: skip
GPT = GPTConfig(vocab_size=52, max_length=24, num_layers=4, embed_dim=16, num_heads=2)
T5 = T5Config(
    vocab_size=40, max_length=24, num_layers=2, embed_dim=16, num_heads=2, head_dim=6, mlp_dim=24, start_token=0
)


def params_of(config, seed=0):
    """Fresh parameters, none of which is as at first."""
    _, params = made(functools.partial(make_model, config), seed=seed)
    if not getattr(config, "first_norm", True):
        # Where there is no norm, its gain is 1, and nothing that is written.
        scale = params["layers"]["blocks"]["attention_norm"]["scale"]
        scale.set_value(scale.get_value().at[0].set(1.0))
    return params


def written(config, folder, *, seed=0, dtype="float32", **options):
    """The parameters that were written into a folder."""
    folder.mkdir(exist_ok=True)
    params = params_of(config, seed)
    types = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    checkpoint.write(folder, config, params, dtype=types[dtype], **options)
    return params


def on_one_device(config):
    """A description of the parameters, all on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), described_parameters(config)
    )
