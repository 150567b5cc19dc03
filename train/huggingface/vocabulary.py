"""Converts a checkpoint's tokenizer to ours, and ours to one that transformers reads."""

from __future__ import annotations

import dataclasses
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
    byte_of_letter,
)  # fmt: skip
from train.data.tokenization.vocabulary import usual_end
from train.huggingface.text_files import (
    ROLES,
    add_tokens,
    apply_frame,
    as_json,
    conventions_of,
    template,
    template_files,
    tokenizer_fields,
)
from transformer.errors import UserError
from transformer.paths import check_file

PAD = "[PAD]"
_ROLES = {
    "cls_token": (CLS, "<s>"), "sep_token": (SEP, "</s>"), "mask_token": (MASK, "<mask>"), "pad_token": (PAD, "<pad>"),
    "unk_token": (UNKNOWN, "<unk>"),
}  # fmt: skip
"""transformers' names of special tokens → their names in vocabularies, the likeliest first."""
_WITH_ID = ("bos_token", "cls_token", "sep_token", "pad_token")
"""Those whose ids config.json has."""


def tokenizer_of(folder: Path, config: Mapping[str, Any], vocab_size: int, family: str) -> SubwordTokenizer | None:
    """The tokenizer of a checkpoint's folder with its conventions, converted by transformers if there is no tokenizer.json; None
    if neither works.

    Added tokens may have ids beyond the model's vocabulary, as in transformers: no text is generated with them.

    Args:
        config: config.json.
        vocab_size: of the model.
        family: of the model.

    Raises:
        UserError: an invalid file, a vocabulary with more ids than the model has, or an encoder's tokens around a text that are
            not one before it and one after.
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
    largest = max(model.get_vocab(with_added_tokens=False).values(), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"{path}: its ids go up to {largest}, and the model's vocabulary has {vocab_size} tokens: it is another model's"
        )
    fields = tokenizer_fields(folder)
    try:
        add_tokens(model, fields)
        apply_frame(model, fields)
        conventions = conventions_of(folder, fields, ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: a field is missing, or of another type than transformers writes: {error!r}"
        ) from None
    ends = _ends(model, conventions.generation, config, vocab_size)
    known = next((name for name in map(model.id_to_token, ends) if name is not None), None) or usual_end(model)
    if known is None:
        raise UserError(f"{path}: no end-of-text token found, neither in config.json nor by name")
    tokenizer = SubwordTokenizer(model, known, dataclasses.replace(conventions, ends=ends))
    before, after = tokenizer.frame
    if family == "gpt" and before:
        return SubwordTokenizer(model, known, dataclasses.replace(tokenizer.conventions, begins=True))
    if family == "bert" and (before or after) and (len(before), len(after)) != (1, 1):
        raise UserError(
            f"{path}: puts {len(before)} tokens before a text and {len(after)} after it; supported of an encoder: one each"
        )
    return tokenizer


def beyond(tokenizer: SubwordTokenizer, vocab_size: int) -> list[str]:
    """The tokens with ids that a model with a vocabulary of that size does not have."""
    found = sorted((id, token.content) for id, token in tokenizer.model.get_added_tokens_decoder().items())
    return [name for id, name in found if id >= vocab_size]


_OLDER_FILES = ("vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "spm.model")
"""Vocabularies of tokenizers without a tokenizer.json."""


def _converted(folder: Path) -> Any:
    """A fast tokenizer converted from older files, such as vocab.txt."""
    if not any((folder / name).exists() for name in _OLDER_FILES):
        return None
    try:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer
    except Exception:  # transformers is not installed or cannot convert: no tokenizer
        return None


def _ends(model: Any, generation: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The ids that end a generated text, that of config.json first; those of generation_config.json count, if it has any."""
    own, theirs = (_ids(data.get("eos_token_id")) for data in (config, generation))
    ids = [id for id in own if id in theirs or not theirs] + theirs
    return tuple(dict.fromkeys(id for id in ids if 0 <= id < vocab_size))


def _ids(value: Any) -> list[int]:
    given = value if isinstance(value, list) else [value]
    return [id for id in given if isinstance(id, int) and not isinstance(id, bool)]


def written(tokenizer: SubwordTokenizer, model: Any) -> dict[str, str]:
    """The files of a tokenizer for transformers, by name: with its special tokens and chat templates, and adding the tokens that
    the `model`, a config, expects around a text."""
    types = ["token_type_ids"] if getattr(model, "token_types", 0) >= 2 else []
    # As config.json names it; without one, transformers cannot pad a batch.
    pad = {"pad_token": tokenizer.end_token} if model.family == "bert" else {}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_length,
        "model_input_names": ["input_ids", *types, "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **pad,
        **_roles(tokenizer),
        **tokenizer.conventions.fields,
    }
    return {
        "tokenizer.json": _framing(tokenizer, model.family).to_str(pretty=True),
        "tokenizer_config.json": as_json(about),
        **template_files(tokenizer.conventions),
    }


def _roles(tokenizer: SubwordTokenizer) -> dict[str, str]:
    """Role → token: as published, or by the usual names."""
    if published := {role: name for role, name in tokenizer.conventions.fields.items() if role in ROLES}:
        return {"eos_token": tokenizer.end_token} | published
    vocabulary = _vocabulary(tokenizer)
    known = {role: next((name for name in names if name in vocabulary), None) for role, names in _ROLES.items()}
    begin = {"bos_token": _name(tokenizer.model, tokenizer.begin[0])} if tokenizer.begin else {}
    return {role: name for role, name in known.items() if name is not None} | begin | {"eos_token": tokenizer.end_token}


def _framing(tokenizer: SubwordTokenizer, family: str) -> Any:
    """The tokenizer with special tokens added around a text, unless it already adds them."""
    from tokenizers import Tokenizer as Model
    from tokenizers import processors

    model, ids = tokenizer.model, tokenizer.special_ids
    if tokenizer.conventions.begins is not None:
        if tokenizer.frame == tokenizer.post_processed:
            return model
        framed = Model.from_str(model.to_str())
        framed.post_processor = template(model, *([_name(model, id) for id in side] for side in tokenizer.frame))
        return framed
    if model.post_processor is not None or family == "gpt":
        return model
    framed = Model.from_str(model.to_str())
    if family != "bert":
        end = framed.id_to_token(tokenizer.end_of_text)
        single, pair, ends = f"$A {end}", f"$A {end} $B {end}", [(end, tokenizer.end_of_text)]
    elif CLS in ids and SEP in ids:
        cls, sep = (framed.id_to_token(ids[name]) for name in (CLS, SEP))
        single, pair = f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1"
        ends = [(cls, ids[CLS]), (sep, ids[SEP])]
    else:
        return model
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


def special_ids(tokenizer: SubwordTokenizer, vocab_size: int) -> dict[str, Any]:
    """The fields of config.json that name special tokens: an id, or a list of the several that end a text.

    Args:
        vocab_size: of the model; a token of the vocabulary that it lacks is not named, as transformers would refuse it.
    """
    vocabulary, ends = _vocabulary(tokenizer), list(tokenizer.ends)
    found: dict[str, Any] = {
        f"{role}_id": vocabulary[name]
        for role, name in _roles(tokenizer).items()
        if role in _WITH_ID and vocabulary.get(name, vocab_size) < vocab_size
    }
    found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    found.setdefault("pad_token_id", tokenizer.end_of_text)
    return found


def _name(model: Any, id: int) -> str:
    return str(model.id_to_token(id))


def _vocabulary(tokenizer: SubwordTokenizer) -> dict[str, int]:
    return tokenizer.model.get_vocab(with_added_tokens=True)
