"""Small models of ours, written as checkpoints."""

from __future__ import annotations

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np

from tests.made import made
from transformer.huggingface import checkpoint
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.position import RelativeConfig, RotaryConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.encoder_decoder import T5Config
from transformer.models.families import described_parameters, make_model
from transformer.models.gpt import GPTConfig
from transformer.models.heads import EmbeddingHeadConfig, MaskedHeadConfig

BERT = BertConfig(
    vocab_size=50, max_length=20, num_layers=2, embed_dim=16, attention=SoftmaxConfig(num_heads=2),
    mlp=DenseConfig(dim=24, activation="gelu_exact"), head=EmbeddingHeadConfig(pooler="tanh"),
)  # fmt: skip
_GLOBAL = SoftmaxConfig(num_heads=2, bias=False, position=RotaryConfig())
_LOCAL = dataclasses.replace(_GLOBAL, window=3)
MODERN = BertConfig(
    vocab_size=50, max_length=20, num_layers=4, embed_dim=16, attention=_GLOBAL, pattern=(_GLOBAL, _LOCAL, _LOCAL, _GLOBAL),
    mlp=DenseConfig(dim=24, activation="geglu_exact", bias=False), norm_first=True, first_norm=False, norm_bias=False,
    token_types=0, dropout=0.0, attention_dropout=0.0, norm_eps=1e-5, head=MaskedHeadConfig(bias=False),
)  # fmt: skip
GPT = GPTConfig(vocab_size=52, max_length=24, num_layers=4, embed_dim=16, attention=SoftmaxConfig(num_heads=2))
LLAMA = dataclasses.replace(
    GPT, norm="rms_norm", norm_eps=1e-6, tie_embeddings=False, mlp=DenseConfig(activation="swiglu", bias=False),
    attention=SoftmaxConfig(num_heads=2, num_kv_heads=1, bias=False, position=RotaryConfig()),
)  # fmt: skip
T5 = T5Config(
    vocab_size=40, max_length=24, num_layers=2, embed_dim=16, start_token=0,
    attention=SoftmaxConfig(num_heads=2, head_dim=6, bias=False, scale=1.0, position=RelativeConfig()),
    mlp=DenseConfig(dim=24, activation="geglu", bias=False), dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


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


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "dogs", "run", "over", "hills", "far", "away"]


def tokenizer_json(folder, special, size=None):
    """A tokenizer of whole words, lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {name: number for number, name in enumerate([*special, *WORDS])}
    if size is not None:
        vocabulary["last"] = size - 1
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]" if "[UNK]" in special else "<unk>"))
    model.add_special_tokens(list(special))
    model.normalizer, model.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    if "[CLS]" in special:
        ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        model.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    model.save(str(folder / "tokenizer.json"))


BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_bert(folder):
    """A small BERT with its tokenizer, as a folder of Hugging Face's."""
    written(BERT, folder, extra={"pad_token_id": 0})
    tokenizer_json(folder, BERT_SPECIAL)


def on_one_device(config):
    """A description of the parameters, all on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), described_parameters(config)
    )
