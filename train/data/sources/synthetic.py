"""A translation task between two synthetic languages whose word alignment is known.

A lexicon translates each source word into 0 to 3 target words, always the same ones; if there are several, each also
belongs to several source words, so that no target word predicts the next and all depend on the source alone. A translation
also reorders words: an adjective follows its noun, and the blocks after the subject of a clause come in reverse
order, so that the verb ends the clause. Both depend on the source sentence alone, so that a model can learn
them, and `alignment` gives the source word of each target word of any sentence.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.data.sources.records import Document
from transformer.errors import UserError

VERSION = 2
"""Version of the generator: changes when document numbers give different sentences."""

Kind = Literal["noun", "adjective", "verb", "adverb", "particle", "joint"]

_SEED = 20
_OTHERS = 1 << 40
"""Sentences from this number on replace the translations in mismatched pairs."""
_CANDIDATES = 3
"""Number of candidates, of which the one of the nearest length is taken, so that lengths reveal little."""
_SIZES: dict[Kind, int] = {"noun": 160, "adjective": 80, "verb": 80, "adverb": 40, "particle": 4, "joint": 6}
# How many target words a source word gives: particles have no counterpart, joints keep the clauses recognisable.
_FERTILITY: dict[Kind, tuple[float, float, float, float]] = {
    "noun": (0.0, 0.75, 0.2, 0.05),
    "adjective": (0.0, 0.85, 0.15, 0.0),
    "verb": (0.0, 0.6, 0.3, 0.1),
    "adverb": (0.0, 0.8, 0.2, 0.0),
    "particle": (1.0, 0.0, 0.0, 0.0),
    "joint": (0.0, 1.0, 0.0, 0.0),
}
_SOURCE_SYLLABLES = tuple("".join(parts) for parts in itertools.product("bdgklmnprst", "aeiou"))
_TARGET_SYLLABLES = tuple(
    "".join(parts) for parts in itertools.product(("ch", "f", "h", "j", "v", "w", "y", "z"), "aiou")
)


@dataclass(frozen=True)
class Lexicon:
    """The words of both languages."""

    words: dict[Kind, tuple[str, ...]]
    """Source words of each kind, the most frequent first."""
    kind_of: dict[str, Kind]
    """The kind of each source word."""
    translation: dict[str, tuple[str, ...]]
    """The 0 to 3 target words of each source word."""


@functools.cache
def lexicon() -> Lexicon:
    """The one lexicon, always the same."""
    random = np.random.Generator(np.random.Philox(_SEED))
    total = sum(_SIZES.values())
    sources = iter(_invented(random, _SOURCE_SYLLABLES, total))
    targets = iter(_invented(random, _TARGET_SYLLABLES, total))
    words = {kind: tuple(itertools.islice(sources, size)) for kind, size in _SIZES.items()}
    by_fertility: dict[int, list[str]] = {count: [] for count in range(4)}
    for kind, known in words.items():
        for word in known:
            by_fertility[int(random.choice(4, p=_FERTILITY[kind]))].append(word)
    translation: dict[str, tuple[str, ...]] = dict.fromkeys(by_fertility[0], ())
    for count in (1, 2, 3):
        # One list of words for each position, just long enough for the required number of combinations.
        size = math.ceil(len(by_fertility[count]) ** (1 / count))
        combinations = list(itertools.product(*(tuple(itertools.islice(targets, size)) for _ in range(count))))
        chosen = random.permutation(len(combinations))
        translation |= {word: combinations[n] for word, n in zip(by_fertility[count], chosen, strict=False)}
    return Lexicon(words, {word: kind for kind, known in words.items() for word in known}, translation)


def documents(count: int, mismatched: float = 0.0) -> Iterator[Document]:
    """The first `count` pairs; document n does not depend on `count`.

    Args:
        mismatched: the fraction of pairs whose target translates another sentence, of about the same length. Above 0, each
            pair has a label.
    """
    for number in range(count):
        source = sentence(number)
        target, label = translate(source), "translation" if mismatched else None
        if mismatched and np.random.Generator(np.random.Philox(key=_key(number, 1))).random() < mismatched:
            others = (translate(sentence(_OTHERS + _CANDIDATES * number + n)) for n in range(_CANDIDATES))
            length = len(target.split(" "))
            target, label = min(others, key=lambda other: abs(len(other.split(" ")) - length)), "other"
        yield Document(f"synthetic:{number}", source, target, label=label)


def sentence(number: int) -> str:
    """Source sentence `number`: one to three clauses, words drawn by Zipf's law (the r-th word as often as 1/r)."""
    random = np.random.Generator(np.random.Philox(key=_key(number)))
    clauses = [_clause(random) for _ in range(int(random.choice([1, 2, 3], p=[0.6, 0.3, 0.1])))]
    words = clauses[0]
    for clause in clauses[1:]:
        words += [_drawn(random, "joint"), *clause]
    return " ".join(words)


def _key(number: int, stream: int = 0) -> np.ndarray:
    return np.array([_SEED + stream, number], np.uint64)


def translate(source_text: str) -> str:
    """The target sentence. Raises `UserError` for a text that `sentence` cannot have made."""
    return " ".join(word for word, _ in _translated(source_text))


def alignment(source_text: str) -> list[tuple[int, int]]:
    """The source word of each target word: pairs (target word, source word), both counted from 0.

    Every target word has one source word; a source word has 0 to 3 target words. Raises `UserError` as `translate`.
    """
    return [(target, source) for target, (_, source) in enumerate(_translated(source_text))]


def _translated(source_text: str) -> list[tuple[str, int]]:
    """Each target word with the index of its source word."""
    known = lexicon()
    words = source_text.split(" ")
    if unknown := [word for word in words if word not in known.kind_of]:
        raise UserError(f"{unknown[0]!r} is not a word of the synthetic language; give a sentence of the source side")
    kinds = [known.kind_of[word] for word in words]
    return [(target, place) for place in _reordered(kinds) for target in known.translation[words[place]]]


def _reordered(kinds: list[Kind]) -> Iterator[int]:
    """The indices of a sentence's words in the order of the target language."""
    begin = 0
    for end in [*(place for place, kind in enumerate(kinds) if kind == "joint"), len(kinds)]:
        blocks = _blocks(kinds, begin, end)
        # The subject stays in front; verb, object and adverbs come in reverse order.
        for block in blocks[:1] + blocks[:0:-1]:
            yield from block
        if end < len(kinds):
            yield end
        begin = end + 1


def _blocks(kinds: list[Kind], begin: int, end: int) -> list[list[int]]:
    """Cut a clause into blocks, each in the target's order: a noun before the adjectives that preceded it."""
    blocks: list[list[int]] = []
    before: list[int] = []
    for place in range(begin, end):
        before.append(place)
        if kinds[place] not in ("adjective", "particle"):
            blocks.append(before[::-1])
            before = []
    return blocks + ([before[::-1]] if before else [])


def _clause(random: np.random.Generator) -> list[str]:
    """A subject, a verb, mostly an object, and up to two adverbs."""
    words = [*_noun_phrase(random), _drawn(random, "verb")]
    if random.random() < 0.7:
        words += _noun_phrase(random)
    return words + [_drawn(random, "adverb") for _ in range(int(random.choice(3, p=[0.5, 0.35, 0.15])))]


def _noun_phrase(random: np.random.Generator) -> list[str]:
    particle = [_drawn(random, "particle")] if random.random() < 0.5 else []
    adjectives = [_drawn(random, "adjective") for _ in range(int(random.choice(3, p=[0.45, 0.4, 0.15])))]
    return [*particle, *adjectives, _drawn(random, "noun")]


def _drawn(random: np.random.Generator, kind: Kind) -> str:
    words = lexicon().words[kind]
    return words[int(np.searchsorted(_zipf(len(words)), random.random()))]


@functools.cache
def _zipf(count: int) -> np.ndarray:
    """Cumulative probabilities [count] of ranks 1, 2, ..., proportional to 1 / rank."""
    weights = np.cumsum(1 / np.arange(1, count + 1))
    return weights / weights[-1]


def _invented(random: np.random.Generator, syllables: tuple[str, ...], count: int) -> list[str]:
    """`count` different words of two or three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(random.choice(syllables, int(random.integers(2, 4))))] = None
    return list(words)
