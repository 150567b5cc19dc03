"""What a config may leave out because something else in it decides: filled in before it is validated.

- A section with several kinds may be its kind alone: `head: classification`.
- The objective follows from the model's head and the labels of the data, and the head from the objective.
- `data.packing` follows from the objective.
- With `init_from`, the model and the tokenizer are those of that run, except for what the config says itself.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal

from train.config.run import RunConfig
from train.config.tags import chosen, configs_in, default_of, members, tag_of, tag_values
from train.data.prepared.prepare import DataConfig
from train.data.sources.dialogues import MARKS
from train.data.sources.records import LabelKind
from train.objectives import OBJECTIVES, Causal, MultiLabelClassification, Regression
from transformer.errors import UserError, field_types
from transformer.models.families import FAMILIES

Data = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What a config takes from the run that its weights begin from, as plain data.

    Attributes:
        folder: of that run.
        model: all fields of its model.
        objective: of its training; None for imported weights that were trained in another way.
        tokenizer, target_tokenizer: its vocabularies, as a config names them.
        head: a head of a kind that imported weights are published with, as the checkpoint's own settings have it; None for any
            other kind.
    """

    folder: str
    model: Data
    objective: Data | None = None
    tokenizer: Data | None = None
    target_tokenizer: Data | None = None
    head: Callable[[str], Data | None] = lambda kind: None


FindBase = Callable[[str, Data], Base | None]
"""The run that `init_from` names, for a config's data; None if there is none."""


def complete(data: Any, find_base: FindBase | None = None) -> Any:
    """The plain data of a config with what it leaves out filled in. What is malformed stays, for the validation to report.

    Raises:
        UserError: both `steps` and `epochs`, or as `find_base`.
    """
    if not isinstance(data, dict):
        return data
    if data.get("epochs") is not None and data.get("steps") is not None:
        raise UserError("steps: with epochs the steps follow from the data; leave out one of the two")
    given = data.get("init_from")
    base = find_base(given, data) if find_base is not None and isinstance(given, str) else None
    if base is not None and isinstance(model := data.get("model", {}), dict):
        data = data | {"model": {"family": base.model["family"]} | model}
    data = with_kinds(RunConfig, data)
    if not all(isinstance(data.get(section, {}), dict) for section in ("model", "data", "objective")):
        return data
    head = data.get("model", {}).get("head", {})
    if base is not None:
        data = _with_base(data, base)
    family = data.get("model", {}).get("family", "gpt")
    if not isinstance(family, str) or family not in FAMILIES:
        return data
    return _with_packing(_with_head(_with_objective(data, family, head), family, head, base))


def with_kinds(annotation: Any, value: Any, default: Any = None) -> Any:
    """The data of a field in which each section that is given as its kind alone has become a mapping."""
    configs = configs_in(annotation)
    if isinstance(value, str) and len(configs) > 1:
        others = [part for part in members(annotation) if part not in configs]
        is_text = str in others or any(
            typing.get_origin(one) is Literal and value in typing.get_args(one) for one in others
        )
        tag = tag_of(configs)
        return {tag: value} if not is_text and any(value in tag_values(one, tag) for one in configs) else value
    if isinstance(value, list) and typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        return [with_kinds(item, one) for one in value]
    owner = chosen(annotation, value, default) if configs and isinstance(value, dict) else None
    if owner is None:
        return value
    types = field_types(owner)
    return {
        name: with_kinds(types[name], one, default_of(owner, name)) if name in types else one
        for name, one in value.items()
    }


def _with_base(data: Data, base: Base) -> Data:
    """With the tokenizers, the model, and the objective of the run that the weights are from."""
    tokenizers = {"tokenizer": base.tokenizer, "target_tokenizer": base.target_tokenizer}
    found = {name: one for name, one in tokenizers.items() if one is not None}
    given, section = data.get("model", {}), data.get("data", {})
    named = {
        name: _merged(section[name], one)
        for name, one in found.items()
        if isinstance(section.get(name), dict) and "kind" not in section[name]
    }
    data = data | {"init_from": base.folder, "data": found | section | named, "model": _model(given, base)}
    labels = _label_kind(section)
    goes_on = _kind(given.get("head")) is None and given.get("family", base.model["family"]) == base.model["family"]
    if goes_on and base.objective is not None and "objective" not in data:
        known = OBJECTIVES.get(_kind(base.objective) or "")
        if known is not None and known.label_kind == labels:
            data["objective"] = base.objective
    return data


def _model(given: Data, base: Base) -> Data:
    """The fields of a model: those given, and otherwise those of the run that the weights are from."""
    theirs = dict(base.model)
    family = given.get("family", theirs["family"])
    if family != theirs["family"]:
        # Such as the encoder of ELECTRA as a BERT.
        own = field_types(FAMILIES[family].config) if isinstance(family, str) and family in FAMILIES else {}
        theirs = {name: one for name, one in theirs.items() if name in own and name not in ("family", "head")}
    if isinstance(head := theirs.get("head"), dict):
        # The number of classes is that of this run's data.
        theirs["head"] = {name: one for name, one in head.items() if name != "num_labels"}
    if "head" in given:
        theirs["head"] = _published(given["head"], base) or theirs.get("head", {})
    return _merged(given, theirs)


def _published(head: Any, base: Base) -> Data | None:
    kind = head.get("kind") if isinstance(head, dict) else None
    return base.head(kind) if isinstance(kind, str) else None


def _merged(given: Data, theirs: Data) -> Data:
    """`theirs` with what is given in its place; a section of another kind is taken as a whole."""
    if given.get("kind", theirs.get("kind")) != theirs.get("kind"):
        return given
    return theirs | {
        name: _merged(one, theirs[name]) if isinstance(one, dict) and isinstance(theirs.get(name), dict) else one
        for name, one in given.items()
    }


def _with_objective(data: Data, family: str, given: Any) -> Data:
    """With the first objective that trains this head on these labels, unless one is named or it is the default.

    Where the config names no head, its labels alone decide.
    """
    labels = _label_kind(data.get("data", {}))
    if "objective" in data or (family in Causal.families and labels is None):
        return data
    kind, any_head = _kind_of_head(data, family), labels is not None and _kind(given) is None
    suited = {
        name: one.label_kind
        for name, one in OBJECTIVES.items()
        if family in one.families
        and (any_head or not one.heads or kind in one.heads)
        and one.label_kind in (labels, None)
    }
    # What is for these labels comes before what takes any text.
    found = next((name for name, wanted in suited.items() if wanted == labels), next(iter(suited), None))
    return data if found is None else data | {"objective": {"kind": found}}


def _with_head(data: Data, family: str, given: Any, base: Base | None) -> Data:
    """With a head that the objective trains, unless the config names one: `given` is what it says of it."""
    model, objective = data.get("model", {}), OBJECTIVES.get(_kind(data.get("objective", {})) or "")
    if objective is None or not isinstance(given, dict) or (kind := _kind_of_head(data, family)) is None:
        return data
    head = own = {"kind": kind, **model.get("head", {})}
    if objective.heads and kind not in objective.heads and _kind(given) is None:
        head = (base and base.head(objective.heads[0])) or {"kind": objective.heads[0]}
        head = head | given
    if objective is Regression and head["kind"] == "classification":
        head = {"num_labels": 1} | head
    if objective is MultiLabelClassification and head["kind"] == "classification":
        head = {"multi_label": True} | head
    return data if head == own else data | {"model": model | {"head": head}}


def _with_packing(data: Data) -> Data:
    """With a packing that the objective supports, unless one is named."""
    section, objective = data.get("data", {}), OBJECTIVES.get(_kind(data.get("objective", {})) or "")
    if objective is None or "packing" in section or default_of(DataConfig, "packing") in objective.packings:
        return data
    return data | {"data": section | {"packing": objective.packings[0]}}


def _kind(section: Any) -> str | None:
    """The kind that a section names."""
    kind = section.get("kind") if isinstance(section, dict) else None
    return kind if isinstance(kind, str) else None


def _kind_of_head(data: Data, family: str) -> str | None:
    """The kind of the model's head, given or by default; None for a family without heads."""
    usual = getattr(FAMILIES[family].config, "head", None)
    return None if usual is None else _kind(data.get("model", {}).get("head")) or usual.kind


def _label_kind(section: Data) -> LabelKind | None:
    """What the labels of the first source are; None if it has none."""
    sources = section.get("sources")
    first = sources[0] if isinstance(sources, list) and sources and isinstance(sources[0], dict) else {}
    if (holds := first.get("holds", "texts")) != "texts":
        return next((kind for name, kind in MARKS.items() if name == holds), None)
    return first.get("label_kind", "class") if first.get("label_field") else None
