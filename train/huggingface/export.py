"""`manyheads export`: writes a run as a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from train.config import dump
from train.data.sources.records import MARKED
from train.data.tokenization.chat import for_dialogues
from train.data.tokenization.tokenizer import ByteTokenizer, SubwordTokenizer
from train.files import check_new, whole_folder
from train.huggingface import card, parity
from train.huggingface.import_checkpoint import record_of
from train.huggingface.sentence_modules import is_embedder, with_modules, write_modules
from train.huggingface.sentence_texts import text_files
from train.huggingface.text_files import as_json
from train.huggingface.vocabulary import as_subwords, special_ids, written
from train.parallel.mesh import use_mesh
from train.remote import local_path
from train.run.run_files import LoadedRun, load_run
from train.versions import version
from transformer.errors import UserError
from transformer.huggingface import checkpoint
from transformer.huggingface.architecture import Architecture
from transformer.models.bert import BertConfig
from transformer.models.encoder_decoder import EncoderDecoderConfig

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def export(
    run: Path, directory: Path | None = None, *, step: str = "best", model_type: str | None = None,
    dtype: str = "float32", limit: int = checkpoint.FILE_LIMIT, verify: bool | None = None,
) -> Path:  # fmt: skip
    """Write config.json, safetensors, tokenizer, generation config and a model card.

    Args:
        directory: the folder to make, which must not exist; RUN/huggingface by default.
        step: checkpoint: `best` (the newest if none was evaluated), `latest`, or a number.
        model_type: the architecture to write; by default the one that the weights came from, or the first that fits.
        dtype: a name of `DTYPES`.
        limit: maximum bytes of tensors in one file.
        verify: compare the written weights with transformers; None: if it is installed.

    Raises:
        UserError: no such run or checkpoint, a model that fits no architecture, or a folder that exists already or cannot be
            written.
    """
    directory = run / "huggingface" if directory is None else directory
    check_new(directory)
    if dtype not in DTYPES:
        raise UserError(f"dtype: got {dtype!r}; allowed: {', '.join(DTYPES)}")
    loaded = load_run(run, step)
    architecture = checkpoint.architecture_of(loaded.config.model, model_type or origin_of(run, loaded))
    with use_mesh(loaded.mesh, loaded.config.mesh.rules), whole_folder(directory) as partial:
        name = write_files(partial, loaded, architecture, dtype=dtype, limit=limit)
        (partial / "README.md").write_text(card.text(loaded, run, name, architecture.model_type), encoding="utf-8")
        read = with_modules(checkpoint.read(partial), partial)
        if verify is not False:
            kept = jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]).astype(leaf.dtype), loaded.params)
            report = parity.report(read, kept, exported_tokenizer(loaded), required=bool(verify))
            (partial / parity.FILE).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
            print(parity.line(report))
    print(f"written to {directory}: transformers.{name}.from_pretrained({str(directory)!r})")
    return directory


def write_files(
    folder: Path, loaded: LoadedRun, architecture: Architecture, *, dtype: str = "float32",
    limit: int = checkpoint.FILE_LIMIT,
) -> str:  # fmt: skip
    """Write a run's config.json, safetensors, tokenizer, sentence-transformers' modules, generation config and config.yaml into a
    folder; returns the class of transformers that loads it.

    Args:
        dtype, limit: as in `export`.

    Raises:
        UserError: the run's tokenizer and labels contradict the architecture.
        OSError: any error while writing.
    """
    config, tokenizer = loaded.config.model, exported_tokenizer(loaded)
    extra = _labels(loaded) | special_ids(tokenizer, config.vocab_size)
    if getattr(config, "start_token", 0) is None:
        extra["decoder_start_token_id"] = loaded.target_tokenizer.end_of_text
    _, name = checkpoint.write(
        folder, config, loaded.params, model_type=architecture.model_type, dtype=DTYPES[dtype], extra=extra, limit=limit
    )
    files = written(tokenizer, config) | _generation(loaded, tokenizer, extra)
    if isinstance(config, BertConfig) and is_embedder(config):
        about = loaded.tokenizer.conventions.embedding
        write_modules(folder, config, loaded.params, DTYPES[dtype], about)
        files |= text_files(about, config.max_length)
    files["config.yaml"] = dump(loaded.config)
    for place, text in files.items():
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")
    return name


def origin_of(run: Path, loaded: LoadedRun) -> str | None:
    """The architecture that the weights were imported from, if the model still fits it."""
    for folder in (run, local_path(loaded.config.init_from or run)):
        kind = record_of(folder).get("model_type")
        if kind in checkpoint.ARCHITECTURES and not checkpoint.ARCHITECTURES[kind].differences(loaded.config.model):
            return str(kind)
    return None


def exported_tokenizer(loaded: LoadedRun) -> SubwordTokenizer:
    """A run's tokenizer in a form that transformers reads."""
    tokenizer = loaded.tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        tokenizer = as_subwords(tokenizer)
        if loaded.config.objective.label_kind in MARKED:
            tokenizer = for_dialogues(tokenizer)
    assert isinstance(tokenizer, SubwordTokenizer)
    return tokenizer


def _labels(loaded: LoadedRun) -> dict[str, Any]:
    """The fields of config.json about the classes that the model predicts."""
    if not loaded.labels:
        return {}
    return {
        "id2label": {str(number): label for number, label in enumerate(loaded.labels)},
        "label2id": {label: number for number, label in enumerate(loaded.labels)},
    }


def _generation(loaded: LoadedRun, tokenizer: SubwordTokenizer, extra: dict[str, Any]) -> dict[str, str]:
    """generation_config.json of a model that generates: that of an import, with the tokens of the run."""
    model: Any = loaded.config.model
    if isinstance(model, BertConfig):
        return {}
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    kept = {**tokenizer.conventions.generation, **{key: value for key, value in extra.items() if key in tokens}}
    start = getattr(model, "start_token", None)
    if start is not None:
        kept["decoder_start_token_id"] = start
    if isinstance(model, EncoderDecoderConfig) and model.written_tokens < model.vocab_size:
        kept["bad_words_ids"] = [[model.written_tokens]]
    kept["transformers_version"] = version("transformers")
    return {"generation_config.json": as_json(kept)}
