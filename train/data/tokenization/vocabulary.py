"""Makes a tokenizer: trains its vocabulary on text, or reads an existing one."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.sources.wheel import wheel_files
from train.data.tokenization.chat import with_template
from train.data.tokenization.conventions import saved_about
from train.data.tokenization.tokenizer import (
    END_OF_TEXT,
    UNKNOWN,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    TokenizerConfig,
    byte_of_letter,
)
from train.text_files import read_text
from transformer.errors import UserError
from transformer.paths import check_file, expanded

if TYPE_CHECKING:
    import tokenizers

# What a token may span, in text and in code: punctuation joins the word or number after it (" = x", ".append"),
# or else the white space after it ("):" + newline + indentation); a line end joins the next line's indentation. On
# Python's standard library with 8192 tokens this gives 4.42 bytes a token; GPT-2's pattern gives 3.72, GPT-4's 3.70.
_SPLIT = (
    r" ?[^\s\p{L}\p{N}_]* ?(?:[\p{L}_]+|\p{N}{1,3})"
    r"| ?[^\s\p{L}\p{N}_]+\s*"
    r"|\s*[\r\n]+[ \t]*"
    r"|\s+(?!\S)|\s"
)
_USUAL_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
_GPT2_RANKS = {
    "package": "mlx-whisper==0.4.3",
    "sha256": "6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489",
    "pattern": "mlx_whisper/assets/gpt2.tiktoken",
}


def is_trained(config: TokenizerConfig) -> bool:
    """Whether `make_tokenizer` reads the corpus."""
    return config.vocab_size is not None


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a config, trained on `texts` if it is of a kind that is trained.

    Raises `UserError` for a file that is missing or not a tokenizer.
    """
    made = _made(config, texts)
    if not config.chat_template or not isinstance(made, SubwordTokenizer):
        return made
    path = expanded(config.chat_template)
    check_file(path)
    try:
        return with_template(made, read_text(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); correct data.tokenizer.chat_template") from error


def _made(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    added = config.added_tokens
    if config.kind == "bytes":
        return ByteTokenizer(added)
    if config.kind == "file":
        return _existing(config, added)
    if config.kind == "gpt2":
        return _gpt2(expanded(config.path) if config.path else wheel_files(**_GPT2_RANKS)[0][1], added)
    train = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram, "words": _words}[config.kind]
    return SubwordTokenizer(train(config.vocab_size or 0, added, texts), END_OF_TEXT)


def _bpe(vocab_size: int, added: Sequence[str], texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Byte-pair encoding over bytes (Sennrich et al. 2016; Radford et al. 2019)."""
    from tokenizers import Tokenizer, models, trainers

    special = [END_OF_TEXT, *added]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=_alphabet(), show_progress=False
    )
    return _trained_on_bytes(Tokenizer(models.BPE()), trainer, texts)


def _unigram(vocab_size: int, added: Sequence[str], texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A unigram language model (Kudo 2018), over bytes so that nothing is unknown."""
    from tokenizers import Tokenizer, models, trainers

    special = [END_OF_TEXT, *added]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=_alphabet(), show_progress=False
    )
    return _trained_on_bytes(Tokenizer(models.Unigram()), trainer, texts)


def _wordpiece(vocab_size: int, added: Sequence[str], texts: Iterable[str]) -> tokenizers.Tokenizer:
    """WordPiece as in BERT (Schuster & Nakajima 2012; Devlin et al. 2018), with case.

    It keeps words, not spelling: white space becomes single spaces, and words with a rare character are unknown.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))  # pyright: ignore[reportCallIssue]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [END_OF_TEXT, UNKNOWN, *(name for name in added if name != UNKNOWN)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, limit_alphabet=1000, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _words(vocab_size: int, added: Sequence[str], texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Whole words, the most frequent first, and one token for all others. White space becomes single spaces."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    # Words are looked up verbatim, so text can give only tokens of the model itself. Special tokens are therefore added
    # after the words.
    special = [name for name in (END_OF_TEXT, *added) if name != UNKNOWN]
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size - len(special), special_tokens=[UNKNOWN], show_progress=False
    )
    named = {*special, UNKNOWN}
    plain = (" ".join(word for word in text.split() if word not in named) for text in texts)
    tokenizer.train_from_iterator(plain, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def _trained_on_bytes(
    tokenizer: tokenizers.Tokenizer, trainer: tokenizers.trainers.Trainer, texts: Iterable[str]
) -> tokenizers.Tokenizer:
    from tokenizers import Regex, decoders, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _alphabet() -> list[str]:
    return sorted(byte_of_letter(), key=byte_of_letter().__getitem__)


def _with_special(tokenizer: SubwordTokenizer, added: Sequence[str], end_of_text: str) -> SubwordTokenizer:
    """The tokenizer with added special tokens; those that its vocabulary already has keep their ids."""
    from tokenizers import AddedToken

    if not added:
        return tokenizer
    tokenizer.model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    return SubwordTokenizer(tokenizer.model, end_of_text, tokenizer.conventions)


def usual_end(model: tokenizers.Tokenizer) -> str | None:
    """The vocabulary's end of text, by its usual names."""
    return next((end for end in _USUAL_ENDS if model.token_to_id(end) is not None), None)


def _existing(config: TokenizerConfig, added: Sequence[str]) -> Tokenizer:
    path = expanded(config.path)
    # A run's folder, and an import's, records the end-of-text token and the conventions.
    saved_end, conventions = saved_about(path)
    if config.begin_of_text is not None:
        conventions = dataclasses.replace(conventions, begins=config.begin_of_text)
    if config.end_of_text and config.end_of_text != saved_end:
        conventions = dataclasses.replace(conventions, ends=())
    ends = [config.end_of_text or saved_end] if config.end_of_text or saved_end else _USUAL_ENDS
    reasons = []
    for end in ends:
        try:
            return _with_special(SubwordTokenizer.from_file(path, end, conventions), added, end)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); correct data.tokenizer.path") from error
        except ValueError as error:
            reasons.append(str(error))
    raise UserError(f"{path}: {reasons[0]}; set data.tokenizer.end_of_text, or choose another file")


def _gpt2(path: Path, added: Sequence[str]) -> Tokenizer:
    """GPT-2's byte-pair encoding (Radford et al. 2019) from a file of ranks, in which the merges are implicit."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ranks = _read_ranks(path)
    letter = {byte: letter for letter, byte in byte_of_letter().items()}

    def spelled(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [(spelled(left), spelled(right)) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # its regex is GPT-2's
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return _with_special(SubwordTokenizer(tokenizer, END_OF_TEXT), added, END_OF_TEXT)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    check_file(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct data.tokenizer.path") from error
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{path}:{number}: not 'base64 rank'; give a tiktoken file of ranks") from error
    if len({token for token in ranks if len(token) == 1}) < 256:
        raise UserError(f"{path}: some single bytes have no rank; give a tiktoken file of ranks")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each longer token: its two parts after all merges of lower rank."""
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def as_setting(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """How a config names a tokenizer that is stored in a folder, as plain data."""
    if isinstance(tokenizer, ByteTokenizer):
        names = [name for name, id in tokenizer.special_ids.items() if id != tokenizer.end_of_text]
        return {"kind": "bytes", "special_tokens": names}
    return {"kind": "file", "path": str(folder / "tokenizer.json")}
