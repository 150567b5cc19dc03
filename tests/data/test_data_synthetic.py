"""The invented languages: the alignment explains every word of a translation."""

from __future__ import annotations

import itertools

import pytest

from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.source import documents
from train.data.sources.source_config import SyntheticSource
from train.data.sources.synthetic import alignment, lexicon, sentence, translate
from train.data.tokenization.tokenizer import TokenizerConfig
from transformer.errors import ConfigError, UserError


def test_every_target_word_is_explained_by_its_source_word() -> None:
    known = lexicon()
    for number in range(300):
        source, target = sentence(number).split(" "), translate(sentence(number)).split(" ")
        pairs = alignment(sentence(number))
        assert [place for place, _ in pairs] == list(range(len(target)))
        said: dict[int, list[str]] = {place: [] for place in range(len(source))}
        for target_place, source_place in pairs:
            said[source_place].append(target[target_place])
        assert [tuple(said[place]) for place in range(len(source))] == [known.translation[word] for word in source]


def test_words_move_as_the_grammar_says() -> None:
    words = {
        kind: [word for word in known if len(lexicon().translation[word]) == 1]
        for kind, known in lexicon().words.items()
        if kind != "particle"
    }
    (noun, object_), adjective, verb, adverb, joint = (
        words["noun"][:2],
        words["adjective"][0],
        words["verb"][0],
        words["adverb"][0],
        words["joint"][0],
    )
    source = f"{adjective} {noun} {verb} {adjective} {object_} {adverb} {joint} {noun} {verb}"
    assert [place for _, place in alignment(source)] == [1, 0, 5, 4, 3, 2, 6, 7, 8]
    with pytest.raises(UserError, match="'unheard' is not a word of the synthetic language"):
        alignment("unheard")


def test_fertility_and_movement_are_as_wide_as_promised() -> None:
    known = lexicon()
    assert {len(words) for words in known.translation.values()} == {0, 1, 2, 3}
    spoken = [words for words in known.translation.values() if words]
    assert len(set(spoken)) == len(spoken)
    targets = {word for words in spoken for word in words}
    assert not targets & set(known.translation)
    # Where there are several words, the first does not tell the rest.
    followers = {first: {words[1:] for words in spoken if words[0] == first} for first in targets}
    assert all(len(followers[words[0]]) > 1 for words in spoken if len(words) > 1)
    moved = [
        any(a > b for (_, a), (_, b) in itertools.pairwise(pairs))
        for pairs in map(alignment, map(sentence, range(200)))
    ]
    assert 0.5 < sum(moved) / 200 <= 1
    texts = [sentence(number) for number in range(2000)]
    assert len(set(texts)) > 1950
    nouns = known.words["noun"]
    counts = [" ".join(texts).split(" ").count(noun) for noun in (nouns[0], nouns[9])]
    assert counts[0] / counts[1] == pytest.approx(10, rel=0.3)


def test_a_source_of_pairs_with_one_token_a_word() -> None:
    source = SyntheticSource(limit=400)
    first = list(documents(SyntheticSource(limit=3)))
    assert list(documents(source))[:3] == first
    config = DataConfig(
        sources=(source,), packing="pad", validation_fraction=0.1,
        tokenizer=TokenizerConfig(kind="words", vocab_size=2000), target_tokenizer=TokenizerConfig(kind="words", vocab_size=2000),
    )  # fmt: skip
    prepared = prepare(config, progress=False)
    text, target = first[0].sides
    assert len(prepared.tokenizer.encode(text)) == len(text.split(" "))
    assert prepared.tokenizer.decode(prepared.tokenizer.encode(text)) == text
    assert prepared.target_tokenizer.decode(prepared.target_tokenizer.encode(target)) == target
    assert prepared.meta.train[0].documents + len(prepared.validation_pairs()) == 400
    with pytest.raises(ConfigError) as raised:
        SyntheticSource()
    assert raised.value.field == "limit"
