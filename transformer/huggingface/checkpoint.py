"""Hugging Face checkpoints: a folder with config.json and safetensors, read into our parameters and written from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import UserError, nearest
from transformer.huggingface import (
    albert,
    deberta,
    decoders,
    encoder_decoders,
    encoders,
    gemma,
    llama,
    modernbert,
    nomic_bert,
    phi3,
)
from transformer.huggingface.architecture import OTHER_MODEL, Architecture
from transformer.huggingface.fields import UNTIED
from transformer.huggingface.mapping import Tables, check, described_theirs, to_ours, to_theirs
from transformer.huggingface.tensors import open_folder, write_folder
from transformer.models.families import ModelConfig, described_parameters
from transformer.paths import check_file

ARCHITECTURES: dict[str, Architecture] = {
    one.model_type: one
    for one in (
        encoders.BERT, encoders.ROBERTA, encoders.XLM_ROBERTA, encoders.DISTILBERT, encoders.ELECTRA, encoders.MPNET,
        albert.ALBERT, deberta.DEBERTA_V2, modernbert.MODERNBERT, nomic_bert.NOMIC_BERT,
        decoders.GPT2, decoders.GPT_NEOX, llama.LLAMA, llama.MISTRAL,
        llama.QWEN2, llama.QWEN3, llama.MIXTRAL, llama.QWEN3_MOE, phi3.PHI3, gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3,
        encoder_decoders.T5,
        encoder_decoders.MT5, encoder_decoders.MARIAN,
    )
}  # fmt: skip
"""By their model_type."""
FILE_LIMIT = 5_000_000_000
"""Maximum bytes of tensors in a file, as in transformers."""
_WRAPPERS, _BODY = ("_orig_mod.", "module."), "model."
"""What torch.compile, its data parallelism, and classes that hold a model put before the names of tensors."""
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names in BERT's first checkpoints, and their present names."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder's config, and its tensors, which are read on demand.

    Attributes:
        name: the class of transformers that it is read as.
        data: config.json.
        notes: differences between the model there and here, for the user.
    """

    folder: Path
    architecture: Architecture
    name: str
    config: ModelConfig
    data: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    tables: Tables
    notes: Sequence[str]

    def params(self, described: nnx.State) -> nnx.State:
        """The parameters, laid out as `described` says; each device's part is read from the files separately.

        Raises:
            UserError: tensors with numbers that are not finite.
        """
        flat = dict(nnx.to_flat_state(described))
        found = to_ours(self.tables, self.tensors, {path: leaf.get_value() for path, leaf in flat.items()})
        bad = [".".join(map(str, path)) for path, array in found.items() if not bool(jnp.isfinite(array).all())]
        if bad:
            raise UserError(f"{self.folder}: numbers that are not finite in {', '.join(bad)}")
        return nnx.from_flat_state({path: leaf.replace(found[path]) for path, leaf in flat.items()})


def read(folder: Path, *, head: str | None = None) -> Checkpoint:
    """Open a checkpoint and check everything except the numbers themselves.

    Args:
        head: read it with this head (of an encoder); by default that of its own class, or a larger one that it has completely.

    Raises:
        UserError: no such folder or file, an architecture or a setting that is not supported, or tensors that do not agree
            with config.json.
    """
    data = read_config(folder)
    architecture = _architecture(data, folder)
    tensors, wrapped = _unwrapped(architecture, open_folder(folder))
    tensors = _full_names(architecture, tensors)
    source = str(folder / "config.json")
    if (output := tensors.get(architecture.output)) is not None:
        data[UNTIED] = not np.array_equal(output, tensors.get(architecture.tied_to, output))
    candidates = list(_candidates(architecture, data, head, source))
    last: UserError | None = None
    for name in candidates:
        try:
            config, notes = architecture.config(data, name, source)
            tables = architecture.tables(config)
            left = check(tables, tensors, _described(config), str(folder))
        except UserError as error:
            last = error
            continue
        heads = sorted({part.rpartition(".")[0] for part in left if not part.endswith("_ids")})
        if heads:
            notes = [*notes, f"left out, which {name} does not use: {', '.join(heads)}"]
        if wrapped:
            notes = [*notes, f"the names of all tensors begin with {wrapped}, which was taken off"]
        return Checkpoint(folder, architecture, name, config, data, tensors, tables, notes)
    assert last is not None
    raise last


def published_head(data: Mapping[str, Any], kind: str) -> Any:
    """The config of a head of one kind with the settings of a config.json; None for an architecture that has no such head.

    Raises:
        UserError: a setting that is not supported.
    """
    architecture = ARCHITECTURES[data["model_type"]]
    name = next((name for name, ours in architecture.classes.items() if ours == kind), None)
    return None if name is None else getattr(architecture.config(data, name, "config.json")[0], "head", None)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises `UserError` if there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: no config.json in this folder, so it is not a Hugging Face checkpoint")
    return read_mapping(path)


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file of fields. Raises `UserError` if it is not one."""
    check_file(path)
    try:
        data = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a mapping of fields")
    return data


def write(
    folder: Path, config: ModelConfig, params: nnx.State, *, model_type: str | None = None, dtype: Any = np.float32,
    extra: Mapping[str, Any] | None = None, limit: int = FILE_LIMIT,
) -> tuple[str, str]:  # fmt: skip
    """Write config.json and safetensors into a folder; returns the model_type and the class that were written.

    Args:
        model_type: of `ARCHITECTURES`; by default the first that the model can be written as.
        dtype: of the tensors.
        extra: additional fields of config.json.
        limit: maximum bytes of tensors in one file.

    Raises:
        UserError: the architecture does not exist, or cannot represent the model.
        OSError: any error while writing.
    """
    architecture = architecture_of(config, model_type)
    name = architecture.class_of(config)
    assert name is not None
    tables = architecture.named(config, name)
    flat = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    data = {
        "architectures": [name],
        "model_type": architecture.model_type,
        **architecture.write(config),
        "dtype": np.dtype(dtype).name,
        **(extra or {}),
    }
    # The fields in `extra` may contradict the architecture.
    architecture.config(data, name, f"model_type {architecture.model_type}")
    write_folder(folder, described_theirs(tables, flat, dtype), to_theirs(tables, flat, dtype), limit)
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    return architecture.model_type, name


def architecture_of(config: ModelConfig, model_type: str | None = None) -> Architecture:
    """The architecture that a model can be written as.

    Raises:
        UserError: there is none, or it is not `model_type`; the message lists the settings that prevent it.
    """
    if model_type is not None and model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type: got {model_type!r}; supported: {', '.join(ARCHITECTURES)}.{nearest(model_type, ARCHITECTURES)}"
        )
    tried = [ARCHITECTURES[model_type]] if model_type is not None else list(ARCHITECTURES.values())
    reasons = {}
    for one in tried:
        if (why := one.differences(config)) is None:
            return one
        reasons[one.model_type] = why
    # An architecture whose config has no field for a setting is further away than one with other settings.
    closest = min(reasons, key=lambda name: (reasons[name].kind, len(reasons[name].settings)))
    settings = ", ".join(reasons[closest].settings)
    if reasons[closest].kind == OTHER_MODEL:
        head = f" and head {config.head.kind!r}" if hasattr(config, "head") else ""
        said = f"no Hugging Face architecture matches family {config.family!r}{head}"
    else:
        said = f"{'it' if model_type else f'the nearest, {closest},'} does not support {settings}"
    raise UserError(f"this model cannot be written as {model_type or 'any architecture of transformers'}; {said}")


def _architecture(data: Mapping[str, Any], folder: Path) -> Architecture:
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        close = nearest(kind, ARCHITECTURES) if isinstance(kind, str) else ""
        supported = ", ".join(ARCHITECTURES)
        raise UserError(f"{folder / 'config.json'}: model_type: got {kind!r}; supported: {supported}.{close}")
    return ARCHITECTURES[kind]


def _candidates(architecture: Architecture, data: Mapping[str, Any], head: str | None, source: str) -> Iterator[str]:
    """Classes to read a checkpoint as, the most likely one last."""
    classes = architecture.classes
    if head is not None:
        names = [name for name, ours in classes.items() if ours == head]
        if not names:
            heads = ", ".join(sorted({ours for ours in classes.values() if ours})) or "none to choose from"
            raise UserError(f"head: got {head!r}; {architecture.model_type} has {heads}")
        yield names[0]
        return
    written = data.get("architectures") or [None]
    given = written[0] if isinstance(written, list) else written
    if given is None:
        yield from reversed(list(classes))
        return
    if not isinstance(given, str) or given not in classes:
        raise UserError(
            f"{source}: architectures: got {given!r}; supported of {architecture.model_type}: {', '.join(classes)}."
            f"{nearest(str(given), classes)}"
        )
    # A model pretrained with a second head was often published as the class with one.
    fuller = given.replace("ForMaskedLM", "ForPreTraining")
    if fuller != given and classes.get(fuller) == "pretraining":
        yield fuller
    yield given


def _unwrapped(architecture: Architecture, tensors: Mapping[str, np.ndarray]) -> tuple[Mapping[str, np.ndarray], str]:
    """The tensors without what wrappers put before all of their names, and that."""
    taken = ""
    # A model's own names may begin with the name of its body.
    inner = tuple(f"{_BODY}{part}" for part in (f"{architecture.prefix}.", *architecture.heads))
    wrappers = (*_WRAPPERS, _BODY) if architecture.prefix else _WRAPPERS
    while tensors and (start := next((one for one in wrappers if all(name.startswith(one) for name in tensors)), "")):
        if start == _BODY and architecture.prefix == "model" and not all(name.startswith(inner) for name in tensors):
            break
        tensors = {name.removeprefix(start): tensor for name, tensor in tensors.items()}
        taken += start
    return tensors, taken


def _full_names(architecture: Architecture, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with the names of a class with a head, which has a prefix before those of the body."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in _OLD_NAMES.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        other = architecture.renamed.get(name, name)
        # Where a file has a tensor under both names, they are two tensors.
        renamed[name if other in tensors else other] = tensor
    start = architecture.prefix + "."
    if not architecture.prefix or any(name.startswith(start) for name in renamed):
        return renamed
    heads = architecture.heads
    return {name if name.startswith(heads) else start + name: tensor for name, tensor in renamed.items()}


def _described(config: ModelConfig) -> dict[tuple[Any, ...], Any]:
    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(described_parameters(config))}
