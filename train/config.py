"""A run's config: one YAML file, read strictly, overridden by typed flags, stored with everything that it makes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.data.objective_config import ObjectiveConfig
from train.data.prepare import DataConfig
from train.mesh import MeshConfig
from train.objective import LossConfig
from train.optimizer import OptimizerConfig
from train.sections import CheckpointConfig, EvaluationConfig, LogConfig, SampleConfig
from train.selection import METRICS
from transformer.errors import ConfigError, UserError, nearest, require
from transformer.layers.adapter import AdapterConfig
from transformer.models.bert import BertConfig
from transformer.models.families import FAMILIES, ModelConfig
from transformer.models.gpt import GPTConfig

_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
"""YAML 1.2's floats with an exponent; PyYAML's own rule takes 1e-3 for a text."""

HEADS = {
    "masked": "masked",
    "next_sentence": "pretraining",
    "sentence_order": "pretraining",
    "replaced_tokens": "replaced",
    "classification": "classification",
    "regression": "classification",
    "token_classification": "tokens",
    "answer": "answer",
    "choice": "choice",
    "contrastive": "embedding",
}
"""The head of an encoder that each objective trains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes."""

    name: str
    """Name of the run."""
    run_dir: str | None = None
    """Folder of the run; null: runs/NAME."""
    init_from: str | None = None
    """Folder of a run whose weights training begins with; what has another place or is not there begins afresh. null: all
    does."""
    seed: int = 0
    """Decides initial weights, dropout and the order of the data."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences in a step, over all devices and microbatches."""
    length: int | None = None
    """Tokens in a training sequence; null: model.max_length."""
    microbatches: int = 1
    """Parts a step's batch is cut into, one after the other (gradient accumulation)."""
    max_skipped: int = 10
    """Stop after this many updates in a row were skipped for a loss or gradient that is not finite."""
    model: ModelConfig = GPTConfig()
    """The network; its `family` decides which fields there are."""
    adapter: AdapterConfig | None = None
    """Low-rank adapters, which are trained in the place of the network's own parameters; null: none."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is predicted from what."""
    data: DataConfig = DataConfig()
    """The text, and how it becomes sequences of tokens."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become updates."""
    loss: LossConfig = LossConfig()
    """What is minimised."""
    mesh: MeshConfig = MeshConfig()
    """How the run is spread over devices."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Scores on held-out text."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """States on disk."""
    log: LogConfig = LogConfig()
    """Records of metrics."""
    sample: SampleConfig = SampleConfig()
    """Texts to look at."""

    def __post_init__(self) -> None:
        require(self, "name", bool(self.name) and "/" not in self.name, "allowed: any text without a slash")
        for field in ("steps", "batch_size", "microbatches", "max_skipped"):
            require(self, field, getattr(self, field) >= 1, "allowed: 1 or more")
        require(self, "seed", 0 <= self.seed < 2**32, "allowed: 0 to 2**32 - 1")
        suited = FAMILIES[self.model.family].objectives
        kind = self.objective.kind
        if kind not in suited and kind != "none":
            allowed = f"a model of family {self.model.family!r} goes with {', '.join(suited)}"
            raise ConfigError(ObjectiveConfig, "kind", kind, allowed)
        decay = self.optimizer.layer_decay
        require(
            self.optimizer, "layer_decay", decay is None or self.model.family in ("gpt", "bert"),
            f"a model of family {self.model.family!r} is no single stack of blocks; allowed with gpt and bert, else null",
        )  # fmt: skip
        holds = getattr(self.model, "num_experts", 0) > 0 or self.mesh.expert in (None, 1)
        require(self.mesh, "expert", holds, "the model has no experts (model.num_experts); allowed: 1 or null")
        if isinstance(self.model, BertConfig):
            require(
                self, "mesh", kind != "contrastive" or (self.mesh.schedule != "1f1b" and self.mesh.strategy != "pmap"),
                "a contrastive batch is seen as a whole; allowed: any strategy but pmap, and schedule gpipe",
            )  # fmt: skip
            require(
                self, "mesh", kind != "choice" or self.mesh.schedule != "1f1b",
                "a choice is made among rows that are computed together; allowed: schedule gpipe",
            )  # fmt: skip
            require(self.model, "num_labels", kind != "regression" or self.model.num_labels == 1, "a number needs 1")
            head = HEADS.get(kind, self.model.head)
            if self.model.head != head:
                raise ConfigError(BertConfig, "head", self.model.head, f"objective {kind} needs {head!r}")
        known = ("loss", *METRICS.get(kind, ()))
        require(self.checkpoint, "best", self.checkpoint.best in known, f"objective {kind} has {', '.join(known)}")
        weighted = kind in ("classification", "token_classification") or self.loss.class_weights is None
        require(self.loss, "class_weights", weighted, f"objective {kind} has no classes to weigh; allowed: null")
        smooths = kind not in ("regression", "answer") or not self.loss.label_smoothing
        require(self.loss, "label_smoothing", smooths, f"not for objective {kind}; allowed: 0")
        longest = self.model.max_length
        require(
            self, "length", self.length is None or 1 <= self.length <= longest,
            f"allowed: 1 to model.max_length ({longest}), or null",
        )  # fmt: skip
        require(
            self,
            "microbatches",
            self.batch_size % self.microbatches == 0,
            f"it must divide batch_size ({self.batch_size})",
        )

    @property
    def sequence_length(self) -> int:
        """`length` with its default filled in."""
        return self.model.max_length if self.length is None else self.length

    @property
    def tokens_per_example(self) -> int:
        """Of all rows that the model reads for one, padding included."""
        return self.objective.rows_per_example * self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Of all rows of a batch, padding included."""
        return self.batch_size * self.tokens_per_example

    @property
    def directory(self) -> Path:
        """`run_dir` with its default filled in."""
        return Path("runs", self.name) if self.run_dir is None else Path(self.run_dir)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply command-line overrides such as `--model.num-layers 8`.

    Raises:
        UserError: no such file, or no YAML.
        ConfigError: an unknown key, a wrong type, a value out of range, or values that contradict each other.
    """
    config = override(parse(_read_yaml(Path(path)), str(path)), overrides)
    if config.objective.kind == "none":
        raise UserError(
            f"{path}: objective.kind: got 'none'; this is the config of imported weights: name their folder in init_from of "
            "a config with an objective"
        )
    return config


def parse(data: Any, source: str) -> RunConfig:
    """A config from plain data; `source` names it in errors."""
    import pydantic

    try:
        data = _with_family(data, source)
        _check_keys(data, RunConfig, "", source)
        # As JSON, a list may become a tuple, while every scalar must still have the field's own type.
        return _adapter().validate_json(json.dumps(data), strict=True)
    except TypeError as error:
        raise UserError(f"{source}: a value that is no text, number, list or mapping: {error}") from None
    except pydantic.ValidationError as error:
        first, where = _first_error(error, data)
        if first["type"] == "missing":
            raise UserError(f"{source}: {where} is missing, and has no default") from None
        raise UserError(f"{source}: {where}: got {first['input']!r}; {first['msg']}") from None
    except ConfigError as error:
        raise UserError(f"{source}: {field_path(error)}") from None


def override(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """`config` with `--section.field value` pairs applied.

    Raises:
        UserError: a flag that names no field, or a value that does not fit it.
    """
    if not arguments:
        return config
    import contextlib
    import io

    import tyro

    output = io.StringIO()
    try:
        if config.adapter is None and any(word.startswith("--adapter.") for word in arguments):
            # A section that is not there has no fields yet.
            config = dataclasses.replace(config, adapter=AdapterConfig())
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            # The words of YAML; switches take a value like every other field.
            words = [{"null": "None", "true": "True", "false": "False"}.get(word, word) for word in arguments]
            return tyro.cli(
                RunConfig,
                default=config,
                args=words,
                prog="manyheads ... CONFIG",
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stop:
        if not stop.code:
            print(output.getvalue())
            raise
        # tyro draws a box; a mistake here is one line like every other.
        lines = [line.strip(" │╭╰╮╯─") for line in output.getvalue().splitlines()]
        helpless = itertools.takewhile(
            lambda line: not line.startswith(("Argument helptext", "For full helptext")), lines[1:]
        )
        message = " ".join(line for line in helpless if line and not line.startswith("---"))
        raise UserError(f"command line: {message}") from None
    except ConfigError as error:
        raise UserError(f"command line: {field_path(error)}") from None


def dump(config: RunConfig) -> str:
    """The whole config as YAML, defaults included; `load` reads it back to an equal one."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes a text that `load` would take for a number."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    return yaml.dump(to_data(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def to_data(config: RunConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`field: old → new` for each field in which two configs, as plain data, differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{path}.")
        elif before != after:
            lines.append(f"{path}: {before!r} → {after!r}")
    return lines


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config, for people to read."""

    path: str
    value: Any
    default: Any
    meaning: str


def fields(config: Any, prefix: str = "") -> Iterator[Field]:
    """Every field below a config, sections opened."""
    meanings = _meanings(type(config))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{path}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from fields(item, f"{path}.{index}.")
        else:
            yield Field(path, value, field.default, meanings.get(field.name, ""))


def field_path(error: ConfigError) -> str:
    """The error's message with the full path of its field."""

    def search(config_type: type, prefix: str) -> Iterator[str]:
        if config_type is error.owner:
            yield prefix
        for name, kind in typing.get_type_hints(config_type).items():
            for inner in _dataclasses_in(kind):
                yield from search(inner, f"{prefix}{name}.")

    return next(search(RunConfig, ""), "") + str(error)


@functools.cache
def _adapter() -> Any:
    import pydantic

    return pydantic.TypeAdapter(RunConfig)


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's floats (1e-3 is a number), and no key twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            self.flatten_mapping(node)
            keys = [self.construct_object(key) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(f"{path}: line {node.start_mark.line + 1}: the key {key!r} stands twice")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file." + _similar_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None


def _similar_file(path: Path) -> str:
    folder = path.parent
    return nearest(path.name, (other.name for other in folder.glob("*.yaml"))) if folder.is_dir() else ""


def _with_family(data: Any, source: str) -> Any:
    """The same with the model's family written out, on which its fields depend."""
    model = data.get("model", {}) if isinstance(data, dict) else None
    if not isinstance(model, dict):
        return data
    family = model.get("family", GPTConfig.family)
    if family not in FAMILIES:
        near = nearest(family, FAMILIES) if isinstance(family, str) else ""
        raise UserError(f"{source}: model.family: got {family!r}; allowed: {', '.join(FAMILIES)}.{near}")
    return data | {"model": model | {"family": family}}


def _first_error(error: Any, data: Any) -> tuple[dict[str, Any], str]:
    """The first thing wrong, and its field; of the models that the config might be, the one whose family it names."""
    family = FAMILIES[data["model"]["family"]].config.__name__ if isinstance(data.get("model"), dict) else ""
    others = {kind.config.__name__ for kind in FAMILIES.values()} - {family}
    for found in error.errors():
        path = [str(part) for part in found["loc"]]
        if path[:1] == ["model"] and len(path) > 1 and path[1] in others:
            continue
        return found, ".".join(part for index, part in enumerate(path) if (index, part) != (1, family))
    raise AssertionError


def _check_keys(data: Any, config_type: type, prefix: str, source: str) -> None:
    """Raise a `UserError` for the first key below `data` that the config does not have."""
    if not isinstance(data, dict):
        where = prefix.rstrip(".") or "the file"
        raise UserError(f"{source}: {where}: got {data!r}; expected a mapping of field: value")
    hints = typing.get_type_hints(config_type)
    for key, value in data.items():
        if key not in hints:
            raise UserError(f"{source}: {prefix}{key}: no such field.{nearest(str(key), hints)}")
        optional = type(None) in typing.get_args(hints[key])
        for inner in _dataclasses_in(hints[key]) if value is not None or not optional else ():
            if isinstance(value, dict) and getattr(inner, "family", None) not in (None, value.get("family")):
                continue
            if isinstance(value, list):
                for index, item in enumerate(value):
                    _check_keys(item, inner, f"{prefix}{key}.{index}.", source)
            else:
                _check_keys(value, inner, f"{prefix}{key}.", source)


def _dataclasses_in(kind: Any) -> list[type]:
    """The config classes inside a type such as `tuple[SourceConfig, ...]`."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return [kind]
    if isinstance(kind, types.GenericAlias | types.UnionType) or typing.get_origin(kind):
        return [inner for argument in typing.get_args(kind) for inner in _dataclasses_in(argument)]
    return []


def _meanings(config_type: type) -> dict[str, str]:
    """Field name → the docstring under it."""
    found = {}
    for owner in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found
