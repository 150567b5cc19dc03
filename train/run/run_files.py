"""What a run leaves for those who come after it: the config, the tokenizers and the parameters of a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from train.config import RunConfig, parse
from train.data.prepared.store import Prepared
from train.data.tokenization.tokenizer import Tokenizer
from train.files import writing
from train.parallel.mesh import MeshConfig, make_mesh, use_mesh
from train.run.checkpoint import Checkpoints
from train.run.state import abstract_params
from train.versions import versions
from transformer.errors import UserError
from transformer.layers.adapter import merged
from transformer.models.adapted import make_adapted
from transformer.models.families import make_model

_TARGET = "target/"
"""What the names of the files of the target's own tokenizer begin with."""
_ORIGIN = "origin.json"

NO_SCORES = ("eval/selection_loss", "eval/tokens", "eval/pairs")
"""What an evaluation records beside its scores."""
Curves = dict[str, dict[int, float]]
"""Metric → step → value."""


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model with all that it takes to use it."""

    config: RunConfig
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    """Of what is predicted: the same, unless pairs have a vocabulary a side."""
    params: nnx.State
    mesh: jax.sharding.Mesh
    step: int
    labels: tuple[str, ...] = ()
    """The names of the classes, or tags, that it tells, by their numbers."""


def load_run(run: Path, step: str = "best", *, like: RunConfig | None = None, merge_adapters: bool = True) -> LoadedRun:
    """A run's config, tokenizers and parameters, laid out over the devices that are here now.

    Args:
        step: `latest`, `best` (the latest where none was scored), or a step's number.
        like: lay the parameters out as this run would; None: as the run itself.
        merge_adapters: give the plain model that gives what the adapted one does, and a config without them.

    Raises:
        UserError: no such run or checkpoint.
    """
    with Checkpoints(run) as checkpoints:
        number = _choose(checkpoints, run, step)
        meta = checkpoints.meta(number)
        config = parse(meta["config"], f"{run}, step {number}")
        with tempfile.TemporaryDirectory() as folder:
            for name, text in meta["tokenizer"].items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
            tokenizer = Tokenizer.load(Path(folder))
            target = Path(folder, _TARGET)
            target_tokenizer = Tokenizer.load(target) if target.is_dir() else tokenizer
        placed = MeshConfig(strategy="fsdp" if config.mesh.slices_parameters else "dp") if like is None else like.mesh
        mesh = make_mesh(placed)
        with use_mesh(mesh, placed.rules):
            described = abstract_params(functools.partial(make_adapted, config.model, config.adapter), mesh)
            params = checkpoints.restore_params(number, described)
            if config.adapter is not None and merge_adapters:
                plain = abstract_params(functools.partial(make_model, config.model), mesh)
                layout = jax.tree.map(lambda leaf: leaf.sharding, plain)
                params = jax.jit(merged, static_argnums=1, out_shardings=layout)(params, config.adapter.scale)
                config = dataclasses.replace(config, adapter=None)
    return LoadedRun(config, tokenizer, target_tokenizer, params, mesh, number, tuple(meta.get("labels", ())))


def tokenizer_files(prepared: Prepared, directory: Path) -> dict[str, str]:
    """Save the tokenizers in a folder of the run, and give their files as text, by name, for its checkpoints."""
    with writing(directory):
        prepared.tokenizer.save(directory)
        if prepared.own_target_tokenizer is not None:
            prepared.own_target_tokenizer.save(directory / _TARGET)
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def write_origin(directory: Path, prepared: Prepared) -> None:
    """Note in a run's folder what it was made of beside its config: the data's fingerprint, and versions of packages."""
    origin = {"data": prepared.meta.fingerprint, "versions": versions()}
    (directory / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def read_origin(directory: Path) -> dict[str, Any] | None:
    """What `write_origin` wrote; None where nothing did."""
    path = directory / _ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_metrics(directory: Path) -> Curves:
    """All that a run has recorded in its metrics.jsonl; nothing for a run that has recorded nothing."""
    path, curves = directory / "metrics.jsonl", Curves()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            # A kill has cut the last line short.
            continue
        for name, value in record.items():
            if name != "step":
                curves.setdefault(name, {})[record["step"]] = value
    return curves


def _choose(checkpoints: Checkpoints, run: Path, step: str) -> int:
    steps = checkpoints.steps
    if not steps:
        raise UserError(f"{run}: this run has no checkpoint yet")
    if step == "latest":
        return steps[-1]
    if step == "best":
        return steps[-1] if checkpoints.best is None else checkpoints.best
    if not step.isdecimal() or int(step) not in steps:
        raise UserError(f"--step: got {step!r}; this run has latest, best, {', '.join(map(str, steps))}")
    return int(step)
