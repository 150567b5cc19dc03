"""What an architecture of Hugging Face's is to us: its config, its tensors and its classes, each in both directions."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from transformer.errors import UserError
from transformer.hf.fields import Theirs
from transformer.hf.mapping import Rule, Tables
from transformer.models.families import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model_type.

    Args:
        family: type of our configs.
        classes: name of a class of transformers → the head that it has here; "" for families without a choice.
        prefix: of the body's tensors in classes with a head; classes in `bare` have none.
        heads: what names that are no part of the body begin with.
        output: the output projection, where tensors say better than config.json whether it is tied (`fields.UNTIED`);
            `tied_to` is the embedding.
        renamed: tensors that are also written under another name.
        read: their fields, and our head → our config.
        write: our config → their fields.
        tables: our config → where each tensor lies, names with the prefix.
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
    read: Callable[[Theirs, Any], ModelConfig]
    write: Callable[[Any], dict[str, Any]]
    tables: Callable[[Any], Tables]

    def config(self, data: Mapping[str, Any], name: str, source: str) -> tuple[ModelConfig, list[str]]:
        """Our config for a config.json and one of `classes`, and what to say about it.

        Raises:
            UserError: fields that are not supported, all at once.
        """
        theirs = Theirs(data)
        try:
            config = self.read(theirs, self.classes[name])
        except UserError as error:
            # What follows from a field that is wrong is no news.
            theirs.done(source)
            raise UserError(f"{source}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            theirs.done(source)
            raise UserError(
                f"{source}: a field is missing or of another type: {type(error).__name__}: {error}"
            ) from None
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
        head = getattr(config, "head", "")
        return next((name for name, ours in self.classes.items() if ours == head), None)

    def differences(self, config: ModelConfig) -> list[str]:
        """Why a model cannot be written as this architecture: what would not be read back as it is. Empty where it can."""
        if not isinstance(config, self.family) or (name := self.class_of(config)) is None:
            return [OTHER_KIND]
        try:
            back, _ = self.config({"model_type": self.model_type} | self.write(config), name, self.model_type)
        except UserError as error:
            return str(error).removeprefix(f"{self.model_type}: ").split("; ")
        ours, theirs = _computes(config), _computes(back)
        return [f"{field} {ours.get(field)!r}" for field in ours | theirs if ours.get(field) != theirs.get(field)]


OTHER_KIND = "a model of this family and head"
"""Why an architecture is nothing for a model, whatever its settings."""


def rules_of(*parts: Any) -> tuple[Rule, ...]:
    """Rules and iterators of rules as one tuple."""
    found: list[Rule] = []
    for part in parts:
        found += [part] if isinstance(part, Rule) else list(part)
    return tuple(found)


_TRAINING = {
    "dropout", "init", "init_std", "dtype", "attention", "scan_layers", "remat", "balance_loss", "router_z_loss",
    "expert_capacity", "experts_per_token", "use_bias", "attention_bias", "qkv_bias", "mlp_bias", "norm_bias",
}  # fmt: skip
"""Fields that change nothing of what a trained model computes, and those that stand for others."""


def _computes(config: Any) -> dict[str, Any]:
    """What decides a model's outputs, defaults filled in, and nothing that has no effect."""
    data = {name: value for name, value in dataclasses.asdict(config).items() if name not in _TRAINING}
    filled = {
        "num_kv_heads": "kv_heads", "head_dim": "dim_of_head", "mlp_dim": "dim_of_mlp", "table_dim": "dim_of_table",
        "num_decoder_layers": "decoder_layers",
    }  # fmt: skip
    data |= {name: getattr(config, full) for name, full in filled.items() if name in data}
    data |= {f"bias of {part}": config.has_bias(part) for part in ("qkv", "attention", "mlp")}
    if config.norm == "layer_norm":
        data["bias of norms"] = config.has_bias("norm")
    is_local = data.get("local_window") is not None
    if is_local and data["local_rotary_period"] is None:
        data["local_rotary_period"] = config.rotary_period
    head = data.get("head")
    embeds = head == "embedding"
    of_rows = head in ("pretraining", "classification", "choice") or (embeds and data["pooler"])
    of_tokens = head in ("tokens", "answer")
    layered = of_tokens and data["token_layer"]
    idle = {
        "rotary*": config.position != "rotary",
        "relative*": config.position != "relative",
        "local*": not is_local,
        "global*": not is_local,
        "sinks*": data.get("window") is None,
        "num_labels": head not in ("classification", "tokens"),
        "token_layer": not of_tokens,
        "head_bias": (embeds and not of_rows) or (of_tokens and not layered),
        # Of embeddings it stands beside config.json.
        "pooling": embeds or not of_rows,
        "pooler": not embeds,
        "pooler_norm": not of_rows,
        "pooler_activation": not of_rows and not layered,
    }
    off = [pattern for pattern, is_idle in idle.items() if is_idle]
    return {
        name: value for name, value in data.items() if not any(fnmatch.fnmatchcase(name, pattern) for pattern in off)
    }
