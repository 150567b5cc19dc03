"""`manyheads export --format peft`: a run's low-rank adapters alone, as a folder that PEFT loads onto their base."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from flax import nnx

from train.config import dump
from train.files import check_new, whole_folder
from train.huggingface import card
from train.huggingface.export import exported_tokenizer, origin_of
from train.huggingface.import_checkpoint import record_of
from train.huggingface.source import WHEEL
from train.huggingface.vocabulary import written
from train.parallel.mesh import use_mesh
from train.program.program import trained_of
from train.remote import local_path
from train.run.run_files import load_run
from transformer.errors import UserError
from transformer.huggingface import checkpoint
from transformer.huggingface.adapters import to_peft
from transformer.huggingface.tensors import save_file
from transformer.models.adapted import make_adapted


def export_adapter(
    run: Path, directory: Path | None = None, *, step: str = "best", model_type: str | None = None
) -> Path:
    """Write adapter_config.json, adapter_model.safetensors, the tokenizer and a card.

    Args:
        directory: the folder to make, which must not exist; RUN/peft by default.
        step, model_type: as in `export`.

    Raises:
        UserError: no such run or checkpoint, a run without adapters or without a base, a model that fits no architecture, or
            a folder that exists already or cannot be written.
    """
    directory = run / "peft" if directory is None else directory
    check_new(directory)
    loaded = load_run(run, step, merge_adapters=False)
    config = loaded.config
    if config.adapter is None:
        raise UserError(f"{run}: this run trained no adapters; --format hf writes the model whole")
    if config.init_from is None:
        raise UserError(
            f"{run}: its adapters were trained on random weights, which no other run has; --format hf merges and writes both"
        )
    architecture = checkpoint.architecture_of(config.model, model_type or origin_of(run, loaded))
    name = architecture.class_of(config.model)
    assert name is not None
    base, revision = _base_of(local_path(config.init_from))
    ours = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(loaded.params)}
    frozen = trained_of(config, functools.partial(make_adapted, config.model, config.adapter)).frozen
    if any(path[0] == "embedding_head" and path not in frozen for path in ours):
        raise UserError(
            f"{run}: the layers of its embedding head were trained too, and PEFT has no place for them; --format hf writes "
            "the model whole"
        )
    # A base with another head lacks these, trained or not.
    kept = {path for path in ours if path not in frozen or path[0] in ("pooled_head", "token_head")}
    with use_mesh(loaded.mesh, config.mesh.rules), whole_folder(directory) as partial:
        found = to_peft(
            architecture.named(config.model, name), ours, config.adapter, kept, model=config.model, base=base
        )
        save_file(partial / "adapter_model.safetensors", found.tensors)
        about = found.config | ({"revision": revision} if revision else {})
        files = {"adapter_config.json": json.dumps(about, indent=2) + "\n", "config.yaml": dump(config)}
        files |= written(exported_tokenizer(loaded), config.model)
        files["README.md"] = card.text(loaded, run, name, architecture.model_type, base=base)
        for place, text in files.items():
            (partial / place).write_text(text, encoding="utf-8")
    if base == str(_exported(local_path(config.init_from))) and not Path(base).exists():
        print(f"  note: their base model is written by: manyheads export {config.init_from}")
    count = sum(tensor.size for tensor in found.tensors.values())
    print(f"written to {directory}: {count:,} numbers; peft.PeftModel.from_pretrained(BASE, {str(directory)!r})")
    return directory


def _base_of(run: Path) -> tuple[str, str]:
    """The base model of a run's adapters, as an argument of `from_pretrained`, and its revision on the hub."""
    source = record_of(run).get("source")
    if source is None or source.startswith(WHEEL):
        return str(_exported(run)), ""
    if Path(source).is_dir():
        return source, ""
    name, _, revision = source.partition("@")
    return name, revision


def _exported(run: Path) -> Path:
    """Where `manyheads export` writes a run."""
    return run / "huggingface"
