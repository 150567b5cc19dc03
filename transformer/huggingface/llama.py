"""Llama and its relatives, dense and with experts: all of them are models of the family gpt here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.fields import (
    FULL,
    GATED,
    SLIDING,
    HFConfigReader,
    dense_mlp,
    experts_mlp,
    layer_types,
    name_of,
    only_mixer,
    rotary_fields,
    rotary_of,
)
from transformer.huggingface.mapping import (
    ATTENTION,
    BLOCKS,
    FEED_FORWARD,
    QKV,
    Matrix,
    Tables,
    TensorRule,
    Vector,
    linear,
    norm,
    output_head,
    table,
)
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig


class _Names(NamedTuple):
    """Names of a mixture's fields and tensors."""

    experts: str
    """The number of experts."""
    width: str
    """An expert's hidden size."""
    module: str
    matrices: tuple[str, str, str]
    """Gate, input and output projection."""


_MIXTURES = {
    "mixtral": _Names("num_local_experts", "intermediate_size", "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": _Names("num_experts", "moe_intermediate_size", "mlp", ("gate_proj", "up_proj", "down_proj")),
}
_QWEN3S = ("qwen3", "qwen3_moe")


class _Usual(NamedTuple):
    """What transformers takes for the fields that a config does not write."""

    vocab_size: int = 32_000
    max_length: int = 2048
    num_layers: int = 32
    embed_dim: int = 4096
    num_kv_heads: int | None = None
    """None: as many as those of the queries, which it is for all if the field is null."""
    head_dim: int | None = None
    """None: embed_dim over the number of heads."""
    mlp_dim: int = 11_008
    """Of one expert in a mixture."""
    norm_eps: float = 1e-6
    theta: float = 10_000.0


_USUAL = {
    "llama": _Usual(),
    "mistral": _Usual(max_length=131_072, num_kv_heads=8, mlp_dim=14_336),
    "mixtral": _Usual(max_length=131_072, num_kv_heads=8, mlp_dim=14_336, norm_eps=1e-5, theta=1e6),
    "qwen2": _Usual(vocab_size=151_936, max_length=32_768, num_kv_heads=32, mlp_dim=22_016),
    "qwen3": _Usual(vocab_size=151_936, max_length=32_768, num_kv_heads=32, head_dim=128, mlp_dim=22_016),
    "qwen3_moe": _Usual(
        vocab_size=151_936, max_length=32_768, num_layers=24, embed_dim=2048, num_kv_heads=4, mlp_dim=768
    ),
}  # fmt: skip


def _read_llama(kind: str) -> Callable[[HFConfigReader, Any], GPTConfig]:
    """Reader of Llama and its relatives, which differ in biases, windows, norms of queries and keys, and experts."""

    usual = _USUAL[kind]

    def read(theirs: HFConfigReader, head: Any) -> GPTConfig:
        num_heads, dim = theirs.size("num_attention_heads", 32), theirs.size("hidden_size", usual.embed_dim)
        head_dim = theirs.size("head_dim", usual.head_dim or max(dim // num_heads, 1))
        num_layers = theirs.layers("num_hidden_layers", usual.num_layers)
        kv_heads = num_heads if theirs.written("num_key_value_heads") else usual.num_kv_heads or num_heads
        return GPTConfig(
            vocab_size=theirs.size("vocab_size", usual.vocab_size),
            max_length=theirs.size("max_position_embeddings", usual.max_length),
            num_layers=num_layers, embed_dim=dim,
            attention=SoftmaxConfig(
                num_heads=num_heads, head_dim=head_dim,
                num_kv_heads=theirs.size("num_key_value_heads", kv_heads),
                bias=kind in ("llama", *_QWEN3S) and theirs.flag("attention_bias", False),
                qkv_bias=True if kind == "qwen2" else None, qk_norm=kind in _QWEN3S,
                window=_window(theirs, kind, num_layers),
                position=theirs.rotary(theta=usual.theta),
            ),
            mlp=_read_experts(theirs, kind, num_layers) if kind in _MIXTURES else DenseConfig(
                dim=theirs.size("intermediate_size", usual.mlp_dim), activation=theirs.one_of("hidden_act", GATED, "silu"),
                bias=kind == "llama" and theirs.flag("mlp_bias", False),
            ),
            norm="rms_norm", norm_eps=theirs.number("rms_norm_eps", usual.norm_eps),
            attention_dropout=theirs.number("attention_dropout", 0.0),
            init_std=theirs.number("initializer_range", 0.02),
            tie_embeddings=theirs.flag("tie_word_embeddings", False),
        )  # fmt: skip

    return read


def _read_experts(theirs: HFConfigReader, kind: str, num_layers: int) -> ExpertsConfig:
    """A mixture whose router's probabilities are normalised over the chosen experts, as they are here for several of them.

    transformers has one balance loss for all layers together, which is the number of experts per token if the load is even; here
    each layer has one, which is then 1.
    """
    per_token = theirs.size("num_experts_per_tok", 2 if kind == "mixtral" else 8)
    if kind == "qwen3_moe":
        theirs.must("decoder_sparse_step", [1], 1)
        theirs.must("mlp_only_layers", [[]], [])
        theirs.must("norm_topk_prob", [per_token > 1], False)
    elif per_token < 2:
        theirs.wrong(f"num_experts_per_tok: got {per_token}; supported: 2 or more")
    names = _MIXTURES[kind]
    # transformers 5 writes num_local_experts for both.
    count = "num_local_experts" if "num_local_experts" in theirs else names.experts
    return ExpertsConfig(
        num_experts=theirs.size(count, 8 if kind == "mixtral" else 128), experts_per_token=per_token,
        dim=theirs.size(names.width, _USUAL[kind].mlp_dim),
        activation=theirs.one_of("hidden_act", GATED, "silu"),
        balance_loss=_rounded(theirs.number("router_aux_loss_coef", 0.001) * per_token / num_layers), router_z_loss=0.0,
    )  # fmt: skip


def _rounded(number: float) -> float:
    """To 12 digits, so that what is written and read again is the same."""
    return float(f"{number:.12g}")


def _window(theirs: HFConfigReader, kind: str, num_layers: int) -> int | None:
    """How many tokens before itself each token sees; their number includes the token itself."""
    if kind == "llama":
        return None
    # Only Mixtral has none by default.
    if "sliding_window" not in theirs and (kind == "mixtral" or theirs.written("sliding_window")):
        return None
    if kind not in ("mistral", "mixtral") and not theirs.flag("use_sliding_window", False):
        return None
    if kind in ("qwen2", "qwen3"):
        # This is what transformers uses; it derives them from max_window_layers if they are not written.
        kinds = set(theirs.texts("layer_types"))
        if kinds == {FULL}:
            return None
        if kinds and kinds != {SLIDING}:
            theirs.wrong(f"layer_types: got {', '.join(sorted(kinds))}; supported: the same in all layers")
        first = 0 if kinds else theirs.token("max_window_layers", 28)
        if 0 < first < num_layers:
            theirs.wrong(f"max_window_layers: got {first}; supported: 0, or a window in no layer")
        if first >= num_layers:
            return None
    width = theirs.size("sliding_window", 4096)
    if width < 2:
        theirs.wrong(f"sliding_window: got {width}; allowed: 2 or more")
    return max(width - 1, 1)


def common_fields(c: GPTConfig, mixer: SoftmaxConfig) -> dict[str, Any]:
    """The fields that mean the same in Llama and all of its relatives."""
    return {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim, "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads or mixer.num_heads,
        "head_dim": mixer.head_dim or c.embed_dim // mixer.num_heads, "rms_norm_eps": c.norm_eps,
        "attention_dropout": c.attention_dropout, "initializer_range": c.init_std, "tie_word_embeddings": c.tie_embeddings,
    }  # fmt: skip


def _llama_fields(kind: str) -> Callable[[GPTConfig], dict[str, Any]]:
    def write(c: GPTConfig) -> dict[str, Any]:
        mixer, mlp = only_mixer(c), experts_mlp(c) if kind in _MIXTURES else dense_mlp(c)
        rotary = rotary_of(mixer)
        fields = common_fields(c, mixer) | {
            _MIXTURES[kind].width if kind in _MIXTURES else "intermediate_size": mlp.width(c.embed_dim),
            "hidden_act": name_of(GATED, mlp.activation), "rope_parameters": rotary_fields(rotary),
            "rope_theta": rotary.theta,
        }  # fmt: skip
        if kind in ("llama", *_QWEN3S):
            fields["attention_bias"] = mixer.bias
        if isinstance(mlp, ExpertsConfig):
            fields |= {
                _MIXTURES[kind].experts: mlp.num_experts, "num_experts_per_tok": mlp.experts_per_token,
                "router_aux_loss_coef": _rounded(mlp.balance_loss * c.num_layers / mlp.experts_per_token),
            }  # fmt: skip
        if kind == "qwen3_moe" and isinstance(mlp, ExpertsConfig):
            fields |= {"norm_topk_prob": mlp.experts_per_token > 1, "use_sliding_window": mixer.window is not None}
        if kind == "llama":
            fields["mlp_bias"] = dense_mlp(c).bias
        else:
            fields["sliding_window"] = None if mixer.window is None else mixer.window + 1
        if kind in ("qwen2", "qwen3"):
            fields |= {"use_sliding_window": mixer.window is not None, "max_window_layers": 0}
            fields |= {"layer_types": layer_types([mixer] * c.num_layers)}
        return fields

    return write


def _llama_tables(kind: str, c: GPTConfig) -> Tables:
    layer, mixer = "model.layers.{}", only_mixer(c)
    head, copies = output_head(c.tie_embeddings, "lm_head", "model.embed_tokens.weight")
    norms: list[TensorRule] = []
    if mixer.qk_norm:
        norms = [
            TensorRule(f"{layer}.self_attn.{short}_norm.weight", (f"{ATTENTION}.{name}_norm.scale",), Vector())
            for short, name in (("q", "query"), ("k", "key"))
        ]
    rules = rules_of(
        table("model.embed_tokens", "embed"),
        norm(f"{layer}.input_layernorm", f"{BLOCKS}.attention_norm", use_bias=False),
        attention_tables(layer, mixer),
        norms,
        norm(f"{layer}.post_attention_layernorm", f"{BLOCKS}.feed_forward_norm", use_bias=False),
        _expert_tables(_MIXTURES[kind], layer, experts_mlp(c).num_experts)
        if kind in _MIXTURES
        else gated_tables(layer, use_bias=dense_mlp(c).bias),
        norm("model.norm", "layers.final_norm", use_bias=False),
        head,
    )
    return Tables(rules, copies, ("*.rotary_emb.inv_freq",))


def attention_tables(layer: str, mixer: SoftmaxConfig) -> Iterator[TensorRule]:
    """The four projections of attention."""
    for short, ours in zip("qkv", QKV, strict=True):
        yield from linear(f"{layer}.self_attn.{short}_proj", ours, use_bias=mixer.has_qkv_bias)
    yield from linear(f"{layer}.self_attn.o_proj", f"{ATTENTION}.out", use_bias=mixer.bias, num_in=2)


def gated_tables(layer: str, *, use_bias: bool) -> Iterator[TensorRule]:
    """The three projections of a gated feed-forward network."""
    for name in ("gate", "up", "down"):
        yield from linear(f"{layer}.mlp.{name}_proj", f"{FEED_FORWARD}.{name}", use_bias=use_bias)


def _expert_tables(names: _Names, layer: str, num_experts: int) -> list[TensorRule]:
    """The router, and each expert's three matrices."""
    module = f"{layer}.{names.module}"
    ours = (f"{FEED_FORWARD}.{name}" for name in ("gate_EDF", "up_EDF", "down_EFD"))
    experts = [
        TensorRule(f"{module}.experts.{{expert}}.{theirs}.weight", (one,), Matrix(), experts=num_experts)
        for theirs, one in zip(names.matrices, ours, strict=True)
    ]
    return [*linear(f"{module}.gate", f"{FEED_FORWARD}.router", use_bias=False), *experts]


def _llama(kind: str, name: str) -> Architecture:
    return Architecture(
        model_type=kind, family=GPTConfig, classes={f"{name}ForCausalLM": "", f"{name}Model": ""},
        bare=(f"{name}Model",), prefix="model", heads=("lm_head.",),
        read=_read_llama(kind), write=_llama_fields(kind), tables=functools.partial(_llama_tables, kind),
    )  # fmt: skip


LLAMA, MISTRAL = _llama("llama", "Llama"), _llama("mistral", "Mistral")
QWEN2, QWEN3 = _llama("qwen2", "Qwen2"), _llama("qwen3", "Qwen3")
MIXTRAL, QWEN3_MOE = _llama("mixtral", "Mixtral"), _llama("qwen3_moe", "Qwen3Moe")
