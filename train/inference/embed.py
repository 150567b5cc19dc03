"""`manyheads embed`: computes a vector for each text of a file, with an encoder.

Texts are packed: several share a row without attending to each other, so that little is computed on padding.

B batch, T position, K text of a row, D embed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.data.examples.masked import framed
from train.data.examples.pack import Placed, best_fit_decreasing
from train.data.sources.new_documents import new_documents
from train.data.sources.records import Document
from train.data.sources.source_config import FilesSource
from train.data.tokenization.tokenise import batches
from train.data.tokenization.tokenizer import CLS, SEP, Tokenizer
from train.files import check_place, whole_file, writing
from train.inference.predict import counting
from train.parallel.mesh import use_mesh
from train.run.run_files import load_run
from train.text_files import DEFAULT_ENCODING
from transformer.errors import UserError, nearest, shown
from transformer.functional import graphdef_of
from transformer.models.bert import BertConfig
from transformer.models.embedding_head import (
    EmbeddingHead,
    EmbeddingHeadConfig,
    NormalizeLayerConfig,
    Pooling,
    VectorLayerConfig,
)
from transformer.models.families import make_model
from transformer.types import Array

SHORTEST_ROW = 64
"""Tokens of the shortest rows; longer texts have rows of twice as many, and so on."""
BATCH_TOKENS = {"cpu": 2048}
"""Tokens in one call of the model, by JAX's backend: limited by the caches of a CPU, enough to keep other devices busy."""
LARGE_BATCH = 65_536
CHUNK = 16_384
"""Texts that are packed together, and in memory together."""
CHUNK_CHARACTERS = 1 << 22
"""Characters of text after which there are fewer."""


class Embedder:
    """An encoder that embeds texts, compiled once for each length of rows; the parameters are given at each call.

    Args:
        pooling: how the vectors of a text's tokens, `[CLS]` and `[SEP]` included, become one; as the model's head does by
            default.
        normalize: whether the last step scales the vectors to length 1; as the model's head does by default. A model with
            another head pools the first token and scales.
        prompt_name: the name of one of the model's prompts, which is put before each text; its default one by default.
        batch_tokens: tokens in one call of the model; the default depends on the device.

    Attributes:
        dim: the size of the vectors.
        cut: how many texts so far were longer than `longest` tokens, and cut.

    Raises:
        UserError: a vocabulary without `[CLS]` and `[SEP]`, a prompt that does not exist, or a pooling that does not fit the
            layers of the head.
    """

    def __init__(
        self, config: BertConfig, tokenizer: Tokenizer, *, pooling: Pooling | None = None, normalize: bool | None = None,
        prompt_name: str | None = None, batch_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer = config, tokenizer
        self.head = head_with(config, pooling, normalize)
        self.dim = self.head.dim(config.embed_dim)
        about = tokenizer.conventions.embedding
        self.prompt = prompt_of(tokenizer, prompt_name)
        # [CLS] and the prompt's tokens.
        self._first = (
            0 if about.get("include_prompt", True) or not self.prompt else 1 + len(tokenizer.encode(self.prompt))
        )
        self.longest = min(config.max_length, about.get("max_length", config.max_length))
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

    def __call__(self, params: nnx.State, texts: Sequence[str]) -> np.ndarray:
        """The vectors of texts, [texts, D] float32, in their order."""
        parts = [self._chunk(params, texts[first : first + CHUNK]) for first in range(0, len(texts), CHUNK)]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])

    def _chunk(self, params: nnx.State, texts: Sequence[str]) -> np.ndarray:
        longest = self.longest
        ids = self.tokenizer.encode_batch([self.prompt + text for text in texts])
        self.cut += sum(len(one) + 2 > longest for one in ids)
        ids = [one[: longest - 2] for one in ids]
        sizes = np.array([len(one) + 2 for one in ids], np.int64)
        tokens = np.concatenate([*ids, np.zeros(1, self.tokenizer.dtype)])
        starts = np.cumsum(sizes - 2) - (sizes - 2)
        found = np.empty((len(texts), self.dim), np.float32)
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
        is_own_BKT = segments_BT[:, None] == jnp.arange(1, num_texts + 1)[:, None]
        hidden_BTD, _ = model.hidden(
            tokens_BT,
            segments_BT=segments_BT,
            lengths_BM=is_own_BKT.sum(-1, dtype=jnp.int32),
            positions_BT=positions_BT,
        )
        head = model.embedding_head or EmbeddingHead(self.config.embed_dim, self.head, rngs=nnx.Rngs(0))
        return head.packed(
            hidden_BTD, segments_BT, positions_BT, num_texts=num_texts, first=self._first, config=self.head
        )


def head_with(config: BertConfig, pooling: Pooling | None, normalize: bool | None) -> EmbeddingHeadConfig:
    """The head of a model that embeds, with another pooling or last layer if they are given.

    Raises:
        UserError: that pooling does not fit the layers after it.
    """
    head = config.head if isinstance(config.head, EmbeddingHeadConfig) else EmbeddingHeadConfig()
    layers: tuple[VectorLayerConfig, ...] = head.layers
    if pooling is not None:
        sized = [layer.kind for layer in layers if not isinstance(layer, NormalizeLayerConfig)]
        if sized and len(head.poolings) > 1:
            raise UserError(
                f"pooling: got {pooling!r}; the model's layers after pooling ({', '.join(sized)}) need its own, "
                f"{' and '.join(head.poolings)}; leave it out"
            )
        head = dataclasses.replace(head, pooling=pooling)
    ends = bool(layers) and isinstance(layers[-1], NormalizeLayerConfig)
    if normalize is not None and normalize != ends:
        layers = (*layers, NormalizeLayerConfig()) if normalize else layers[:-1]
    return dataclasses.replace(head, layers=layers)


def prompt_of(tokenizer: Tokenizer, name: str | None) -> str:
    """The text of a model's prompt, by its name; that of the default prompt, or none, by default.

    Raises:
        UserError: the model has no prompt of that name.
    """
    about = tokenizer.conventions.embedding
    # Names that sentence-transformers knows for every model.
    prompts = {"query": "", "document": ""} | about.get("prompts", {})
    name = about.get("default_prompt") if name is None else name
    if name is None:
        return ""
    if name not in prompts:
        raise UserError(f"prompt_name: got {name!r}; this model has {', '.join(prompts)}.{nearest(name, prompts)}")
    return prompts[name]


def _take(found: np.ndarray, pieces: np.ndarray, places: np.ndarray, vectors_BKD: Array) -> None:
    found[pieces] = np.asarray(vectors_BKD).reshape(-1, found.shape[1])[places]


def embed(
    run: Path, file: str, out: Path, *, field: str = "text", pooling: Pooling | None = None,
    normalize: bool | None = None, prompt_name: str | None = None, step: str = "best", encoding: str = DEFAULT_ENCODING,
) -> None:  # fmt: skip
    """Write the vectors of a file's texts: `.npy`, [texts, D] float32; or `.parquet`, with the columns id, text and embedding.

    Args:
        file: one text per line (.txt, or `-`: standard input), of which a blank one has a vector too, or records (.jsonl, .csv,
            .parquet).
        field: the field of records that holds the text.
        pooling, normalize, prompt_name: as of `Embedder`.
        encoding: of a file without a byte order mark.

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
    documents = new_documents(FilesSource(path=file, text_field=field), file, encoding)
    embedder = Embedder(model, loaded.tokenizer, pooling=pooling, normalize=normalize, prompt_name=prompt_name)
    open_writer = _ArrayFile if out.suffix == ".npy" else _TableFile
    with (
        use_mesh(loaded.mesh, loaded.config.mesh.rules),
        writing(out),
        whole_file(out) as partial,
        counting("embedding") as advance,
        open_writer(partial, embedder.dim) as writer,
    ):
        for chunk in batches(documents, CHUNK, CHUNK_CHARACTERS):
            writer.add(chunk, embedder(loaded.params, [document.text for document in chunk]))
            advance(len(chunk))
    cut = f"; {embedder.cut} of them were longer than {embedder.longest} tokens, and cut" if embedder.cut else ""
    pooled = " and ".join(embedder.head.poolings)
    prompt = f", prompt {shown(embedder.prompt)}" if embedder.prompt else ""
    print(f"{writer.count} texts, {embedder.dim} numbers each ({pooled} pooling{prompt}): {out}{cut}")


class _ArrayFile(contextlib.AbstractContextManager["_ArrayFile"]):
    """A `.npy` file of vectors, [texts, D] float32, whose number is not known before all of them are written."""

    def __init__(self, path: Path, dim: int) -> None:
        self.count, self._dim = 0, dim
        self._stream = path.open("wb")
        self._write_header()

    def add(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        """Append the vectors [documents, D]."""
        self._stream.write(vectors.astype("<f4").tobytes())
        self.count += len(documents)

    def _write_header(self) -> None:
        # numpy pads the header with room for any number of rows, so that it can be written again in the same place.
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self._dim)}
        self._stream.seek(0)
        np.lib.format.write_array_header_1_0(self._stream, header)

    def __exit__(self, *_: object) -> None:
        try:
            self._write_header()
        finally:
            self._stream.close()


class _TableFile(contextlib.AbstractContextManager["_TableFile"]):
    """A `.parquet` file of ids, texts and vectors, a row group for each part that is added."""

    def __init__(self, path: Path, dim: int) -> None:
        import pyarrow
        from pyarrow import parquet

        vector = pyarrow.list_(pyarrow.float32(), dim)
        fields = [("id", pyarrow.string()), ("text", pyarrow.string()), ("embedding", vector)]
        self.count, self._dim, self._schema = 0, dim, pyarrow.schema(fields)
        self._writer = parquet.ParquetWriter(path, self._schema)

    def add(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        """Append the documents and their vectors [documents, D]."""
        import pyarrow

        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), self._dim)
        columns = [[document.id for document in documents], [document.text for document in documents], column]
        self._writer.write_table(pyarrow.table(columns, schema=self._schema))
        self.count += len(documents)

    def __exit__(self, *_: object) -> None:
        self._writer.close()
