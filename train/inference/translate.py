"""`manyheads translate`: translations with their scores, and the alignment of their words with the source.

L layers, B batch, N heads, T target position, S source position, U target words, R source words.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.data.tokenization.tokenizer import Tokenizer
from train.inference.labels import labels
from train.parallel.mesh import use_mesh
from train.pictures import save_figure
from train.run.run_files import LoadedRun, load_run
from train.text_files import unix_lines
from train.translation import TextTranslator
from transformer.errors import UserError, check_text
from transformer.functional import graphdef_of
from transformer.generation.beam import BeamSearch
from transformer.interpret.alignment import alignment_matrix, merge_subwords, word_spans
from transformer.interpret.capture import AttentionMaps
from transformer.interpret.plot import plot_head
from transformer.models.families import make_model

END = "(end)"
"""Label of the end of a text, shown among words."""


def translate(
    run: Path,
    texts: list[str],
    search: BeamSearch,
    *,
    attention: Path | None = None,
    step: str = "best",
    by_line: bool = False,
) -> None:
    """Print the translation of each text, or the best ones with their scores if `search` returns several.

    The translation of a text without tokens, such as a blank line, is empty.

    Args:
        attention: a page to write, with the weights of the first text's translation; a picture (.png) of their mean is
            written next to it.
        by_line: print each translation as one line, and nothing else; several texts are printed before theirs if not, or if
            `search` returns several.

    Raises:
        UserError: no such run or checkpoint, a model of another kind, a text that does not fit it, or a page that cannot be
            written.
    """
    for text in texts:
        check_text("text", text)
    loaded = load_run(run, step)
    if not loaded.config.objective.translates:
        raise UserError(
            f"{run}: this model was not trained on pairs of texts (objective {loaded.config.objective.kind})"
        )
    translator = TextTranslator(loaded.config, loaded.tokenizer, loaded.target_tokenizer)
    with use_mesh(loaded.mesh, loaded.config.mesh.rules):
        found = translator.hypotheses(loaded.params, texts, search)
        for text, hypotheses in zip(texts, found, strict=True):
            if len(texts) > 1 and not (by_line and search.num_best == 1):
                print(text)
            translations = [loaded.target_tokenizer.decode(hypothesis.tokens) for hypothesis in hypotheses]
            if by_line:
                translations = [" ".join(unix_lines(translation).split("\n")) for translation in translations]
            if search.num_best == 1:
                print(*translations[:1])
                continue
            for rank, (hypothesis, translation) in enumerate(zip(hypotheses, translations, strict=True), start=1):
                print(f"{rank}  {hypothesis.score:8.4f}  {translation}")
        if attention is not None:
            best = found[0][0].tokens if found[0] else []
            _save(alignment(loaded, translator.tokens_of(texts[0]), best), attention)


def alignment(loaded: LoadedRun, source: list[int], target: list[int]) -> AttentionMaps:
    """The weights between the words of a source and of its translation, of every layer and head.

    Args:
        source: token ids with the end of text.
        target: token ids without it.

    Raises:
        UserError: the model has no attention.
    """
    graphdef = graphdef_of(functools.partial(make_model, loaded.config.model))

    @jax.jit
    def weights_of(params: nnx.State, source_BS: jax.Array, target_BT: jax.Array) -> jax.Array | None:
        return nnx.merge(graphdef, params)(source_BS, target_BT, return_weights=True).weights

    end = loaded.target_tokenizer.end_of_text
    # Each position attends to the source for the token that it predicts: the first one for the first word.
    weights = weights_of(loaded.params, jnp.asarray([source]), jnp.asarray([[end, *target]]))
    if weights is None:
        raise UserError("attention: this model has no attention")
    columns, column_spans = words(loaded.tokenizer, source[:-1])
    rows, row_spans = words(loaded.target_tokenizer, target)
    merged = merge_subwords(np.asarray(weights, np.float32)[:, 0], row_spans, column_spans)
    return AttentionMaps(
        rows, columns, tuple(range(merged.shape[0])), tuple(range(merged.shape[1])), merged,
        title=f"Translation by {loaded.config.name}", same_tokens=False,
    )  # fmt: skip


def words(tokenizer: Tokenizer, ids: list[int]) -> tuple[tuple[str, ...], list[tuple[int, int]]]:
    """The words of token ids, and the tokens of each; after the words, one more token: the end of text."""
    pieces = labels(tokenizer, np.asarray(ids, int))
    # A vocabulary of whole words has no spaces in its tokens.
    whole = len(tokenizer.decode(ids).split()) == len(ids)
    spans = [(place, place + 1) for place in range(len(ids))] if whole else list(word_spans(pieces))
    names = [("".join(pieces[start:stop]).strip().replace("##", "") or "␣") for start, stop in spans]
    return (*names, END), [*spans, (len(ids), len(ids) + 1)]


def _save(maps: AttentionMaps, path: Path) -> None:
    mean = alignment_matrix(maps.weights_LNTS[:, None])
    picture = plot_head(
        AttentionMaps(maps.rows, maps.columns, (0,), (0,), mean.reshape(1, 1, *mean.shape[-2:]), same_tokens=False),
        0,
        0,
    )
    heads = len(maps.layers) * len(maps.heads)
    picture.axes[0].set_title("attention" if heads == 1 else f"attention, mean of {heads} heads")
    picture.axes[0].set_xlabel("source")
    picture.axes[0].set_ylabel("translation")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page = maps.save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    save_figure(picture, path.with_suffix(".png"))
    print(f"page      {page}")
    print(f"picture   {path.with_suffix('.png')}")
