"""How an architecture of Hugging Face corresponds to ours: its config, its tensors and its classes, in both directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformer.errors import UserError
from transformer.huggingface.fields import HFConfigReader
from transformer.huggingface.mapping import Tables, TensorRule
from transformer.mixers.disentangled import DisentangledConfig
from transformer.mixers.heads import head_sizes
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.families import ModelConfig
from transformer.models.labelled import LabelledHeadConfig

OTHER_SETTINGS, NO_FIELD, OTHER_MODEL = range(3)
"""How an architecture differs from a model: in settings; in one for which its config has no field; altogether."""


class Differences(NamedTuple):
    """Why a model cannot be written as an architecture."""

    kind: int
    settings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model_type.

    Args:
        family: type of our configs.
        classes: name of a class of transformers → our head; "" for families without a choice.
        prefix: of the body's tensors in classes with a head; classes in `bare` have none.
        heads: prefixes of names that are not part of the body.
        output: the output projection, if the tensors show better than config.json whether it is tied (`fields.UNTIED`);
            `tied_to` is the embedding.
        renamed: tensors that are also written under another name.
        read: their fields, and our head → our config.
        write: our config → their fields.
        tables: our config → the tables of its tensors, with the prefix in the names.
    """

    model_type: str
    family: type
    classes: Mapping[str, str]
    bare: tuple[str, ...] = ()
    prefix: str = ""
    heads: tuple[str, ...] = ()
    output: str = ""
    tied_to: str = ""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    read: Callable[[HFConfigReader, Any], ModelConfig]
    write: Callable[[Any], dict[str, Any]]
    tables: Callable[[Any], Tables]

    def config(self, data: Mapping[str, Any], name: str, source: str) -> tuple[ModelConfig, list[str]]:
        """Our config for a config.json and one of `classes`, and notes for the user.

        Raises:
            UserError: fields that are not supported, all in one error.
        """
        theirs = HFConfigReader(data)
        try:
            config = self.read(theirs, self.classes[name])
        except UserError as error:
            # An error that follows from a wrong field is not reported as well.
            theirs.done(source)
            raise UserError(f"{source}: {error}") from None
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            theirs.done(source)
            raise UserError(f"{source}: a field is missing, or of another type than transformers writes") from error
        theirs.done(source)
        return config, theirs.notes

    def named(self, config: ModelConfig, name: str) -> Tables:
        """The tables with the names that a class has."""
        tables = self.tables(config)
        if name not in self.bare:
            return tables
        cut = self.prefix + "."
        return Tables(
            tuple(dataclasses.replace(rule, theirs=rule.theirs.removeprefix(cut)) for rule in tables.rules),
            {copy.removeprefix(cut): original.removeprefix(cut) for copy, original in tables.copies.items()},
            tuple(pattern.removeprefix(cut) for pattern in tables.left_out),
        )

    def class_of(self, config: ModelConfig) -> str | None:
        """The class for a config's head; None if there is none."""
        head = config.head.kind if hasattr(config, "head") else ""
        return next((name for name, ours in self.classes.items() if ours == head), None)

    def differences(self, config: ModelConfig) -> Differences | None:
        """Why a model cannot be written as this architecture: what would not be read back unchanged. None if it can."""
        if not isinstance(config, self.family) or (name := self.class_of(config)) is None:
            return Differences(OTHER_MODEL, ("a model of this family and head",))
        if isinstance(head := getattr(config, "head", None), LabelledHeadConfig):
            config = dataclasses.replace(config, head=dataclasses.replace(head, num_labels=head.classes))  # type: ignore[arg-type]
        try:
            back, _ = self.config({"model_type": self.model_type} | self.write(config), name, self.model_type)
        except UserError as error:
            return Differences(NO_FIELD, tuple(str(error).removeprefix(f"{self.model_type}: ").split("; ")))
        ours, theirs = _computes(config), _computes(back)
        found = tuple(f"{field} {ours.get(field)!r}" for field in ours | theirs if ours.get(field) != theirs.get(field))
        return Differences(OTHER_SETTINGS, found) if found else None


def rules_of(*parts: Any) -> tuple[TensorRule, ...]:
    """Rules and iterators of rules as one tuple."""
    found: list[TensorRule] = []
    for part in parts:
        found += [part] if isinstance(part, TensorRule) else list(part)
    return tuple(found)


_TRAINING = {
    "dropout", "attention_dropout", "init", "init_std", "dtype", "scan_layers", "remat", "backend", "balance_loss",
    "router_z_loss", "attention", "pattern", "mlp", "head", "position_embedding", "norm_bias", "embedding_size",
    "num_decoder_layers",
}  # fmt: skip
"""Fields that do not affect what a trained model computes, and those whose defaults are filled in below."""


def _computes(config: Any) -> dict[str, Any]:
    """The fields that determine a model's outputs, defaults filled in, by the field's path."""
    data = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in _TRAINING
    }
    data |= {"position_embedding": config.embedded_positions, "norm_bias": config.has_norm_bias}
    data |= _fields_of("mlp", dataclasses.replace(config.mlp, dim=config.mlp.width(config.embed_dim)))
    mixers = [_filled(mixer, config.embed_dim) for mixer in config.mixers()]
    for number, mixer in enumerate(mixers):
        data |= _fields_of("attention" if len(set(mixers)) == 1 else f"pattern.{number}", mixer)
    if hasattr(config, "decoder_layers"):
        data["num_decoder_layers"] = config.decoder_layers
    if hasattr(config, "head"):
        data["embedding_size"] = config.dim_of_embedding
        head = _fields_of("head", config.head)
        if config.head.kind == "embedding":
            # The rest is written next to config.json.
            head = {"head.kind": "embedding", "head.pooler": config.head.pooler}
        data |= head
    return data


def _filled(mixer: Any, embed_dim: int) -> Any:
    """A mixer with its defaults filled in, and without a choice of implementation."""
    if isinstance(mixer, DisentangledConfig):
        return dataclasses.replace(mixer, head_dim=head_sizes(mixer, embed_dim)[2], backend="auto")
    if not isinstance(mixer, SoftmaxConfig):
        return mixer
    _, num_kv_heads, head_dim = head_sizes(mixer, embed_dim)
    scale = None if mixer.scale is not None and math.isclose(mixer.scale, head_dim**-0.5) else mixer.scale
    return dataclasses.replace(
        mixer, num_kv_heads=num_kv_heads, head_dim=head_dim, qkv_bias=mixer.has_qkv_bias, scale=scale, backend="auto"
    )


def _fields_of(path: str, config: Any) -> dict[str, Any]:
    """Every field below a config by its path, without those that only training needs."""
    if not dataclasses.is_dataclass(config):
        return {path: config}
    parts = [
        _fields_of(f"{path}.{field.name}", getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in ("backend", "balance_loss", "router_z_loss", "capacity_factor")
    ]
    return {key: value for part in parts for key, value in part.items()}
