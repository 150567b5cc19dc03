"""Evaluation of a trained model: translations by length of the source, and the alignment of each word.

L layers, B batch, N heads, T target token, S source token, U target words, R source words.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.history.tasks import Task
from train.data.sources import synthetic
from train.data.tokenization.tokenizer import Tokenizer
from train.inference.translate import words as words_of
from train.run.run_files import LoadedRun
from train.translation import TextTranslator, score, spread
from transformer.functional import graphdef_of
from transformer.generation.beam import BeamSearch
from transformer.interpret.alignment import (
    Alignment,
    Span,
    alignment_error_rate,
    argmax_alignment,
    best_head,
    merge_subwords,
)
from transformer.models.families import make_model

Pair = tuple[str, str]

BUCKETS: tuple[tuple[str, int, int], ...] = (("1–8", 1, 8), ("9–16", 9, 16), ("17+", 17, 1 << 30))
"""Buckets of source lengths in words: name, shortest and longest."""
TRANSLATED = 200
"""Held-out pairs that each model translates."""
CHOOSING, JUDGING = 50, 100
"""Numbers of held-out pairs on which a head is chosen, and of others on which its alignments are evaluated."""
EXAMPLE_WORDS = range(7, 11)
"""Range of words on each side of the sentence to show, if there is such a sentence."""
_ROWS = 32


def figures(loaded: LoadedRun, task: Task, pairs: Sequence[Pair], count: int = TRANSLATED) -> dict[str, Any]:
    """BLEU and chrF of held-out pairs, the alignment error rate if alignments are known, and one example sentence."""
    shown = example_pair(loaded, task, pairs)
    quality, translation = translations(loaded, pairs, shown[0], count)
    fitting = [pair for pair in pairs if _fits(loaded, task, pair)]
    judged = spread(fitting, CHOOSING + JUDGING) if task.has_gold else []
    # All at once, because each call compiles.
    weights = between_words(loaded, task, [*judged, shown])
    aligned = alignments(judged, weights[:-1]) if weights and judged else None
    example = _example(loaded, task, shown, translation, weights[-1] if weights else None, aligned)
    return quality | {"alignment": aligned, "example": example}


def translations(
    loaded: LoadedRun, pairs: Sequence[Pair], shown: str, count: int = TRANSLATED
) -> tuple[dict[str, Any], str]:
    """BLEU and chrF of greedy translations of held-out pairs, in total and by the source's length in words; and the
    translation of the source `shown`."""
    translator = TextTranslator(loaded.config, loaded.tokenizer, loaded.target_tokenizer)
    chosen = spread([pair for pair in pairs if translator.fits(pair[0])], count)
    sources = [*(source for source, _ in chosen), shown]
    *found, translation = translator.translate(loaded.params, sources, BeamSearch(beams=1))
    buckets = []
    for label, shortest, longest in BUCKETS:
        inside = [i for i, (source, _) in enumerate(chosen) if shortest <= len(source.split()) <= longest]
        buckets.append({"words": label, **_quality([found[i] for i in inside], [chosen[i][1] for i in inside])})
    return _quality(found, [target for _, target in chosen]) | {"by_length": buckets}, translation


def alignments(pairs: Sequence[Pair], weights: Sequence[np.ndarray]) -> dict[str, Any]:
    """The alignment error rate of synthetic pairs, three or more, from the weights [L, N, U, R] of each.

    Words are aligned with the source word of the greatest weight, excluding ends of text. The best of several heads is
    chosen on sentences other than those of the evaluation.
    """
    gold = [gold_of(source) for source, _ in pairs]
    # Every third one, so that both parts are spread over all pairs.
    choosing = range(0, len(pairs), 3)
    judging = [i for i in range(len(pairs)) if i % 3]
    head = best_head([weights[i] for i in choosing], [gold[i] for i in choosing])
    predicted = [argmax_alignment(weights[i][head.layer, head.head]) for i in judging]
    sure = [gold[i] for i in judging]
    shapes = [weights[i].shape[-2:] for i in judging]
    return {
        "error_rate": alignment_error_rate(predicted, sure),
        "diagonal": alignment_error_rate([_diagonal(U, R) for U, R in shapes], sure),
        "layer": head.layer,
        "head": head.head,
        "heads": int(np.prod(weights[0].shape[:2])),
        "chosen_at": head.error_rate,
        "pairs": len(judging),
    }


def example_pair(loaded: LoadedRun, task: Task, pairs: Sequence[Pair]) -> Pair:
    """The first held-out pair of a suitable length to show; else the first one that fits."""
    fitting = [pair for pair in pairs if _fits(loaded, task, pair)]
    middling = (pair for pair in fitting if all(len(side.split()) in EXAMPLE_WORDS for side in pair))
    return next(middling, fitting[0])


def between_words(loaded: LoadedRun, task: Task, pairs: Sequence[Pair]) -> list[np.ndarray] | None:
    """[L, N, U, R] of each pair: the weights between words as the model reads the reference, without the ends of text.

    None for a model without weights.
    """
    graphdef = graphdef_of(functools.partial(make_model, loaded.config.model))

    @jax.jit
    def weights_of(params: nnx.State, *arrays: np.ndarray) -> jax.Array | None:
        source_BS, source_segments_BS, target_BT, segments_BT = arrays
        model = nnx.merge(graphdef, params)
        return model(
            source_BS, target_BT, source_segments_BS=source_segments_BS, segments_BT=segments_BT, return_weights=True
        ).weights

    found: list[np.ndarray] = []
    rows = min(_ROWS, len(pairs))
    for start in range(0, len(pairs), rows):
        group = pairs[start : start + rows]
        arrays = _padded(loaded, task, group, rows)
        weights_LBNTS = weights_of(loaded.params, *arrays)
        if weights_LBNTS is None:
            return None
        for row, pair in enumerate(group):
            weights_LNTS = np.asarray(weights_LBNTS[:, row], np.float32)
            target_spans, source_spans = _spans(loaded, task, pair)
            found.append(merge_subwords(weights_LNTS, target_spans, source_spans))
    return found


def gold_of(source: str) -> Alignment:
    """The known alignment of a synthetic sentence, as pairs (source word, target word)."""
    return {(read, said) for said, read in synthetic.alignment(source)}


def _example(
    loaded: LoadedRun,
    task: Task,
    pair: Pair,
    translation: str,
    weights_LNUR: np.ndarray | None,
    head: dict[str, Any] | None,
) -> dict[str, Any]:
    """One sentence with its weights: those of the best-aligning head if known, else the mean of all heads."""
    source, target = pair
    shown = None
    if weights_LNUR is not None:
        weights_UR = weights_LNUR.mean((0, 1)) if head is None else weights_LNUR[head["layer"], head["head"]]
        shown = np.round(weights_UR.astype(float), 4).tolist()
    columns, rows = source.split(), target.split()
    if not task.has_gold:
        columns = list(words_of(loaded.tokenizer, _ids(loaded, source))[0][:-1])
        rows = list(words_of(loaded.target_tokenizer, _ids(loaded, target, True))[0][:-1])
    return {
        "source": source,
        "reference": target,
        "translation": translation,
        "columns": columns,
        "rows": rows,
        "gold": sorted(gold_of(source)) if task.has_gold else None,
        "weights": shown,
    }


def _padded(loaded: LoadedRun, task: Task, pairs: Sequence[Pair], rows: int) -> Iterator[np.ndarray]:
    """Sources with their ends of text, then the decoder's input: each with its segments, [rows, length] int32."""
    end = loaded.target_tokenizer.end_of_text
    sources = [[*_ids(loaded, source), loaded.tokenizer.end_of_text] for source, _ in pairs]
    targets = [[end, *_ids(loaded, target, True)] for _, target in pairs]
    for side in (sources, targets):
        tokens, segments = np.zeros((rows, task.length), np.int32), np.zeros((rows, task.length), np.int32)
        # A row must not be padding only.
        segments[:, 0] = 1
        for row, ids in enumerate(side):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        yield tokens
        yield segments


def _spans(loaded: LoadedRun, task: Task, pair: Pair) -> tuple[list[Span], list[Span]]:
    """Which tokens make which word, of the target and of the source. In the synthetic languages a token is a word."""
    if task.has_gold:
        target, source = ([(i, i + 1) for i in range(len(side.split()))] for side in pair[::-1])
        return target, source
    sides: tuple[tuple[Tokenizer, list[int]], ...] = (
        (loaded.target_tokenizer, _ids(loaded, pair[1], True)),
        (loaded.tokenizer, _ids(loaded, pair[0])),
    )
    target, source = (words_of(tokenizer, ids)[1][:-1] for tokenizer, ids in sides)
    return target, source


def _ids(loaded: LoadedRun, text: str, is_target: bool = False) -> list[int]:
    return (loaded.target_tokenizer if is_target else loaded.tokenizer).encode(text).tolist()


def _fits(loaded: LoadedRun, task: Task, pair: Pair) -> bool:
    return all(0 < len(_ids(loaded, text, bool(side))) < task.length for side, text in enumerate(pair))


def _diagonal(num_targets: int, num_sources: int) -> Alignment:
    """The diagonal alignment, which needs only the two lengths."""
    return {(said * num_sources // num_targets, said) for said in range(num_targets)}


def _quality(found: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    if not found:
        return {"bleu": None, "chrf": None, "pairs": 0}
    quality = score(found, references)
    return {"bleu": quality.bleu, "chrf": quality.chrf, "pairs": quality.pairs}
