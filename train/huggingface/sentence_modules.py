"""The modules of sentence-transformers next to a checkpoint: the head of an embedding model, in both directions.

modules.json lists them, in the order in which they run: the Transformer, a Pooling, and layers on the pooled vector. Each has a
folder with its config.json, and with model.safetensors if it has weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import UserError, shown
from transformer.huggingface.checkpoint import Checkpoint, read_mapping
from transformer.huggingface.fields import HFConfigReader, name_of
from transformer.huggingface.mapping import Tables, TensorRule, check, linear, norm, to_theirs
from transformer.huggingface.tensors import SINGLE, open_file, save_file
from transformer.models.bert import BertConfig
from transformer.models.embedding_head import (
    VECTOR_ACTIVATIONS,
    DenseLayerConfig,
    EmbeddingHeadConfig,
    LayerNormLayerConfig,
    NormalizeLayerConfig,
    Pooling,
    VectorLayerConfig,
)
from transformer.models.families import described_parameters
from transformer.paths import check_file, path_inside

LIST = "modules.json"
POOLING_FOLDER = "1_Pooling"
_BODY, _POOLING, _DROPOUT = "Transformer", "Pooling", "Dropout"
_LAYERS = {"Dense": DenseLayerConfig, "LayerNorm": LayerNormLayerConfig, "Normalize": NormalizeLayerConfig}
"""Their modules after Pooling → our layers."""
POOLINGS: dict[str, Pooling] = {
    "cls": "cls", "max": "max", "mean": "mean", "mean_sqrt_len_tokens": "mean_sqrt_len", "weightedmean": "weighted_mean",
    "lasttoken": "last",
}  # fmt: skip
"""Their names of poolings → ours."""
_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len", "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}  # fmt: skip
"""Before version 5.4 each pooling has a field of its own; several are concatenated in this order."""
_SIZES = ("word_embedding_dimension", "embedding_dimension")
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity", "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu", "torch.nn.modules.activation.GELU": "gelu_exact",
    "torch.nn.modules.activation.SiLU": "silu", "torch.nn.modules.activation.Sigmoid": "sigmoid",
}  # fmt: skip
_SHORT = {f"torch.nn.{name.rpartition('.')[2]}": ours for name, ours in _ACTIVATIONS.items()}
_VECTOR = "sentence_embedding"


class Module(NamedTuple):
    """An entry of modules.json."""

    kind: str
    folder: Path


def is_embedder(config: Any) -> bool:
    """Whether a model has the head that modules define."""
    return isinstance(config, BertConfig) and isinstance(config.head, EmbeddingHeadConfig)


def modules_of(folder: Path) -> list[Module]:
    """The modules of a folder, in order; none if it has no modules.json.

    Raises:
        UserError: modules.json is not one, or has other modules, or in another order, than an embedding model here.
    """
    path = folder / LIST
    if not path.exists():
        return []
    check_file(path)
    try:
        given = json.loads(path.read_text("utf-8-sig"))
        kinds = [str(module["type"]).rpartition(".")[2] for module in given]
        places = [str(module.get("path") or "") for module in given]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a list of modules ({error})") from None
    supported = f"supported: {_BODY}, {_POOLING}, and then any of {', '.join(_LAYERS)}"
    known = (_BODY, _POOLING, _DROPOUT, *_LAYERS)
    if unknown := [kind for kind in kinds if kind not in known]:
        raise UserError(f"{path}: got {', '.join(map(shown, unknown))}; {supported}")
    if kinds[:2] != [_BODY, _POOLING] or kinds.count(_BODY) > 1 or kinds.count(_POOLING) > 1:
        raise UserError(f"{path}: got {', '.join(kinds) or 'no modules'}; {supported}, in this order")
    return [
        Module(kind, path_inside(folder, place, source=path) if place else folder)
        for kind, place in zip(kinds, places, strict=True)
    ]


def body_of(folder: Path) -> Path:
    """The folder with config.json and the weights of the Transformer: older ones have it in a folder of its own."""
    modules = modules_of(folder) if not (folder / "config.json").exists() else []
    return modules[0].folder if modules else folder


def with_modules(read: Checkpoint, folder: Path) -> Checkpoint:
    """An embedding model with the head that the modules of its folder define, and with their tensors. Of a folder without
    modules.json, the config of a pooling is read if it has one; any other checkpoint is returned as it is.

    Raises:
        UserError: modules, fields or tensors that are not supported.
    """
    config: Any = read.config
    if not is_embedder(config):
        return read
    modules = modules_of(folder)
    pooling = modules[1].folder if modules else folder / POOLING_FOLDER
    head, notes, tensors = config.head, list(read.notes), dict(read.tensors)
    if modules or (pooling / "config.json").exists():
        head = dataclasses.replace(head, pooling=_pooling(pooling, config.embed_dim))
    rules: list[TensorRule] = []
    if modules:
        layers: list[VectorLayerConfig] = []
        dim = config.embed_dim * len(head.poolings)
        for kind, place in modules[2:]:
            if kind == _DROPOUT:
                notes.append("the module Dropout is left out: it has no effect on the vectors of a trained model")
                continue
            layers.append(_layer(kind, place, dim))
            within = str(place.relative_to(folder))
            rules += _rules_of(layers[-1], len(layers) - 1, within, dim)
            if kind != "Normalize":
                tensors |= {f"{within}/{name}": tensor for name, tensor in _tensors(place).items()}
            dim = getattr(layers[-1], "dim", dim)
        head = dataclasses.replace(head, layers=tuple(layers))
    config = dataclasses.replace(config, head=head)
    found = {name: tensor for name, tensor in tensors.items() if name not in read.tensors}
    ours = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(described_parameters(config))}
    check(
        Tables(tuple(rules)),
        found,
        {path: one for path, one in ours.items() if path[0] == "embedding_head"},
        str(folder),
    )
    tables = dataclasses.replace(read.tables, rules=(*read.tables.rules, *rules))
    return dataclasses.replace(read, config=config, notes=notes, tensors=tensors, tables=tables)


def write_modules(folder: Path, config: BertConfig, params: nnx.State, dtype: Any, about: Mapping[str, Any]) -> None:
    """Write the modules of an embedding model, with which sentence-transformers loads the folder too.

    Args:
        dtype: of their tensors.
        about: `Conventions.embedding`.

    Raises:
        OSError: any error while writing.
    """
    head = config.head
    assert isinstance(head, EmbeddingHeadConfig)
    kinds = [next(name for name, kind in _LAYERS.items() if isinstance(layer, kind)) for layer in head.layers]
    names = [_BODY, _POOLING, *kinds]
    places = [f"{number}_{kind}" if number else "" for number, kind in enumerate(names)]
    modules = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, place) in enumerate(zip(names, places, strict=True))
    ]
    (folder / LIST).write_text(json.dumps(modules, indent=2) + "\n", "utf-8")
    flat = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    dim = config.embed_dim * len(head.poolings)
    fields: list[dict[str, Any] | None] = [_pooling_fields(head, config.embed_dim, about)]
    for number, layer in enumerate(head.layers):
        fields.append(_layer_fields(layer, dim))
        rules = tuple(_rules_of(layer, number, "", dim))
        if rules:
            (folder / places[number + 2]).mkdir()
            tensors = {
                name.removeprefix("/"): np.ascontiguousarray(one) for name, one in to_theirs(Tables(rules), flat, dtype)
            }
            save_file(folder / places[number + 2] / SINGLE, tensors)
        dim = getattr(layer, "dim", dim)
    for place, data in zip(places[1:], fields, strict=True):
        if data is not None:
            (folder / place).mkdir(exist_ok=True)
            (folder / place / "config.json").write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def vectors_by_hand(read: Checkpoint, hidden_BTD: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
    """The vectors [B, O] of rows, from their hidden states and the modules' own tensors, in float64: what is compared with the
    model's."""
    head: Any = read.config.head  # type: ignore[union-attr]
    tensors = {
        rule.ours[0]: read.tensors[rule.theirs].astype(np.float64) for rule in read.tables.rules if "/" in rule.theirs
    }
    rows = [hidden_TD[own_T > 0].astype(np.float64) for hidden_TD, own_T in zip(hidden_BTD, valid_BT, strict=True)]
    formulas: dict[Pooling, Callable[[np.ndarray], np.ndarray]] = {
        "cls": lambda x: x[0], "last": lambda x: x[-1], "max": lambda x: x.max(0), "mean": lambda x: x.mean(0),
        "mean_sqrt_len": lambda x: x.sum(0) / np.sqrt(len(x)),
        "weighted_mean": lambda x: np.average(x, axis=0, weights=1 + np.arange(len(x))),
    }  # fmt: skip
    x = np.array([np.concatenate([formulas[one](row) for one in head.poolings]) for row in rows])
    for number, layer in enumerate(head.layers):
        start = f"embedding_head.layer_{number}"
        if isinstance(layer, NormalizeLayerConfig):
            x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        elif isinstance(layer, LayerNormLayerConfig):
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
            x = x * tensors[f"{start}.scale"] + tensors[f"{start}.bias"]
        else:
            y = x @ tensors[f"{start}.linear.kernel"].T + tensors.get(f"{start}.linear.bias", 0.0)
            # The activation is the same function here and there.
            y = np.asarray(VECTOR_ACTIVATIONS[layer.activation](jnp.asarray(y)), np.float64)
            projection = tensors.get(f"{start}.residual.kernel")
            x = y + (x if projection is None else x @ projection.T) if layer.residual else y
    return x


def _pooling(place: Path, embed_dim: int) -> Pooling | tuple[Pooling, ...]:
    path = place / "config.json"
    data = read_mapping(path)
    theirs = HFConfigReader(data)
    unknown = [key for key in data if key not in (*_FLAGS, *_SIZES, "pooling_mode", "include_prompt")]
    if unknown:
        theirs.wrong(f"{', '.join(map(shown, unknown))}: fields that are not known; supported: {', '.join(_FLAGS)}")
    for name in _SIZES:
        theirs.must(name, [embed_dim], embed_dim)
    given = theirs.get("pooling_mode")
    found: list[Any] = [ours for name, ours in _FLAGS.items() if theirs.flag(name, False)] or ["mean"]
    if given is not None:
        names = given if isinstance(given, list) else [given]
        if not names or any(not isinstance(name, str) or name not in POOLINGS for name in names):
            theirs.wrong(f"pooling_mode: got {shown(given)}; supported: one or several of {', '.join(POOLINGS)}")
        found = [POOLINGS.get(name, "mean") for name in map(str, names)]
    theirs.done(str(path))
    return found[0] if len(found) == 1 else tuple(found)


def _pooling_fields(head: EmbeddingHeadConfig, embed_dim: int, about: Mapping[str, Any]) -> dict[str, Any]:
    # Every version reads a field for each pooling, but only newer ones another order.
    in_order = [one for one in _FLAGS.values() if one in head.poolings] == list(head.poolings)
    modes: dict[str, Any] = {name: ours in head.poolings for name, ours in _FLAGS.items()}
    size = {"word_embedding_dimension": embed_dim}
    if not in_order:
        modes, size = (
            {"pooling_mode": [name_of(POOLINGS, one) for one in head.poolings]},
            {"embedding_dimension": embed_dim},
        )
    return size | modes | {"include_prompt": about.get("include_prompt", True)}


def _layer(kind: str, place: Path, dim: int) -> VectorLayerConfig:
    """The layer of a module with `dim` inputs."""
    path = place / "config.json"
    data = read_mapping(path) if kind != "Normalize" or path.exists() else {}
    theirs = HFConfigReader(data)
    for name in ("module_input_name", "module_output_name"):
        theirs.must(name, [_VECTOR], _VECTOR)
    known = {"module_input_name", "module_output_name"}
    if kind == "Normalize":
        layer: VectorLayerConfig = NormalizeLayerConfig()
    elif kind == "LayerNorm":
        known |= {"dimension"}
        theirs.must("dimension", [dim], None)
        layer = LayerNormLayerConfig()
    else:
        known |= {"in_features", "out_features", "bias", "activation_function", "use_residual"}
        theirs.must("in_features", [dim], None)
        layer = DenseLayerConfig(
            dim=theirs.size("out_features"), bias=theirs.flag("bias", True), residual=theirs.flag("use_residual", False),
            activation=theirs.one_of("activation_function", _ACTIVATIONS | _SHORT, "torch.nn.modules.activation.Tanh"),
        )  # fmt: skip
    if unknown := data.keys() - known:
        theirs.wrong(
            f"{', '.join(map(shown, sorted(unknown)))}: fields that are not known; supported: {', '.join(sorted(known))}"
        )
    theirs.done(str(path))
    return layer


def _layer_fields(layer: VectorLayerConfig, dim: int) -> dict[str, Any] | None:
    """The config.json of a module; None if it has none."""
    if isinstance(layer, NormalizeLayerConfig):
        return None
    if isinstance(layer, LayerNormLayerConfig):
        return {"dimension": dim}
    fields = {
        "in_features": dim, "out_features": layer.dim, "bias": layer.bias,
        "activation_function": name_of(_ACTIVATIONS, layer.activation),
    }  # fmt: skip
    return fields | ({"use_residual": True} if layer.residual else {})


def _rules_of(layer: VectorLayerConfig, number: int, place: str, dim: int) -> Iterator[TensorRule]:
    """The rules of a module's tensors, whose names begin with its folder."""
    ours = f"embedding_head.layer_{number}"
    if isinstance(layer, LayerNormLayerConfig):
        yield from norm(f"{place}/norm", ours)
    if isinstance(layer, DenseLayerConfig):
        yield from linear(f"{place}/linear", f"{ours}.linear", use_bias=layer.bias)
        if layer.residual and layer.dim != dim:
            yield from linear(f"{place}/residual", f"{ours}.residual", use_bias=False)


def _tensors(place: Path) -> dict[str, np.ndarray]:
    """The tensors of a module."""
    path = place / SINGLE
    if not path.exists():
        pickled: Sequence[str] = sorted(one.name for one in place.glob("*.bin"))
        if not pickled:
            raise UserError(f"{place}: no {SINGLE} in this folder")
        raise UserError(
            f"{place}: its weights are in {', '.join(pickled)}, and such files can run code when they are read; convert "
            "them where you trust them: SentenceTransformer(FOLDER).save_pretrained(NEW, safe_serialization=True)"
        )
    return dict(open_file(path))
