"""The config of a fine-tuning, from the weights and the data: what is trained, how long its rows are, and at which rate."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.config import RunConfig, overrides, parse
from train.config.complete import Base
from train.data.prepared.prepare import DataConfig, prepare
from train.data.prepared.store import Prepared
from train.data.sources.dialogues import MARKS, Holds
from train.data.sources.file_formats import format_of
from train.data.sources.readers import FOLDER
from train.data.sources.source import documents, source_files
from train.data.sources.source_config import FilesSource
from train.finetune.base import find_base
from train.huggingface.source import name_of
from train.objectives import (
    OBJECTIVES,
    Causal,
    Chat,
    Classification,
    Contrastive,
    Masked,
    Objective,
    Preference,
    Seq2Seq,
    Task,
)
from train.objectives import TokenClassification as Tags
from train.run.begin import batches_of, check_data, with_data
from transformer.errors import UserError, nearest, shown

Data = dict[str, Any]

_FEW, _MANY = 200, 1000
"""Below and above so many examples a batch is smaller and larger."""
_WIDE = 768
"""Encoders from this width on take smaller steps."""
_LONGEST = 1024
_MULTIPLE = 8
_COVERED = 0.99
"""The part of the documents that a row has to hold whole."""
_SURE, _MOST_HELD_OUT = 300, 0.2
"""Held-out documents from which on an accuracy is known within a few points, and the largest part to hold out for that."""
_SPECIAL = 3
"""Tokens that are put around two texts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a user says of a fine-tuning."""

    source: str
    """A run, a folder with a Hugging Face checkpoint, or its name on the hub."""
    data: str
    """A file, or a glob."""
    validation: str | None = None
    """Held-out documents; None: a part of `data`."""
    label: str | None = None
    text: str | None = None
    second: str | None = None
    """Fields of a record."""
    task: str | None = None
    """The kind of an objective; None: the one that the model and the data are for."""
    epochs: float = 3.0
    name: str | None = None
    lora: int | None = None
    """Rank of adapters; None: all parameters are trained."""
    flags: Sequence[str] = ()
    """Fields of the config, as on the command line."""

    @property
    def run_name(self) -> str:
        """The name of the run: that of the model and of the data."""
        if self.name is not None:
            return self.name
        parts = [part for part in Path(self.data).parts if not any(letter in part for letter in "*?[/")]
        data = Path(parts[-1] if parts else "data").name.split(".")[0]
        return f"{name_of(self.source)}-{data}"


def propose(request: Request) -> tuple[Data, RunConfig]:
    """The plain data of a config with only what it has to say, and the config. The data is prepared on the way.

    Raises:
        UserError: no such model or data, or data that do not fit the task.
    """
    base = find_base(request.source, {})
    if base is None:
        raise UserError(
            f"{request.source}: neither a run, nor a folder with a Hugging Face checkpoint, nor its name on the hub"
        )
    objective = _objective(request, base)
    data: Data = {"name": request.run_name, "init_from": base.folder, "epochs": request.epochs}
    if any(flag.partition("=")[0] == "--steps" for flag in request.flags):
        del data["epochs"]
    settings = {"too_long": "truncate"} if "too_long" in objective.__dataclass_fields__ else {}
    data["objective"] = {"kind": objective.kind_name(), **settings}
    data["data"] = {"sources": [_source(request, request.data, objective)]}
    if request.validation is not None:
        data["data"]["validation"] = [_source(request, request.validation, objective)]
    if request.lora is not None:
        data["adapter"] = {"rank": request.lora}
    draft = _parsed(data, request, base)
    if (fraction := _held_out(draft)) is not None:
        data["data"]["validation_fraction"] = fraction
        draft = _parsed(data, request, base)
    prepared = prepare(draft.data)
    data |= {"length": _length(draft, prepared), "batch_size": _batch_size(prepared)}
    draft = with_data(_parsed(data, request, base), prepared)
    check_data(draft, prepared)
    each = max(1, math.ceil(batches_of(draft, prepared).examples_per_epoch / draft.batch_size))
    data |= _schedule(draft, each, base)
    config = _parsed(data, request, base)
    return overrides.apply(RunConfig, copy.deepcopy(data), request.flags)[0], config


def _parsed(data: Data, request: Request, base: Base) -> RunConfig:
    return parse(copy.deepcopy(data), "finetune", request.flags, find_base=lambda given, data: base)


def _objective(request: Request, base: Base) -> type[Objective]:
    family = base.model["family"]
    if request.task is not None:
        suited = {name: one for name, one in OBJECTIVES.items() if family in one.families and name != "none"}
        if request.task not in suited:
            known = nearest(request.task, suited)
            raise UserError(
                f"--task: got {shown(request.task)}; a model of family {family!r} has {', '.join(suited)}.{known}"
            )
        return suited[request.task]
    if family not in Task.families:
        if request.label is not None:
            raise UserError(
                f"--label: a model of family {family!r} predicts no labels; name an encoder, or leave it out"
            )
        if family not in Causal.families:
            return Seq2Seq
        by_records: dict[Holds, type[Objective]] = {"dialogues": Chat, "preferences": Preference, "texts": Causal}
        return by_records[_held_by(request.data)]
    if _labels_of(request) is not None:
        return Tags if _format(request.data) == "conll" else Classification
    return Contrastive if request.second is not None else Masked


def _held_by(path: str) -> Holds:
    """What the first record of a file is: a dialogue, a question with two answers, or a text."""
    holding: tuple[Holds, ...] = tuple(MARKS) if _format(path) in ("json", "jsonl", "parquet") else ()
    for holds in holding:
        with contextlib.suppress(UserError):
            next(documents(FilesSource(path=path, holds=holds)), None)
            return holds
    return "texts"


def _labels_of(request: Request) -> str | None:
    """The field of the labels: the one named, or the one that the files have anyway."""
    if request.label is not None or (request.task is not None and OBJECTIVES[request.task].label_kind is None):
        return request.label
    form = _format(request.data)
    if form == "conll":
        return "tags"
    if form == "text":
        folders = {Path(name).parent for name, _ in source_files(FilesSource(path=request.data))}
        return FOLDER if len(folders) > 1 else None
    return None


def _format(path: str) -> str:
    return format_of(Path(path))


def _source(request: Request, path: str, objective: type[Objective]) -> Data:
    source: Data = {"kind": "files", "path": path}
    is_conll = _format(path) == "conll"
    if (text := request.text or ("words" if is_conll else None)) is not None:
        source["text_field"] = text
    if request.second is not None:
        source["target_field"] = request.second
    if (holds := next((name for name, kind in MARKS.items() if kind == objective.label_kind), None)) is not None:
        source["holds"] = holds
    elif objective.label_kind is not None:
        if (label := _labels_of(request)) is None:
            raise UserError(
                f"--label: {objective.kind_name()} needs labels; name the field, or the column, that holds them"
            )
        source |= {"label_field": label} | (
            {} if objective.label_kind == "class" else {"label_kind": objective.label_kind}
        )
    return source


def _held_out(config: RunConfig) -> float | None:
    """The fraction to hold out so that scores mean something; None for the usual one."""
    usual = DataConfig().validation_fraction
    if config.data.validation or config.data.validation_fraction != usual or not isinstance(config.objective, Task):
        return None
    enough = math.ceil(_SURE / usual)
    count = sum(1 for _ in itertools.islice(documents(config.data.sources[0]), enough))
    return None if count == enough else round(min(_MOST_HELD_OUT, _SURE / max(count, 1)), 2)


def _length(config: RunConfig, prepared: Prepared) -> int:
    """Positions of a row: for documents one by one, enough for nearly all of them."""
    most = min(config.model.max_length, _LONGEST)
    if config.objective.packings != ("documents",):
        return most
    sides = [
        np.diff(array.offsets) if array.target is None else np.diff(array.offsets) + np.diff(array.target.offsets)
        for array in prepared.train
        if array.target is None or array.target.documents == array.documents
    ]
    if not sides:
        return most
    needed = float(np.quantile(np.concatenate(sides), _COVERED)) + _SPECIAL
    return min(most, _MULTIPLE * max(2, math.ceil(needed / _MULTIPLE)))


def _batch_size(prepared: Prepared) -> int:
    documents = sum(array.documents for array in prepared.train)
    return 8 if documents < _FEW else 16 if documents < _MANY else 32


def _schedule(config: RunConfig, each: int, base: Base) -> Data:
    """The optimiser, and evaluations after each epoch of `each` steps."""
    rate = 5e-5 if base.model["embed_dim"] >= _WIDE else 1e-4
    if config.adapter is not None:
        rate = 1e-3 if isinstance(config.objective, Task) else 2e-4
    best = next(iter(config.objective.metrics), "loss")
    return {
        "optimizer": {
            "learning_rate": rate, "schedule": "linear", "final_fraction": 0.0, "warmup_steps": config.steps // 10,
            "weight_decay": 0.01, "b2": 0.999,
        },
        "evaluation": {"every": each, "batches": None},
        "checkpoint": {"every": each, "best": best},
    }  # fmt: skip
