"""Small random models of transformers, saved as their own checkpoints."""

from __future__ import annotations

import functools
import warnings

import numpy as np

SEED = 7


def peer(name, fields, **more):
    """A model of a class of transformers, with weights that are all far from their initial values."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    kind = getattr(transformers, name)
    config = kind.config_class(**fields, **more, attn_implementation="eager")
    model = kind(config).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            # Marian's positions are sines.
            if "embed_positions" not in part:
                parameter.add_(0.15 * torch.randn_like(parameter))
        if not fields.get("tie_word_embeddings", True) and "T5" in name:
            # Version 5 of transformers has no other way to make one.
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def saved(model, folder, **options):
    """The model's folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def loaded(name, folder):
    """A class's model from a folder, and what was wrong with it by its own account."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    return model.eval(), {key: value for key, value in info.items() if value}


@functools.cache
def tokens(rows, length, vocab):
    """Token ids, none of which is one that a model may give a meaning of its own."""
    return np.random.default_rng(rows + length).integers(5, vocab, (rows, length))


ENCODER = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ALBERT = ENCODER | {"num_hidden_layers": 4, "embedding_size": 16}
NOMIC = ENCODER | {"hidden_size": 32, "num_attention_heads": 2}
DEBERTA = ENCODER | {
    "relative_attention": True, "pos_att_type": "p2c|c2p", "share_att_key": True, "norm_rel_ebd": "layer_norm",
    "position_buckets": 4, "max_relative_positions": -1, "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
DEBERTA_V2 = DEBERTA | {
    "position_buckets": -1, "max_relative_positions": 6, "share_att_key": False, "norm_rel_ebd": "none",
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 60, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 32,
    "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
MODERNBERT = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 36,
    "max_position_embeddings": 64, "local_attention": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 40}
NEOX = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 50,
    "max_position_embeddings": 40,
}  # fmt: skip
LLAMA = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 50, "max_position_embeddings": 40,
}  # fmt: skip
T5 = {"vocab_size": 61, "d_model": 24, "num_layers": 2, "num_heads": 3, "d_kv": 6, "d_ff": 40, "dropout_rate": 0.0}
MARIAN = {
    "vocab_size": 61, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 40,
    "activation_function": "swish", "scale_embedding": True, "pad_token_id": 60, "decoder_start_token_id": 60,
    "eos_token_id": 0, "forced_eos_token_id": 0, "dropout": 0.0,
}  # fmt: skip

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 10}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

ENCODERS = {
    "BertModel": ("BertModel", ENCODER),
    "BertForMaskedLM": ("BertForMaskedLM", ENCODER | {"hidden_act": "gelu_new", "vocab_size": 77}),
    "BertForPreTraining": ("BertForPreTraining", ENCODER | {"num_attention_heads": 2, "intermediate_size": 17}),
    "BertForSequenceClassification": ("BertForSequenceClassification", ENCODER | {"num_labels": 5}),
    "BertForSequenceClassification, several labels": (
        "BertForSequenceClassification",
        ENCODER | {"num_labels": 4, "problem_type": "multi_label_classification"},
    ),
    "BertForTokenClassification": ("BertForTokenClassification", ENCODER | {"num_labels": 7, "hidden_act": "relu"}),
    "BertForQuestionAnswering": ("BertForQuestionAnswering", ENCODER | {"num_hidden_layers": 3}),
    "BertForMultipleChoice": ("BertForMultipleChoice", ENCODER | {"type_vocab_size": 3}),
    "AlbertModel": ("AlbertModel", ALBERT),
    "AlbertForMaskedLM": ("AlbertForMaskedLM", ALBERT | {"num_hidden_groups": 2}),
    "AlbertForPreTraining": ("AlbertForPreTraining", ALBERT | {"vocab_size": 77}),
    "AlbertForSequenceClassification": ("AlbertForSequenceClassification", ALBERT | {"num_hidden_groups": 4}),
    "AlbertForQuestionAnswering": ("AlbertForQuestionAnswering", ALBERT | {"hidden_act": "gelu"}),
    "DebertaV2Model": ("DebertaV2Model", DEBERTA | {"max_relative_positions": 9, "type_vocab_size": 2}),
    "DebertaV2Model, absolute positions too": (
        "DebertaV2Model",
        DEBERTA_V2 | {"position_biased_input": True, "norm_rel_ebd": "layer_norm"},
    ),
    "DebertaV2ForMaskedLM": ("DebertaV2ForMaskedLM", DEBERTA | {"vocab_size": 77}),
    "DebertaV2ForMaskedLM, no buckets": ("DebertaV2ForMaskedLM", DEBERTA_V2 | {"hidden_act": "gelu_new"}),
    "DebertaV2ForMaskedLM, the other head": (
        "DebertaV2ForMaskedLM",
        DEBERTA | {"legacy": False, "num_hidden_layers": 1},
    ),
    "DebertaV2ForSequenceClassification": ("DebertaV2ForSequenceClassification", DEBERTA | {"num_labels": 3}),
    "DebertaV2ForSequenceClassification, content to position": (
        "DebertaV2ForSequenceClassification",
        DEBERTA_V2 | {"pos_att_type": ["c2p"], "position_buckets": 2, "pooler_hidden_act": "tanh"},
    ),
    "DebertaV2ForTokenClassification": ("DebertaV2ForTokenClassification", DEBERTA | {"position_buckets": 8}),
    "DebertaV2ForTokenClassification, position to content": (
        "DebertaV2ForTokenClassification",
        DEBERTA_V2 | {"pos_att_type": ["p2c"], "num_labels": 4},
    ),
    "DebertaV2ForQuestionAnswering": ("DebertaV2ForQuestionAnswering", DEBERTA | {"num_hidden_layers": 3}),
    "DebertaV2ForMultipleChoice": ("DebertaV2ForMultipleChoice", DEBERTA | {"pos_att_type": ["c2p"]}),
    "MPNetModel": ("MPNetModel", ENCODER),
    "MPNetForMaskedLM": ("MPNetForMaskedLM", ENCODER | {"layer_norm_eps": 1e-5}),
    "MPNetForSequenceClassification": ("MPNetForSequenceClassification", ENCODER | {"num_labels": 3}),
    "MPNetForMultipleChoice": ("MPNetForMultipleChoice", ENCODER),
    "NomicBertModel": ("NomicBertModel", NOMIC),
    "NomicBertForMaskedLM": ("NomicBertForMaskedLM", NOMIC | {"hidden_act": "gelu"}),
    "NomicBertForSequenceClassification": ("NomicBertForSequenceClassification", NOMIC | {"num_labels": 3}),
    "NomicBertForTokenClassification": ("NomicBertForTokenClassification", NOMIC | {"type_vocab_size": 1}),
    "RobertaModel": ("RobertaModel", ENCODER | {"type_vocab_size": 1}),
    "RobertaForMaskedLM": ("RobertaForMaskedLM", ENCODER | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "RobertaForSequenceClassification": ("RobertaForSequenceClassification", ENCODER | {"num_labels": 3}),
    "RobertaForTokenClassification": ("RobertaForTokenClassification", ENCODER | {"max_position_embeddings": 21}),
    "RobertaForQuestionAnswering": ("RobertaForQuestionAnswering", ENCODER | {"hidden_size": 18}),
    "XLMRobertaForMaskedLM": ("XLMRobertaForMaskedLM", ENCODER),
    "DistilBertModel": ("DistilBertModel", DISTILBERT),
    "DistilBertForMaskedLM": ("DistilBertForMaskedLM", DISTILBERT | {"vocab_size": 71}),
    "DistilBertForSequenceClassification": ("DistilBertForSequenceClassification", DISTILBERT | {"num_labels": 4}),
    "DistilBertForTokenClassification": ("DistilBertForTokenClassification", DISTILBERT | {"n_heads": 4}),
    "DistilBertForQuestionAnswering": ("DistilBertForQuestionAnswering", DISTILBERT | {"n_layers": 3, "dim": 18}),
    "ElectraModel": ("ElectraModel", ENCODER | {"embedding_size": 10}),
    "ElectraForPreTraining": ("ElectraForPreTraining", ENCODER | {"embedding_size": 24}),
    "ElectraForMaskedLM": ("ElectraForMaskedLM", ENCODER | {"embedding_size": 12}),
    "ElectraForSequenceClassification": ("ElectraForSequenceClassification", ENCODER | {"embedding_size": 7}),
    "ElectraForTokenClassification": (
        "ElectraForTokenClassification",
        ENCODER | {"embedding_size": 24, "num_labels": 3},
    ),
    "ModernBertModel": ("ModernBertModel", MODERNBERT),
    "ModernBertForMaskedLM": ("ModernBertForMaskedLM", MODERNBERT | {"num_hidden_layers": 7}),
    "ModernBertForMaskedLM with biases": (
        "ModernBertForMaskedLM",
        MODERNBERT | {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
    ),
    "ModernBertForSequenceClassification": (
        "ModernBertForSequenceClassification",
        MODERNBERT | {"classifier_pooling": "mean", "num_labels": 3},
    ),
    "ModernBertForTokenClassification": (
        "ModernBertForTokenClassification",
        MODERNBERT | {"num_labels": 5, "norm_bias": True, "classifier_bias": True},
    ),
    "ModernBertForQuestionAnswering": ("ModernBertForQuestionAnswering", MODERNBERT | {"norm_eps": 1e-3}),
    "ModernBertForMultipleChoice": ("ModernBertForMultipleChoice", MODERNBERT | {"classifier_pooling": "mean"}),
    "ModernBertModel, all global": ("ModernBertModel", MODERNBERT | {"layer_types": ["full_attention"] * 5}),
}
DECODERS = {
    "GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "GPT2LMHeadModel, untied": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False, "n_inner": 33}),
    "GPT2Model": ("GPT2Model", GPT2 | {"activation_function": "relu"}),
    "GPT2, exact gelu": ("GPT2LMHeadModel", GPT2 | {"activation_function": "gelu", "n_head": 4, "n_layer": 3}),
    "GPT2, one head": ("GPT2LMHeadModel", GPT2 | {"n_embd": 14, "n_head": 1, "vocab_size": 128}),
    "GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", NEOX),
    "GPT-NeoX, in a row": ("GPTNeoXForCausalLM", NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "GPT-NeoX, all rotated": ("GPTNeoXForCausalLM", NEOX | {"rotary_pct": 1.0, "hidden_size": 24}),
    "GPT-NeoX, no biases": ("GPTNeoXForCausalLM", NEOX | {"attention_bias": False, "rotary_pct": 0.5}),
    "GPT-NeoX, tied": ("GPTNeoXForCausalLM", NEOX | {"tie_word_embeddings": True, "rotary_emb_base": 500}),
    "LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "Llama, tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "Llama, biases": ("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "Llama 3's positions": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3, "head_dim": 10}),
    "Llama, YaRN": ("LlamaForCausalLM", LLAMA | {"rope_parameters": YARN}),
    "LlamaModel, tied": ("LlamaModel", LLAMA | {"tie_word_embeddings": True}),
    "MistralForCausalLM": ("MistralForCausalLM", LLAMA | {"sliding_window": 4}),
    "Mistral, no window": ("MistralForCausalLM", LLAMA | {"sliding_window": None, "head_dim": 8}),
    "Mistral, tied": ("MistralForCausalLM", LLAMA | {"sliding_window": 3, "tie_word_embeddings": True}),
    "Mistral, multi-query": ("MistralForCausalLM", LLAMA | {"num_key_value_heads": 1}),
    "Mistral, odd sizes": (
        "MistralForCausalLM",
        LLAMA | {"vocab_size": 67, "intermediate_size": 37, "rms_norm_eps": 1e-5},
    ),
    "Qwen2ForCausalLM": ("Qwen2ForCausalLM", LLAMA),
    "Qwen2, tied": ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True, "num_hidden_layers": 3}),
    "Qwen2, a window": (
        "Qwen2ForCausalLM",
        LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "Qwen2, all heads": ("Qwen2ForCausalLM", LLAMA | {"num_key_value_heads": 4}),
    "Qwen2, long periods": (
        "Qwen2ForCausalLM",
        LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "Qwen3ForCausalLM": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "Qwen3, tied": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 10, "tie_word_embeddings": True}),
    "Qwen3, biases": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 6, "attention_bias": True}),
    "Qwen3, one group": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8, "num_key_value_heads": 1}),
    "Qwen3, larger epsilon": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8, "rms_norm_eps": 1e-2}),
}
EXPERTS = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}  # fmt: skip
DECODERS |= {
    "MixtralForCausalLM": ("MixtralForCausalLM", LLAMA | EXPERTS | {"sliding_window": 5}),
    "MixtralModel, tied": (
        "MixtralModel",
        LLAMA | EXPERTS | {"tie_word_embeddings": True, "num_experts_per_tok": 3, "head_dim": 10},
    ),
    "Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", LLAMA | EXPERTS | {"head_dim": 8}),
    "Qwen3MoE, one expert a token": (
        "Qwen3MoeForCausalLM",
        LLAMA
        | EXPERTS
        | {"num_experts_per_tok": 1, "norm_topk_prob": False, "attention_bias": True, "num_local_experts": 5},
    ),
}
GEMMA = LLAMA | {"head_dim": 8, "num_hidden_layers": 4, "sliding_window": 5, "query_pre_attn_scalar": 12}
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}  # fmt: skip
DECODERS |= {
    "GemmaForCausalLM": ("GemmaForCausalLM", GEMMA | {"num_hidden_layers": 2}),
    "GemmaModel": ("GemmaModel", GEMMA | {"num_hidden_layers": 2, "num_key_value_heads": 1, "attention_bias": True}),
    "Gemma2ForCausalLM": ("Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "Gemma2, no caps": (
        "Gemma2ForCausalLM",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "Gemma3ForCausalLM": ("Gemma3ForCausalLM", GEMMA | {"rope_parameters": ROPES, "num_hidden_layers": 7}),
    "Gemma3TextModel": (
        "Gemma3TextModel",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 8},
    ),
}
PHI3 = LLAMA | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 6.0],
}  # fmt: skip
DECODERS |= {
    "Phi3ForCausalLM": ("Phi3ForCausalLM", PHI3 | {"sliding_window": 5}),
    # On both sides of the boundary, which is 13 tokens: texts of 13 have the short factors.
    "Phi3Model, short": (
        "Phi3Model",
        PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 13, "tie_word_embeddings": True},
    ),
    "Phi3Model, long": (
        "Phi3Model",
        PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 12, "tie_word_embeddings": True},
    ),
    "Phi3Model, its attention factor and part of each head": (
        "Phi3Model",
        PHI3
        | {
            "rope_parameters": LONGROPE
            | {
                "attention_factor": 1.3,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.2, 1.3],
                "long_factor": [3.0, 4.0],
            },
            "hidden_size": 32,
            "original_max_position_embeddings": 8,
            "tie_word_embeddings": True,
        },
    ),
    "LlamaModel, LongRoPE": (
        "LlamaModel",
        LLAMA
        | {
            "rope_parameters": LONGROPE | {"factor": 3.0, "original_max_position_embeddings": 10},
            "tie_word_embeddings": True,
        },
    ),
}
ENCODER_DECODERS = {
    "T5 1.0": ("T5ForConditionalGeneration", T5),
    "T5 1.1": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "T5, deep decoder": ("T5ForConditionalGeneration", T5 | {"num_decoder_layers": 3, "num_heads": 4, "d_kv": 5}),
    "T5, gated silu": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-silu", "vocab_size": 70}),
    "T5, few buckets": (
        "T5ForConditionalGeneration",
        T5 | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
    ),
    "mT5": ("MT5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "MarianMTModel": ("MarianMTModel", MARIAN),
    "Marian, unscaled": ("MarianMTModel", MARIAN | {"scale_embedding": False}),
    "Marian, relu": ("MarianMTModel", MARIAN | {"activation_function": "relu", "encoder_layers": 3}),
    "Marian, wide": ("MarianMTModel", MARIAN | {"encoder_ffn_dim": 57, "decoder_ffn_dim": 57, "vocab_size": 90}),
    "Marian, deep decoder": ("MarianMTModel", MARIAN | {"decoder_layers": 3, "activation_function": "gelu"}),
}
