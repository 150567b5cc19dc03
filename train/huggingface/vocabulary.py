"""Converts a checkpoint's tokenizer to ours, and ours to one that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.tokenization.tokenizer import (
    CLS,
    END_OF_TEXT,
    MASK,
    SEP,
    UNKNOWN,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    byte_of_letter,
)  # fmt: skip
from train.data.tokenization.vocabulary import usual_end
from transformer.errors import UserError
from transformer.paths import check_file

PAD = "[PAD]"
_ROLES = {
    "cls_token": (CLS, "<s>"), "sep_token": (SEP, "</s>"), "mask_token": (MASK, "<mask>"), "pad_token": (PAD, "<pad>"),
    "unk_token": (UNKNOWN, "<unk>"),
}  # fmt: skip
"""transformers' names of special tokens → their names in vocabularies, the likeliest first."""


def tokenizer_of(folder: Path, config: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder, converted by transformers if there is no tokenizer.json; None if neither works.

    Args:
        config: config.json.
        vocab_size: of the model.

    Raises:
        UserError: an invalid tokenizer.json, or one with more ids than the model has.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if path.exists():
        check_file(path)
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"{path}: not a tokenizer: {error}") from None
    elif (converted := _converted(folder)) is not None:
        model = converted
    else:
        return None
    end = _end(model, config)
    if end is None:
        raise UserError(f"{path}: no end-of-text token found, neither in config.json nor by name")
    tokenizer = SubwordTokenizer(model, end)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{path}: its ids go up to {tokenizer.vocab_size - 1}, and the model's vocabulary has {vocab_size} tokens: it is "
            "another model's"
        )
    return tokenizer


def _converted(folder: Path) -> Any:
    """A fast tokenizer converted from older files, such as vocab.txt."""
    if not any((folder / name).exists() for name in ("vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")):
        return None
    try:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer
    except Exception:  # transformers is not installed or cannot convert: no tokenizer
        return None


def _end(model: Any, config: Mapping[str, Any]) -> str | None:
    ids = config.get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    if isinstance(first, int) and not isinstance(first, bool) and (token := model.id_to_token(first)) is not None:
        return token
    return usual_end(model)


def written(tokenizer: SubwordTokenizer, model: Any) -> dict[str, str]:
    """The files of a tokenizer for transformers, by name: with its special tokens, and adding those that the `model`, a
    config, expects around a text."""
    names = {
        role: next((name for name in known if name in _vocabulary(tokenizer)), None) for role, known in _ROLES.items()
    }
    roles = {role: name for role, name in names.items() if name is not None}
    roles["eos_token"] = tokenizer.end_token
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_length,
        **roles,
    }
    types = ["token_type_ids"] if getattr(model, "token_types", 0) >= 2 else []
    about["model_input_names"] = ["input_ids", *types, "attention_mask"]
    about["clean_up_tokenization_spaces"] = False
    return {
        "tokenizer.json": _framing(tokenizer, model.family).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(about, indent=2, ensure_ascii=False) + "\n",
    }


def _framing(tokenizer: SubwordTokenizer, family: str) -> Any:
    """The tokenizer with special tokens added around a text, unless it already adds them."""
    from tokenizers import Tokenizer as Model
    from tokenizers import processors

    if tokenizer.model.post_processor is not None or family == "gpt":
        return tokenizer.model
    framed, ids = Model.from_str(tokenizer.model.to_str()), tokenizer.special_ids
    if family != "bert":
        end = framed.id_to_token(tokenizer.end_of_text)
        single, pair, ends = f"$A {end}", f"$A {end} $B {end}", [(end, tokenizer.end_of_text)]
    elif CLS in ids and SEP in ids:
        cls, sep = (framed.id_to_token(ids[name]) for name in (CLS, SEP))
        single, pair = f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1"
        ends = [(cls, ids[CLS]), (sep, ids[SEP])]
    else:
        return tokenizer.model
    framed.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    return framed


def as_subwords(tokenizer: ByteTokenizer) -> SubwordTokenizer:
    """A tokenizer of single bytes that gives the same ids."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Model

    letters = {letter: byte for letter, byte in byte_of_letter().items() if byte != tokenizer.end_of_text}
    model = Model(models.BPE(vocab=letters | tokenizer.special_ids, merges=[]))
    model.add_special_tokens([AddedToken(name, special=True) for name in tokenizer.special_ids])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return SubwordTokenizer(model, END_OF_TEXT)


def special_ids(tokenizer: SubwordTokenizer) -> dict[str, int]:
    """The fields of config.json that name special tokens."""
    vocabulary = _vocabulary(tokenizer)
    found = {"eos_token_id": tokenizer.end_of_text}
    for role, names in _ROLES.items():
        known = [vocabulary[name] for name in names if name in vocabulary]
        if role in ("cls_token", "sep_token", "pad_token") and known:
            found[f"{role}_id"] = known[0]
    found.setdefault("pad_token_id", tokenizer.end_of_text)
    return found


def _vocabulary(tokenizer: SubwordTokenizer) -> dict[str, int]:
    return tokenizer.model.get_vocab(with_added_tokens=True)
