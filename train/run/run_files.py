"""Reads what a run stores for later use: the config, the tokenizers and the parameters of a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from train.checkpoints.identity import load_tokenizers, tokenizer_files
from train.checkpoints.stored import AVERAGE, META, PARAMS, StoredCheckpoints
from train.config import RunConfig, dump, parse_stored
from train.data.prepared.content import Content
from train.data.prepared.store import Prepared
from train.data.tokenization.tokenizer import Tokenizer
from train.files import write_whole, writing
from train.parallel.mesh import MeshConfig, make_mesh, use_mesh
from train.program.state import abstract_params
from train.report.metrics import METRICS, read_records
from train.versions import versions
from transformer.errors import UserError, first_line, shown
from transformer.layers.adapter import merged
from transformer.models.adapted import make_adapted
from transformer.models.families import make_model

_ORIGIN = "origin.json"
_FINISHED = "finished.json"
_USED = (PARAMS, AVERAGE, META)
"""The parts of a checkpoint that using a model needs."""

NO_SCORES = ("eval/selection_loss", "eval/tokens", "eval/pairs")
"""What an evaluation records in addition to its scores."""
Curves = dict[str, dict[int, float]]
"""Metric → step → value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A checkpoint of a run without its parameters."""

    config: RunConfig
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    """The tokenizer of the target: the same, unless the two sides of pairs have separate vocabularies."""
    step: int
    labels: tuple[str, ...] = ()
    """The names of the classes, or tags, that it predicts, by their numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun(StoredRun):
    """A trained model with everything needed to use it."""

    params: nnx.State
    mesh: jax.sharding.Mesh


def stored_run(run: Path, step: str = "best", used: tuple[str, ...] = (META,)) -> StoredRun:
    """What a checkpoint says of itself.

    Args:
        step: `latest`, `best` (the latest if none was evaluated), or a step's number.
        used: the parts of the checkpoint that must not be damaged; reading all of a part shows it.

    Raises:
        UserError: no such run or checkpoint.
    """
    checkpoints = StoredCheckpoints(run)
    number = _choose(checkpoints, step, used)
    meta = checkpoints.meta(number)
    config = parse_stored(meta["config"], f"{run}, step {number}")
    tokenizer, target_tokenizer = load_tokenizers(meta["tokenizer"], f"{run}, step {number}")
    return StoredRun(
        config=config, tokenizer=tokenizer, target_tokenizer=target_tokenizer, step=number,
        labels=tuple(meta.get("labels", ())),
    )  # fmt: skip


def load_run(run: Path, step: str = "best", *, like: RunConfig | None = None, merge_adapters: bool = True) -> LoadedRun:
    """A run's config, tokenizers and parameters, sharded over the available devices.

    Args:
        step: as in `stored_run`.
        like: shard the parameters as this run would; None: as the run itself.
        merge_adapters: merge adapters into the model, which then computes the same, and give a config without them.

    Raises:
        UserError: no such run or checkpoint.
    """
    stored = stored_run(run, step, _USED)
    config = stored.config
    placed = MeshConfig(strategy="fsdp" if config.mesh.slices_parameters else "dp") if like is None else like.mesh
    mesh = make_mesh(placed)
    with use_mesh(mesh, placed.rules):
        described = abstract_params(functools.partial(make_adapted, config.model, config.adapter), mesh)
        params = StoredCheckpoints(run).restore_params(stored.step, described)
        if config.adapter is not None and merge_adapters:
            plain = abstract_params(functools.partial(make_model, config.model), mesh)
            layout = jax.tree.map(lambda leaf: leaf.sharding, plain)
            params = jax.jit(merged, static_argnums=1, out_shardings=layout)(params, config.adapter.scale)
            config = dataclasses.replace(config, adapter=None)
    return LoadedRun(
        config=config, tokenizer=stored.tokenizer, target_tokenizer=stored.target_tokenizer, params=params, mesh=mesh,
        step=stored.step, labels=stored.labels,
    )  # fmt: skip


def write_run_files(config: RunConfig, prepared: Prepared) -> str:
    """Write what a run's folder says about the run, each file whole: its config, its tokenizers, and its origin.

    Returns:
        The run's id, which stays the same for as long as its folder is there.

    Raises:
        UserError: the folder cannot be written.
    """
    directory, content = config.directory, Content.of(prepared)
    origin: dict[str, Any] = {
        "id": (read_origin(directory) or {}).get("id", secrets.token_hex(4)),
        "data": content.digest,
        "versions": versions(),
    }
    texts = {f"tokenizer/{name}": text for name, text in tokenizer_files(prepared).items()}
    texts |= {_ORIGIN: json.dumps(origin, indent=2) + "\n", "config.yaml": dump(config)}
    with writing(directory):
        for name, text in texts.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
    return origin["id"]


def write_finished(directory: Path, step: int) -> None:
    """Record that all results of a run whose last step is `step` are there. Raises `UserError` if it cannot be written."""
    with writing(directory):
        write_whole(directory / _FINISHED, json.dumps({"step": step}) + "\n")


def forget_finished(directory: Path) -> None:
    """Drop the record: the run goes on. Raises `UserError` if it cannot be written."""
    with writing(directory):
        (directory / _FINISHED).unlink(missing_ok=True)


def finished_step(directory: Path) -> int | None:
    """The last step of a run whose results are all there; None if any is missing."""
    if not (directory / _FINISHED).is_file():
        return None
    try:
        step = json.loads((directory / _FINISHED).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def read_origin(directory: Path) -> dict[str, Any] | None:
    """The run's own id, a digest of its data, and versions of packages; None without a record."""
    path = directory / _ORIGIN
    if not path.is_file():
        return None
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}; delete it") from None
    if not (isinstance(origin, dict) and isinstance(origin.get("data"), str) and _are_texts(origin.get("versions"))):
        raise UserError(f"{path}: not the record of a run's data and versions; delete it")
    return origin


def config_file(directory: Path) -> Path:
    """The config of a run's folder. Raises `UserError` if there is no run."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"{directory}: no run here (it has no config.yaml)")
    return path


def read_metrics(directory: Path) -> Curves:
    """All records in a run's metrics.jsonl; empty if there are none."""
    path, curves = directory / METRICS, Curves()
    for number, record in read_records(path):
        step = record.pop("step", None) if isinstance(record, dict) else None
        if not isinstance(step, int) or not all(isinstance(value, int | float) for value in record.values()):
            raise UserError(f"{path}:{number}: not a step with numbers; delete this line")
        for name, value in record.items():
            curves.setdefault(name, {})[step] = value
    return curves


def _are_texts(value: Any) -> bool:
    """Whether a value of JSON is a mapping of texts."""
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _choose(checkpoints: StoredCheckpoints, step: str, used: tuple[str, ...]) -> int:
    """The number of a whole checkpoint: the one that is named, or the newest or best that is not damaged."""
    run, steps = checkpoints.run, checkpoints.steps
    if not steps:
        raise UserError(f"{run}: this run has no checkpoint yet")
    if step not in ("latest", "best"):
        if step not in map(str, steps):
            raise UserError(f"step: got {shown(step)}; this run has latest, best, {', '.join(map(str, steps))}")
        checkpoints.check(int(step), used)
        return int(step)
    wanted = checkpoints.best if step == "best" else None
    lines: list[str] = []
    for number in dict.fromkeys([*([] if wanted is None else [wanted]), *reversed(steps)]):
        if (found := checkpoints.damage(number, used)) is None:
            for line in lines:
                print(f"{line}; taking step {number} instead", file=sys.stderr)
            return number
        lines.append(f"{checkpoints.folder(number)}: this checkpoint is damaged: {found}")
    raise UserError(f"{'; '.join(lines)}; no other is left")
