"""Fine-tuning: initialises a run with the weights of another."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.config import RunConfig, difference, fields
from train.data.prepared.store import Prepared
from train.data.tokenization.tokenizer import Tokenizer
from train.data.tokenization.vocabulary import as_setting
from train.program.program import Program
from train.program.state import TrainState
from train.remote import local_run
from train.run.run_files import StoredRun, load_run, stored_run
from train.trained import ParameterPath, dotted, size
from transformer.errors import ConfigError, UserError
from transformer.layers.adapter import is_adapter, reset_dora_magnitudes
from transformer.models.families import ModelConfig, described_parameters

Parameters = dict[ParameterPath, nnx.Variable]

_VOCABULARIES = ("vocab_size", "source_vocab_size")
"""Fields of models that may be larger than in the run they begin from."""
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
    if not _begins(config):
        return
    if not local_run(str(config.init_from)).is_dir():
        raise UserError(f"init_from: {config.init_from}: no such run; train it first, or set init_from to null")


def check_weights(config: RunConfig, prepared: Prepared) -> None:
    """Raise a `UserError` unless the weights of `init_from` fit, before they are read and anything is compiled."""
    if not _begins(config):
        return
    run = local_run(str(config.init_from))
    with _of_init_from():
        stored = stored_run(run)
    _check_fits(run, stored, _by_path(described_parameters(config.model)), config, prepared)


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
    with _of_init_from():
        loaded = load_run(run, "best", like=config)
    ours, theirs = _by_path(fresh), _by_path(loaded.params)
    _check_fits(run, loaded, ours, config, prepared)
    theirs, of_classes = _same_classes(theirs, loaded.labels, prepared.meta.labels)
    theirs |= {
        path: _grown(theirs[path], ours[path])
        for path in _of_more_tokens(ours, theirs, config.model, loaded.config.model)
    }
    taken = {path: parameter.replace(theirs[path].get_value()) for path, parameter in ours.items() if path in theirs}
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


def _of_more_tokens(ours: Parameters, theirs: Parameters, model: ModelConfig, other: ModelConfig) -> set[ParameterPath]:
    """The parameters that have another shape only because the vocabulary is larger than theirs."""
    mine, their = _shapes(ours), _shapes(theirs)
    found = set()
    for field in _VOCABULARIES:
        here, there = getattr(model, field, 0), getattr(other, field, 0)
        if there and here > there:
            another = [path for path in mine.keys() & their.keys() if mine[path] != their[path]]
            found |= {path for path in another if _shape_with(model, field, there, path) == their[path]}
    return found


def _grown(theirs: nnx.Variable, ours: nnx.Variable) -> nnx.Variable:
    """A parameter for more tokens: each new token begins as the mean of the others, whose logits it cannot then exceed.

    After Hewitt, Initializing New Word Embeddings for Pretrained Language Models (2021).
    """
    value, wanted = theirs.get_value(), ours.get_value()
    (axis,) = (axis for axis in range(value.ndim) if value.shape[axis] != wanted.shape[axis])

    def grow(value: jax.Array) -> jax.Array:
        mean = value.mean(axis, keepdims=True, dtype=jnp.float32).astype(value.dtype)
        new = jnp.repeat(mean, wanted.shape[axis] - value.shape[axis], axis)
        return jnp.concatenate([value, new], axis)

    return theirs.replace(jax.jit(grow, out_shardings=wanted.sharding)(value))


def _begins(config: RunConfig) -> bool:
    """Whether the run will begin from other weights: none of its own checkpoints is there."""
    return config.init_from is not None and not (config.directory / "checkpoints").exists()


@contextlib.contextmanager
def _of_init_from() -> Iterator[None]:
    """Errors about the run that `init_from` names say so."""
    try:
        yield
    except UserError as error:
        raise UserError(f"init_from: {error}") from None


def _check_fits(run: Path, stored: StoredRun, ours: Parameters, config: RunConfig, prepared: Prepared) -> None:
    """Raise a `UserError` for another tokenizer, a parameter of another shape, or no parameter with the same path."""
    _check_tokenizer("tokenizer", run / "tokenizer", stored.tokenizer, prepared.tokenizer)
    if prepared.pairs:
        folder = run / "tokenizer" / "target"
        _check_tokenizer("target_tokenizer", folder, stored.target_tokenizer, prepared.target_tokenizer)
    theirs = _by_path(described_parameters(stored.config.model))
    if _relation(stored.labels, prepared.meta.labels) == "other":
        theirs = _without_classes(theirs)
    _check_shapes(run, ours, theirs, config.model, stored.config.model)
    if not ours.keys() & theirs.keys():
        raise UserError(
            f"init_from: {run}, of model.family {stored.config.model.family!r}, has no parameter in common with this model, "
            f"of family {config.model.family!r}; name a run of a similar model"
        )


def _relation(before: Sequence[str], now: Sequence[str]) -> Literal["same", "reordered", "by number", "other"]:
    """How the classes, or tags, of a head relate to those of the data."""
    if bool(before) != bool(now):
        # One of them is a number.
        return "other"
    if tuple(before) == tuple(now):
        return "same"
    if sorted(before) == sorted(now):
        return "reordered"
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(before))
    return "by number" if unnamed and len(before) == len(now) else "other"


def _same_classes(theirs: Parameters, before: Sequence[str], now: Sequence[str]) -> tuple[Parameters, str]:
    """Parameters whose head has the classes, or tags, of the data in the data's order, and a note about it.

    The head of a model with other classes is not used.
    """
    heads = {path for path in theirs if path[:-1] in _OVER_CLASSES}
    relation = _relation(before, now) if heads else "same"
    if relation == "same":
        return theirs, ""
    if relation == "reordered":
        order = np.array([before.index(name) for name in now])
        moved = {path: theirs[path].replace(theirs[path].get_value()[..., order]) for path in heads}
        return theirs | moved, ". Classes reordered to match the data"
    if relation == "by number":
        return theirs, ". Its classes have no names, and were matched by number"
    names = (
        f"other classes ({', '.join(before[:_SHOWN])}{', ...' if len(before) > _SHOWN else ''})"
        if before
        else "a number"
    )
    return _without_classes(theirs), f". It predicts {names}"


def _without_classes(theirs: Parameters) -> Parameters:
    return {path: value for path, value in theirs.items() if path[:-1] not in _OVER_CLASSES}


def _by_path(params: nnx.State) -> Parameters:
    return dict(nnx.to_flat_state(params))


def _check_tokenizer(field: str, folder: Path, theirs: Tokenizer, ours: Tokenizer) -> None:
    if theirs.fingerprint() == ours.fingerprint():
        return
    same = ", ".join(f"{name}: {_in_yaml(value)}" for name, value in as_setting(theirs, folder).items())
    raise UserError(f"data.{field}: does not match the tokenizer of init_from; leave it out, or set it to {{{same}}}")


def _in_yaml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _check_shapes(
    run: Path,
    ours: Parameters,
    theirs: Parameters,
    model: ModelConfig,
    other: ModelConfig,
) -> None:
    """Raise a `UserError` for parameters with the same path and another shape, with the model field that causes it."""

    mine, their = _shapes(ours), _shapes(theirs)
    grows = _of_more_tokens(ours, theirs, model, other)
    if not (bad := [path for path, shape in mine.items() if their.get(path, shape) != shape and path not in grows]):
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
