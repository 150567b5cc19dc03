"""Reads what a run stores for later use: the config, the tokenizers and the parameters of a checkpoint."""

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
"""Prefix of the files of a separate target tokenizer."""
_ORIGIN = "origin.json"

NO_SCORES = ("eval/selection_loss", "eval/tokens", "eval/pairs")
"""What an evaluation records in addition to its scores."""
Curves = dict[str, dict[int, float]]
"""Metric → step → value."""


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model with everything needed to use it."""

    config: RunConfig
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    """The tokenizer of the target: the same, unless the two sides of pairs have separate vocabularies."""
    params: nnx.State
    mesh: jax.sharding.Mesh
    step: int
    labels: tuple[str, ...] = ()
    """The names of the classes, or tags, that it predicts, by their numbers."""


def load_run(run: Path, step: str = "best", *, like: RunConfig | None = None, merge_adapters: bool = True) -> LoadedRun:
    """A run's config, tokenizers and parameters, sharded over the available devices.

    Args:
        step: `latest`, `best` (the latest if none was evaluated), or a step's number.
        like: shard the parameters as this run would; None: as the run itself.
        merge_adapters: merge adapters into the model, which then computes the same, and give a config without them.

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
    """Save the tokenizers in the run's folder, and return their files as text, by name, for its checkpoints."""
    with writing(directory):
        prepared.tokenizer.save(directory)
        if prepared.own_target_tokenizer is not None:
            prepared.own_target_tokenizer.save(directory / _TARGET)
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def write_origin(directory: Path, prepared: Prepared) -> None:
    """Record a run's origin in its folder, in addition to its config: the data's fingerprint, and versions of packages."""
    origin = {"data": prepared.meta.fingerprint, "versions": versions()}
    (directory / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def read_origin(directory: Path) -> dict[str, Any] | None:
    """What `write_origin` wrote; None without a record."""
    path = directory / _ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def config_file(directory: Path) -> Path:
    """The config of a run's folder. Raises `UserError` if there is no run."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"{directory}: no run here (it has no config.yaml)")
    return path


def read_metrics(directory: Path) -> Curves:
    """All records in a run's metrics.jsonl; empty if there are none."""
    path, curves = directory / "metrics.jsonl", Curves()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            # A kill truncated the last line.
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
