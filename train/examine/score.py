"""`manyheads eval`: all scores of a run on its held-out data, or on any other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.config import RunConfig
from train.data.prepared.content import Content
from train.data.prepared.label_arrays import listed
from train.data.prepared.prepare import DataConfig, prepare
from train.data.prepared.store import Prepared, TokenArray
from train.data.sources.file_formats import format_of
from train.data.sources.source_config import FileFormatSource, FilesSource, RecordSource, SourceConfig
from train.data.tokenization.tokenizer import TokenizerConfig
from train.data.tokenization.vocabulary import is_trained
from train.files import write_whole, writing
from train.parallel.mesh import MeshConfig, batch_parts, use_mesh
from train.progress import say
from train.run.begin import check_data, program_of
from train.run.evaluate import Evaluator, Scores
from train.run.reference import with_stored
from train.run.run_files import LoadedRun, load_run, read_origin
from train.translation import TextTranslator
from transformer.errors import UserError


def score(
    run: Path, *, step: str = "best", data: str | None = None, out: Path | None = None, encoding: str | None = None
) -> Scores:
    """Evaluate a run on all of its held-out data, or of another file, print every score, and store them if asked.

    Args:
        step: which checkpoint, as in `load_run`.
        data: files whose rows have the fields of the run's first source.
        encoding: of files in `data` without a byte order mark; None: that of the run's first source.
        out: a folder for the scores, and the predictions and pictures of a task.

    Raises:
        UserError: no such run or file, imported weights, or data that does not fit the run.
    """
    loaded = load_run(run, step)
    config = loaded.config
    if config.objective.kind == "none":
        raise UserError(f"{run}: imported weights have no objective to be evaluated by; fine-tune them first")
    if data is not None and config.objective.needs_reference:
        raise UserError(
            f"{run}: --data: preferences are compared with the reference model, whose log-probabilities are stored for the run's "
            "own pairs alone; leave out --data"
        )
    if data is not None:
        config = dataclasses.replace(config, data=_data_of(loaded, run, data, encoding))
    prepared = prepare(config.data)
    _check_vocabulary(loaded, prepared, run)
    if data is None:
        _warn_of_changes(run, prepared)
    prepared = _with_labels_of(loaded, prepared)
    if not prepared.validation:
        raise UserError(f"{run}: the run has no held-out text; give a file to evaluate on with --data")
    mesh = MeshConfig(strategy="fsdp" if config.mesh.slices_parameters else "dp")
    with use_mesh(loaded.mesh, mesh.rules):
        parts = batch_parts(loaded.mesh, mesh.rules)
        size = -(-config.evaluation_batch_size // parts) * parts
        evaluation = dataclasses.replace(config.evaluation, batches=None, batch_size=size)
        config = dataclasses.replace(config, mesh=mesh, evaluation=evaluation, microbatches=1)
        check_data(config, prepared)
        prepared = with_stored(run, config, prepared)
        program = program_of(config, prepared, loaded.mesh)
        evaluator = Evaluator(config, prepared, program, _translator(config, prepared))
        found = evaluator.evaluate(loaded.params, None, lambda: False)
        assert not isinstance(found, tuple)
        scores = found.scores
        if quality := found.quality or evaluator.quality(loaded.params):
            scores = dataclasses.replace(scores, metrics={**scores.metrics, "bleu": quality.bleu, "chrf": quality.chrf})
    names = ", ".join(array.name for array in prepared.validation)
    print(f"{run}, step {loaded.step}, on {names}\n{evaluator.say(scores)}")
    for line in config.objective.report(prepared, scores.bits_per_byte):
        print(line)
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            stored = {"run": str(run), "step": loaded.step, "data": names, **scores.values()}
            write_whole(out / "scores.json", json.dumps(stored, indent=2) + "\n")
        for line in () if evaluator.task is None else evaluator.task.finish(found.predictions, out):
            print(line)
        print(f"scores: {out / 'scores.json'}")
    return scores


def _data_of(loaded: LoadedRun, run: Path, path: str, encoding: str | None) -> DataConfig:
    """The data of files with the fields of the run's first source, tokenised as the run's."""
    config = loaded.config.data
    first = config.sources[0]
    own: dict[str, Any] = {}
    if isinstance(first, RecordSource):
        names = {field.name for field in dataclasses.fields(RecordSource)} - {"kind", "weight", "limit"}
        own = {name: getattr(first, name) for name in names}
    if isinstance(first, FileFormatSource):
        own["encoding"] = first.encoding
        if format_of(Path(path)) == "text":
            own["separator"] = first.separator
    if encoding is not None:
        own["encoding"] = encoding
    if isinstance(first, FileFormatSource) and first.file_format == "csv" == format_of(Path(path)):
        own |= {"delimiter": first.delimiter, "quotes": first.quotes, "columns": first.columns}
    source: SourceConfig = FilesSource(path=path, **own)
    both = [
        _tokenizer_of(one, run / "tokenizer" / folder) for one, folder in
        ((config.tokenizer, ""), (config.target_tokenizer, "target")) if one is not None
    ]  # fmt: skip
    # Preparing wants text to train on too.
    return DataConfig(
        sources=(source,), validation=(source,), packing=config.packing, tokenizer=both[0],
        target_tokenizer=both[1] if len(both) > 1 else None,
    )  # fmt: skip


def _tokenizer_of(config: TokenizerConfig, folder: Path) -> TokenizerConfig:
    """The same tokenizer, without training it again."""
    return TokenizerConfig(kind="file", path=str(folder / "tokenizer.json")) if is_trained(config) else config


def _check_vocabulary(loaded: LoadedRun, prepared: Prepared, run: Path) -> None:
    pairs = ((loaded.tokenizer, prepared.tokenizer), (loaded.target_tokenizer, prepared.target_tokenizer))
    if any(one.fingerprint() != other.fingerprint() for one, other in pairs):
        raise UserError(
            f"{run}: its sources give another vocabulary than it was trained with, since they have changed; name a file to "
            "evaluate on with --data"
        )


def _warn_of_changes(run: Path, prepared: Prepared) -> None:
    """Say that the held-out documents need not be those of the training."""
    origin = read_origin(run)
    if origin is not None and origin["data"] != Content.of(prepared).digest:
        say(
            f"{run}: its data are not those that it was trained on: a source has changed, or another version of manyheads holds "
            "out other documents. Some of these held-out documents may be ones that it has learned",
            shown=True,
        )


def _with_labels_of(loaded: LoadedRun, prepared: Prepared) -> Prepared:
    """The data with the run's numbers of classes, or tags.

    Raises:
        UserError: it has a class that the run does not predict.
    """
    names, known = prepared.meta.labels, list(loaded.labels)
    if list(names) == known or not names:
        return prepared
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"data: label {unknown[0]!r} is none that the run predicts ({', '.join(known)}); remove such rows, or fix the label"
        )
    if missing := [name for name in known if name not in names]:
        print(f"data: no document has {len(missing)} of the run's {len(known)} labels: {listed(missing)}")
    # The last place is that of no label, -1.
    number_of = np.array([*map(known.index, names), -1], np.int32)

    def renumbered(array: TokenArray) -> TokenArray:
        if array.labels is None:
            return array
        labels = np.asarray(array.labels)
        if prepared.meta.label_kind != "classes":
            return dataclasses.replace(array, labels=number_of[labels])
        several = np.zeros((len(labels), len(known)), labels.dtype)
        several[:, number_of[:-1]] = labels
        return dataclasses.replace(array, labels=several)

    return dataclasses.replace(
        prepared, meta=dataclasses.replace(prepared.meta, labels=tuple(known)),
        train=tuple(map(renumbered, prepared.train)), validation=tuple(map(renumbered, prepared.validation)),
    )  # fmt: skip


def _translator(config: RunConfig, prepared: Prepared) -> TextTranslator | None:
    if not config.objective.translates or jax.process_count() > 1:
        return None
    return TextTranslator(config, prepared.tokenizer, prepared.target_tokenizer)
