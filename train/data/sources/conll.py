"""CoNLL files: one word in a line with its annotations, and an empty line after each text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from transformer.errors import shown

_UNIVERSAL = ("id", "words", "lemma", "tags", "xpos", "feats", "head", "deprel", "deps", "misc")
"""The columns of CoNLL-U, and of CoNLL-X."""
_NUMBER = re.compile(r"\d+([-.]\d+)?")
"""The first of these: a word's number, a range of words (1-2) or an empty node (1.1)."""
_COMMENT = re.compile(r"# *(newdoc|newpar|[^=]+=)")
"""A line before the first word of a text. `#` may be a word itself."""

Row = dict[str, list[str]]


def conll_texts(lines: Iterable[str]) -> Iterator[tuple[int, Row | str]]:
    """Each text with the number of its first line: the fields `words` and `tags`, which are lists; or the reason why it is none.

    Columns are separated by white space: the first is the word, the last the tag (Tjong Kim Sang & De Meulder 2003). Ten columns
    between tabs, of which the first is a number, are CoNLL-U (universaldependencies.org): the word is FORM and the tag UPOS, and
    there are the fields lemma, xpos, feats, head, deprel, deps and misc; comments, ranges and empty nodes are not words.
    """
    text: list[tuple[int, str]] = []
    number = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            text.append((number, line.rstrip("\r\n")))
        elif text:
            yield from _row(text)
            text = []
    if text:
        yield from _row(text)


def _row(text: list[tuple[int, str]]) -> Iterator[tuple[int, Row | str]]:
    """The text that some lines hold, if they hold one."""
    is_universal = any(_is_universal(line) for _, line in text)
    words: list[list[str]] = []
    first = 0
    for number, line in text:
        if (is_universal and line.startswith("#")) or (not words and _COMMENT.match(line)):
            continue
        columns = line.split("\t") if is_universal else re.split(r"[ \t]+", line.strip(" \t"))
        if columns[0] == "-DOCSTART-":
            continue
        first = first or number
        if is_universal and not _is_universal(line):
            yield number, f"not the ten columns of CoNLL-U: {shown(line)}"
            return
        if len(columns) < 2:
            yield number, f"a line of this text has a word and no tag: {shown(line)}"
            return
        if not is_universal or columns[0].isdigit():
            words.append(columns)
    if words and is_universal:
        yield first, {name: [row[place] for row in words] for place, name in enumerate(_UNIVERSAL)}
    elif words:
        yield first, {"words": [row[0] for row in words], "tags": [row[-1] for row in words]}


def _is_universal(line: str) -> bool:
    columns = line.split("\t")
    return len(columns) == len(_UNIVERSAL) and bool(_NUMBER.fullmatch(columns[0]))
