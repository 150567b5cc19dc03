"""`manyheads embed`: computes a vector for each text of a file, with an encoder.

Texts are packed: several share a row without attending to each other, so that little is computed on padding.

B batch, T position, K text of a row, D embed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import Progress

from train.data.examples.masked import framed
from train.data.examples.pack import Placed, best_fit_decreasing
from train.data.sources.source_config import FilesSource
from train.data.tokenization.tokenizer import CLS, SEP, Tokenizer
from train.files import check_place, whole_file, writing
from train.inference.predict import read_documents
from train.parallel.mesh import use_mesh
from train.report.display import console
from train.run.run_files import load_run
from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.heads import Pooling
from transformer.types import Array

SHORTEST_ROW = 64
"""Tokens of the shortest rows; longer texts have rows of twice as many, and so on."""
BATCH_TOKENS = {"cpu": 2048}
"""Tokens in one call of the model, by JAX's backend: limited by the caches of a CPU, enough to keep other devices busy."""
LARGE_BATCH = 65_536
CHUNK = 16_384
"""Texts that are packed together."""


class Embedder:
    """An encoder that embeds texts, compiled once for each length of rows; the parameters are given at each call.

    Args:
        pooling: the vector of a text: that of its first token, or the mean of all its tokens, `[CLS]` and `[SEP]` included; the
            config's by default.
        normalize: scale vectors to length 1.
        batch_tokens: tokens in one call of the model; the default depends on the device.

    Raises:
        UserError: a vocabulary without `[CLS]` and `[SEP]`.
    """

    def __init__(
        self, config: BertConfig, tokenizer: Tokenizer, *, pooling: Pooling | None = None, normalize: bool = True,
        batch_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer = config, tokenizer
        usual = getattr(config.head, "pooling", "cls")
        self.pooling, self.normalize = usual if pooling is None else pooling, normalize
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(jax.default_backend(), LARGE_BATCH)
        ends = tokenizer.special(CLS), tokenizer.special(SEP)
        if ends[0] is None or ends[1] is None:
            missing = " and ".join(name for name, one in zip((CLS, SEP), ends, strict=True) if one is None)
            raise UserError(
                f"the tokenizer has no {missing}; an encoder needs {CLS} before and {SEP} after each text "
                "(data.tokenizer.special_tokens)"
            )
        self._ends: tuple[int, int] = ends  # type: ignore[assignment]
        self._graphdef = graphdef_of(functools.partial(make_model, config))
        self._run = jax.jit(self._run_impl, static_argnames="num_texts")
        self.cut = 0
        """How many texts so far were longer than the context, and cut."""

    def __call__(self, params: nnx.State, texts: Sequence[str]) -> np.ndarray:
        """The vectors of texts, [texts, D] float32, in their order."""
        return np.concatenate([np.zeros((0, self.config.embed_dim), np.float32), *self.chunks(params, texts)])

    def chunks(self, params: nnx.State, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """The vectors in successive parts, so that they are written while the next texts are embedded."""
        for first in range(0, len(texts), CHUNK):
            yield self._chunk(params, texts[first : first + CHUNK])

    def _chunk(self, params: nnx.State, texts: Sequence[str]) -> np.ndarray:
        longest = self.config.max_length
        ids = self.tokenizer.encode_batch(texts)
        self.cut += sum(len(one) + 2 > longest for one in ids)
        ids = [one[: longest - 2] for one in ids]
        sizes = np.array([len(one) + 2 for one in ids], np.int64)
        tokens = np.concatenate([*ids, np.zeros(1, self.tokenizer.dtype)])
        starts = np.cumsum(sizes - 2) - (sizes - 2)
        found = np.empty((len(texts), self.config.embed_dim), np.float32)
        waiting: list[tuple[np.ndarray, np.ndarray, Array]] = []
        for length in sorted({self._row_length(size) for size in set(sizes.tolist())}, reverse=True):
            own = np.flatnonzero([self._row_length(size) == length for size in sizes.tolist()])
            for pieces, counts in self._batches(own, sizes, length):
                placed = Placed.of(pieces, counts, sizes, length)
                rows = framed(tokens, starts, placed, *self._ends)
                vectors_BKD = self._run(params, *map(jnp.asarray, rows.values()), num_texts=length // 2)
                rank = np.concatenate([np.arange(count) for count in counts])
                waiting.append((pieces, np.repeat(np.arange(len(counts)), counts) * (length // 2) + rank, vectors_BKD))
                # Two batches in flight keep the device busy while the host prepares the next.
                if len(waiting) > 2:
                    _take(found, *waiting.pop(0))
        for one in waiting:
            _take(found, *one)
        return found

    def _row_length(self, size: int) -> int:
        return min(max(SHORTEST_ROW, 1 << (size - 1).bit_length()), max(self.config.max_length, 2))

    def _batches(self, own: np.ndarray, sizes: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Texts row by row, and how many are in each row; the last batch has empty rows up to a power of two."""
        bins = best_fit_decreasing(sizes[own], length)
        order = np.argsort(bins, kind="stable")
        own, counts = own[order], np.bincount(bins)
        most = max(self.batch_tokens // length, 1)
        bounds = np.concatenate([[0], np.cumsum(counts)])
        for first in range(0, len(counts), most):
            some = counts[first : first + most]
            rows = min(1 << (len(some) - 1).bit_length(), most)
            yield own[bounds[first] : bounds[first + len(some)]], np.pad(some, (0, rows - len(some)))

    def _run_impl(
        self, params: nnx.State, tokens_BT: Array, segments_BT: Array, positions_BT: Array, *, num_texts: int
    ) -> Array:
        model = nnx.merge(self._graphdef, params)
        hidden_BTD, _ = model.hidden(tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT)
        is_own_BKT = segments_BT[:, None] == jnp.arange(1, num_texts + 1)[:, None]
        if self.pooling == "cls":
            is_own_BKT &= positions_BT[:, None] == 0
        own_BKT = is_own_BKT.astype(jnp.float32)
        sums_BKD = jnp.einsum("BKT,BTD->BKD", own_BKT, hidden_BTD.astype(jnp.float32), precision="highest")
        if self.normalize:
            return sums_BKD * jax.lax.rsqrt(jnp.maximum(jnp.square(sums_BKD).sum(-1, keepdims=True), 1e-24))
        return sums_BKD / jnp.maximum(own_BKT.sum(-1, keepdims=True), 1)


def _take(found: np.ndarray, pieces: np.ndarray, places: np.ndarray, vectors_BKD: Array) -> None:
    found[pieces] = np.asarray(vectors_BKD).reshape(-1, found.shape[1])[places]


def embed(
    run: Path, file: str, out: Path, *, field: str = "text", pooling: Pooling | None = None, normalize: bool = True,
    step: str = "best",
) -> None:  # fmt: skip
    """Write the vectors of a file's texts: `.npy`, [texts, D] float32; or `.parquet`, with the columns id, text and embedding.

    Args:
        file: one text per line (.txt, or `-`: standard input), or records (.jsonl, .csv, .parquet).
        field: the field of records that holds the text.

    Raises:
        UserError: no such run or checkpoint, a model that is not an encoder, or a file that cannot be read or written.
    """
    if out.suffix not in (".npy", ".parquet"):
        raise UserError(f"out: got {str(out)!r}; allowed: a name that ends with .npy or .parquet")
    check_place(out)
    loaded = load_run(run, step)
    model = loaded.config.model
    if not isinstance(model, BertConfig):
        raise UserError(f"{run}: a model of family {model.family!r} is not an encoder; embed needs family bert")
    documents = read_documents(FilesSource(path=file, text_field=field), file)
    texts = [document.text for document in documents]
    embedder = Embedder(model, loaded.tokenizer, pooling=pooling, normalize=normalize)
    vectors, out_to = np.empty((len(texts), model.embed_dim), np.float32), console()
    with (
        use_mesh(loaded.mesh, loaded.config.mesh.rules),
        Progress(console=out_to, transient=True, disable=not out_to.is_terminal) as progress,
    ):
        task, done = progress.add_task("embedding", total=len(texts)), 0
        for chunk in embedder.chunks(loaded.params, texts):
            vectors[done : done + len(chunk)] = chunk
            done += len(chunk)
            progress.update(task, completed=done)
    with writing(out), whole_file(out) as partial:
        if out.suffix == ".npy":
            with partial.open("wb") as stream:
                np.save(stream, vectors)
        else:
            import pyarrow
            from pyarrow import parquet

            ids = [document.id for document in documents]
            column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), model.embed_dim)
            parquet.write_table(pyarrow.table({"id": ids, "text": texts, "embedding": column}), partial)
    cut = f"; {embedder.cut} of them were longer than {model.max_length} tokens, and cut" if embedder.cut else ""
    print(f"{len(texts)} texts, {model.embed_dim} numbers each ({embedder.pooling} pooling): {out}{cut}")
