"""How a published model uses its vocabulary, beyond the vocabulary itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer.paths import check_file

ABOUT_FILE = "tokenizer_about.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""transformers' names of special tokens."""

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_DRAWN_BY = ("temperature", "top_k", "top_p", "min_p")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conventions:
    """What Hugging Face's files say next to the vocabulary. It is stored with the tokenizer, so that a run that is fine-tuned
    from an import keeps it, and an export writes it back.

    A vocabulary of our own has none of it.
    """

    ends: tuple[int, ...] = ()
    """The tokens that end a generated text; empty: the end of text alone."""
    begins: bool | None = None
    """Whether every document of training text, and every prompt, has the begin-of-text token in front; None: neither has."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of tokenizer_config.json: the names of special tokens (`bos_token`, ...), and on which side padding is."""
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name → Jinja template; the usual one is called `default`."""
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """generation_config.json."""
    embedding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What sentence-transformers stores about texts: `prompts` (name → text), `default_prompt` (a name), `include_prompt`
    (whether the tokens of a prompt are pooled), `max_length` (tokens of a text, those around it included), `lower_case`, and
    `similarity`."""

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Conventions:
        """What `to_data` gave. Raises `TypeError` for other data."""
        return cls(**{**data, "ends": tuple(data.get("ends", ()))})

    def to_data(self) -> dict[str, Any]:
        """The fields that are set, as plain data."""
        empty = Conventions()
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value != getattr(empty, name)
        }

    @property
    def sampling(self) -> dict[str, Any]:
        """The model's own defaults, as fields of `Sampling`: those that its generation config has with a number. Where a model is
        published without one, transformers has a default of its own (of top_k, 50), which is not taken.

        If any of them decides which token is drawn, the others that do are those of `Sampling`, and not a command's.
        """
        given = self.generation
        found: dict[str, Any] = {name: float(given[name]) for name in _NUMBERS if _is_number(given.get(name))}
        if _is_number(given.get("top_k")):
            # "All" is spelled 0, or -1.
            found["top_k"] = int(given["top_k"]) if given["top_k"] > 0 else None
        if given.get("do_sample") is False:
            found["temperature"] = 0.0
        if any(name in found for name in _DRAWN_BY):
            return {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0} | found
        return found

    @property
    def max_new_tokens(self) -> int | None:
        """The model's own limit of a continuation, in tokens; None if it has none."""
        given = self.generation.get("max_new_tokens")
        return given if isinstance(given, int) and not isinstance(given, bool) and given > 0 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def saved_about(path: Path) -> tuple[str, Conventions]:
    """The end of text and the conventions of a tokenizer.json that `Tokenizer.save` wrote; "" and none for any other."""
    check_file(path.parent / ABOUT_FILE)
    try:
        about = json.loads((path.parent / ABOUT_FILE).read_text("utf-8"))
        return str(about.get("end_of_text", "")), Conventions.from_data(about.get("conventions", {}))
    except (OSError, ValueError, AttributeError, TypeError):
        return "", Conventions()


def write_about(directory: Path, about: Mapping[str, Any]) -> None:
    """Write what `saved_about` and `Tokenizer.load` read, into a folder, which is made if need be. Raises `OSError`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ABOUT_FILE).write_text(json.dumps(about) + "\n", "utf-8")
