"""What the files of a Hugging Face checkpoint say about its text: special tokens, the frame of a prompt, chat templates, and how
text is generated. Read at import, and written at export."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.tokenization.conventions import ROLES, Conventions
from transformer.errors import UserError, shown
from transformer.huggingface.checkpoint import read_mapping
from transformer.paths import check_file

_MORE_TOKENS = ("extra_special_tokens", "additional_special_tokens")
_KEPT = ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "split_special_tokens")
"""Further fields of tokenizer_config.json that are written back."""
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_OF_EACH_SAVE = ("_from_model_config", "transformers_version")
"""Fields of generation_config.json about the file, and not about the model."""


def tokenizer_fields(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of special_tokens_map.json where it names none, each as its text.

    Raises:
        UserError: one of them is not a mapping of fields.
    """
    data = _mapping(folder / "special_tokens_map.json") | _mapping(folder / "tokenizer_config.json")
    return {name: _text(value) if name in ROLES else value for name, value in data.items() if value is not None}


def conventions_of(folder: Path, fields: Mapping[str, Any], ends: tuple[int, ...]) -> Conventions:
    """The conventions of a checkpoint's folder.

    Args:
        fields: `tokenizer_fields`.
        ends: the ids that end a text.

    Raises:
        UserError: a file that cannot be read.
    """
    more = [_text(one) for one in extra_tokens(fields)]
    kept = {name: fields[name] for name in (*ROLES, *_KEPT) if name in fields}
    generation = _mapping(folder / "generation_config.json")
    return Conventions(
        ends=ends,
        fields=kept | ({"extra_special_tokens": more} if more else {}),
        chat_templates=_chat_templates(folder, fields),
        generation={name: value for name, value in generation.items() if name not in _OF_EACH_SAVE},
    )


def extra_tokens(fields: Mapping[str, Any]) -> list[Any]:
    """The special tokens without a role."""
    found: Any = next((fields[name] for name in _MORE_TOKENS if fields.get(name)), [])
    return list(found.values()) if isinstance(found, Mapping) else list(found) if isinstance(found, list) else []


def add_tokens(model: Any, fields: Mapping[str, Any]) -> None:
    """Add the special tokens that tokenizer_config.json has and tokenizer.json lacks, as transformers does: those with ids in
    their order, then those with a role."""
    from tokenizers import AddedToken

    known = {token.content for token in model.get_added_tokens_decoder().values()}
    named = {fields[role] for role in ROLES if isinstance(fields.get(role), str)}
    listed = fields.get("added_tokens_decoder")
    new = []
    for _, one in sorted((listed if isinstance(listed, Mapping) else {}).items(), key=lambda item: int(item[0])):
        flags = {name: bool(one[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in one}
        new.append(AddedToken(one["content"], special=one.get("special", False) or one["content"] in named, **flags))
    new += [AddedToken(fields[role], special=True) for role in ROLES if isinstance(fields.get(role), str)]
    new += [AddedToken(_text(one), special=True) for one in extra_tokens(fields)]
    for token in new:
        if token.content not in known:
            known.add(token.content)
            # A token of the vocabulary keeps its id.
            (model.add_special_tokens if token.special else model.add_tokens)([token])


def apply_frame(model: Any, fields: Mapping[str, Any]) -> None:
    """Replace the post-processor where tokenizer_config.json says whether a text begins and ends with a token, as transformers
    does."""
    if not ("add_bos_token" in fields or "add_eos_token" in fields):
        return
    ends = [
        [fields[role]] if fields.get(switch) and model.token_to_id(fields.get(role) or "") is not None else []
        for switch, role in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token"))
    ]
    model.post_processor = template(model, *ends)


def template(model: Any, before: list[str], after: list[str]) -> Any:
    """A post-processor that puts tokens of the `model`'s vocabulary before and after a text, and each of two texts."""
    from tokenizers import processors

    single = [*before, "$A", *after]
    pair = [*single, *(f"{name}:1" for name in before), "$B:1", *(f"{name}:1" for name in after)]
    ids = [(name, model.token_to_id(name)) for name in dict.fromkeys([*before, *after])]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def template_files(conventions: Conventions) -> dict[str, str]:
    """The files of the chat templates, by name."""
    return {
        _TEMPLATE if name == "default" else f"{_MORE_TEMPLATES}/{name}.jinja": text
        for name, text in conventions.chat_templates.items()
    }


def _chat_templates(folder: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Older folders have them in tokenizer_config.json: one, or a list with names."""
    given = fields.get("chat_template") or {}
    if isinstance(given, str):
        given = {"default": given}
    elif isinstance(given, list):
        given = {one.get("name"): one.get("template") for one in given if isinstance(one, Mapping)}
    files = {"default": folder / _TEMPLATE} | {
        path.stem: path for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
    }
    if not isinstance(given, Mapping) or not all(_is_template(*one) for one in given.items()):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template: got {shown(given)}; allowed: a text, or named texts"
        )
    found: dict[str, str] = dict(given)
    for name, path in files.items():
        if path.exists():
            check_file(path)
            try:
                found[name] = path.read_text("utf-8")
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read: {error}") from None
    return found


def _is_template(name: Any, text: Any) -> bool:
    """Whether it is a text with a name that can be a file's, since it becomes one on export."""
    return isinstance(name, str) and isinstance(text, str) and bool(re.fullmatch(r"\w[\w.-]*", name))


def _mapping(path: Path) -> dict[str, Any]:
    return read_mapping(path) if path.exists() else {}


def _text(token: Any) -> Any:
    """A special token's text; older files have it with its flags."""
    return token.get("content") if isinstance(token, Mapping) else token


def as_json(data: Mapping[str, Any]) -> str:
    """A file of fields."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
