"""Small tokenizers of the usual kinds, as transformers saves them next to a small Llama."""

from __future__ import annotations

import json
import warnings

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = ["the king of the hill sat on the mat.", "hello world, once upon a time there was a king"] * 20
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot|>{% endfor %}"
KINDS = ("byte_level", "sentencepiece_bpe", "sentencepiece_unigram", "wordpiece")


def tokenizer(kind):
    """A `tokenizers.Tokenizer`: `<unk>`, `<s>`, `</s>`, `<|eot|>` are ids 0 to 3."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>", "<|eot|>"]
    if kind == "byte_level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(TEXTS, trainer)
    elif kind == "sentencepiece_bpe":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*special, *BYTES], show_progress=False)
        made.train_from_iterator(TEXTS, trainer)
        content = json.loads(made.to_str())
        # Pieces of single bytes are ordinary tokens.
        content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] in special]
        content["pre_tokenizer"] = None
        made = Tokenizer.from_str(json.dumps(content))
        strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(strip)
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    elif kind == "sentencepiece_unigram":
        words = ["▁", *"abcdefghijklmnopqrstuvwxyz.,", "▁the", "▁king", "▁of", "▁hello", "ing", "▁w", "or", "ld", "▁a"]
        scores = [(piece, 0.0) for piece in [*special, *BYTES]] + [(word, -len(words) / len(word)) for word in words]
        made = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        made.add_special_tokens(special)
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece(cleanup=True)
        made.train_from_iterator(
            TEXTS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
        )
    return made


def save_tokenizer(made, folder, **options):
    """Save it as transformers does, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    options = {"chat_template": CHAT} | options
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )
    theirs.save_pretrained(folder)


def llama(folder, vocab_size, *, ends, **generation):
    """A random Llama of one layer, and its generation config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=ends, tie_word_embeddings=False, initializer_range=0.6,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.generation_config.eos_token_id = ends
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model.eval()
