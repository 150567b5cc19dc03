"""Fine-tuning: initialises a run with the weights of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from train.config import RunConfig, difference, fields
from train.data.prepared.store import Prepared
from train.data.tokenization.tokenizer import ByteTokenizer, Tokenizer
from train.program.program import Program
from train.program.state import TrainState
from train.remote import local_run
from train.run.run_files import load_run
from train.trained import ParameterPath, dotted, size
from transformer.errors import ConfigError, UserError
from transformer.layers.adapter import is_adapter, reset_dora_magnitudes
from transformer.models.families import ModelConfig, described_parameters

Parameters = dict[ParameterPath, nnx.Variable]

_OVER_CLASSES = (("pooled_head", "out"), ("token_head", "out"))
"""Linear layers with a column for each class."""
_SHOWN = 5
"""The most classes that a message names."""
_OFTEN_ANOTHER = tuple(
    f"model.{field}"
    for field in ("head.", "dropout:", "attention_dropout:", "max_length:", "remat:", "attention.backend:")
)
"""Settings that usually differ between fine-tuning and pretraining."""


def check_begin(config: RunConfig) -> None:
    """Raise a `UserError` if the run of `init_from` does not exist, before the data is prepared, which may need the
    vocabulary of that run."""
    if config.init_from is None or (config.directory / "checkpoints").exists():
        return
    if not local_run(config.init_from).is_dir():
        raise UserError(f"init_from: {config.init_from}: no such run; train it first, or set init_from to null")


def fresh_state(program: Program, config: RunConfig, prepared: Prepared) -> TrainState:
    """The state before the first step: random, or with the weights of `config.init_from`, which a line reports.

    Raises:
        UserError: as `begin_from`.
    """
    if config.init_from is None:
        return program.init()
    params, said = begin_from(program.init_params(), config, prepared)
    print(f"{config.name}: {said}")
    return program.init(params, donate=True)


def begin_from(fresh: nnx.State, config: RunConfig, prepared: Prepared) -> tuple[nnx.State, str]:
    """`fresh` parameters, replaced by those of the run `config.init_from` with the same path; and a line that reports it.

    They are read from its best checkpoint, or from its newest if none was evaluated.

    Raises:
        UserError: no such run, a different tokenizer, a parameter of another shape, or no parameter with the same path.
    """
    assert config.init_from is not None
    run = local_run(config.init_from)
    try:
        loaded = load_run(run, "best", like=config)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    _check_tokenizer("tokenizer", run / "tokenizer", loaded.tokenizer, prepared.tokenizer)
    if prepared.pairs:
        folder = run / "tokenizer" / "target"
        _check_tokenizer("target_tokenizer", folder, loaded.target_tokenizer, prepared.target_tokenizer)
    ours, theirs = _by_path(fresh), _by_path(loaded.params)
    theirs, of_classes = _same_classes(theirs, loaded.labels, prepared.meta.labels)
    _check_shapes(run, ours, theirs, config.model, loaded.config.model)
    taken = {path: parameter.replace(theirs[path].get_value()) for path, parameter in ours.items() if path in theirs}
    if not taken:
        raise UserError(
            f"init_from: {run}, of model.family {loaded.config.model.family!r}, has no parameter in common with this model, "
            f"of family {config.model.family!r}; name a run of a similar model"
        )
    said = f"weights from {run}, step {loaded.step}: {size(taken):,} of {size(ours):,} parameters"
    called = {path: "adapters" if is_adapter(path) else str(path[0]) for path in ours | theirs}
    for what, paths in (
        ("New, random", ours.keys() - taken.keys()),
        ("Not used", theirs.keys() - taken.keys()),
    ):
        if paths:
            said += f". {what}: {', '.join(sorted({called[path] for path in paths}))}"
    said += of_classes
    changed = difference(
        {"model": dataclasses.asdict(loaded.config.model)}, {"model": dataclasses.asdict(config.model)}
    )
    poolings = [getattr(getattr(one.model, "head", None), "pooling", None) for one in (loaded.config, config)]
    both_pool = None not in poolings
    # Two heads usually differ, but texts whose vectors are pooled in another way are other vectors.
    if changed := [
        line
        for line in changed
        if not line.startswith(_OFTEN_ANOTHER) or (both_pool and line.startswith("model.head.pooling:"))
    ]:
        said += f". Changed: {', '.join(changed)}"
    params = nnx.from_flat_state(ours | taken)
    return params if config.adapter is None else reset_dora_magnitudes(params), said


def _same_classes(theirs: Parameters, before: Sequence[str], now: Sequence[str]) -> tuple[Parameters, str]:
    """Parameters whose head has the classes, or tags, of the data in the data's order, and a note about it.

    The head of a model with other classes is not used.
    """
    heads = {path for path in theirs if path[:-1] in _OVER_CLASSES}
    if not heads or not before or not now or tuple(before) == tuple(now):
        return theirs, ""
    if sorted(before) == sorted(now):
        order = np.array([before.index(name) for name in now])
        moved = {path: theirs[path].replace(theirs[path].get_value()[..., order]) for path in heads}
        return theirs | moved, ". Classes reordered to match the data"
    if all(name == f"LABEL_{number}" for number, name in enumerate(before)):
        return theirs, ". Its classes have no names, and were matched by number"
    left = {path: value for path, value in theirs.items() if path not in heads}
    return left, f". It predicts other classes ({', '.join(before[:_SHOWN])}{', ...' if len(before) > _SHOWN else ''})"


def _by_path(params: nnx.State) -> Parameters:
    return dict(nnx.to_flat_state(params))


def _check_tokenizer(field: str, folder: Path, theirs: Tokenizer, ours: Tokenizer) -> None:
    if theirs.fingerprint() == ours.fingerprint():
        return
    names = ", ".join(f'"{name}"' for name, id in theirs.special_ids.items() if id != theirs.end_of_text)
    is_bytes = isinstance(theirs, ByteTokenizer)
    same = f"kind: bytes, special_tokens: [{names}]" if is_bytes else f"kind: file, path: {folder / 'tokenizer.json'}"
    raise UserError(f"data.{field}: does not match the tokenizer of init_from; set it to {{{same}}}")


def _check_shapes(
    run: Path,
    ours: Parameters,
    theirs: Parameters,
    model: ModelConfig,
    other: ModelConfig,
) -> None:
    """Raise a `UserError` for parameters with the same path and another shape, with the model field that causes it."""

    mine, their = _shapes(ours), _shapes(theirs)
    if not (bad := [path for path, shape in mine.items() if their.get(path, shape) != shape]):
        return
    path = bad[0]
    here, there = ({field.path: field.value for field in fields(one)} for one in (model, other))
    decides = [
        f"model.{name} to {there[name]!r} (it is {here[name]!r})"
        for name in here.keys() & there.keys() - {"family"}
        if here[name] != there[name] and _shape_with(model, name, there[name], path) == their[path]
    ]
    raise UserError(
        f"init_from: {len(bad)} parameters have a different shape in {run}, the first is {dotted(path)}: "
        f"{list(their[path])} there, {list(mine[path])} here; set {' or '.join(sorted(decides)) or 'model as in that run'}"
    )


def _shape_with(model: Any, field: str, value: Any, path: ParameterPath) -> tuple[int, ...] | None:
    """The shape of a parameter in a model with one field changed; None if there is no such model or parameter."""
    try:
        changed = _replaced(model, field.split("."), value)
    except (ConfigError, TypeError):
        return None
    return _shapes(_by_path(described_parameters(changed))).get(path)


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    """A config with the value of one nested field changed."""
    name, *rest = path
    return dataclasses.replace(config, **{name: _replaced(getattr(config, name), rest, value) if rest else value})


def _shapes(parameters: Parameters) -> dict[ParameterPath, tuple[int, ...]]:
    return {path: parameter.get_value().shape for path, parameter in parameters.items()}
