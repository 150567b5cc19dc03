"""A reader of a checkpoint's config.json that collects all errors, and the helpers that families share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformer.errors import UserError
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.position import RotaryConfig, RotaryScaling
from transformer.mixers.softmax import SoftmaxConfig

ACTIVATIONS = {
    "gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "relu": "relu",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
"""Their name of an activation → ours."""
GATED = {"gelu": "geglu_exact", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu", "silu": "swiglu", "swish": "swiglu"}
"""The same for gated activations."""


UNTIED = "untied by its tensors"
"""A field that no config.json has: whether the output projection is a separate tensor from the embedding."""


class HFConfigReader:
    """Fields of a config.json.

    Attributes:
        notes: fields that are interpreted differently here, for the user.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self._wrong: list[str] = []
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return self._data.get(name) is not None

    def written(self, name: str) -> bool:
        """Whether the field is present, even if it is null."""
        return name in self._data

    def get(self, name: str, default: Any = None) -> Any:
        """A field's value; `default`, which is theirs, if it is missing or null."""
        value = self._data.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of 1 or more."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._wrong.append(f"{name}: got {value!r}; allowed: a number from 1 up")
            return 1
        return value

    def one_of(self, name: str, allowed: Mapping[str, Any], default: str) -> Any:
        """The entry for a field's value in a table."""
        value = self.get(name, default)
        if value not in allowed:
            self._wrong.append(f"{name}: got {value!r}; supported: {', '.join(allowed)}")
            return next(iter(allowed.values()))
        return allowed[value]

    def must(self, name: str, allowed: Collection[Any], default: Any) -> None:
        """Check a field of which other values change what the model computes in a way that is not supported."""
        value = self.get(name, default)
        if value not in allowed:
            self._wrong.append(f"{name}: got {value!r}; supported: {', '.join(map(str, allowed))}")

    def wrong(self, text: str) -> None:
        """Record another setting that is not supported."""
        self._wrong.append(text)

    def dropouts(self, name: str, attention: str, *others: str, default: float = 0.1) -> dict[str, Any]:
        """`dropout` and `attention_dropout`, with a note where other rates differ from the first."""
        rate = float(self.get(name, default))
        for other in others:
            if other in self and (value := float(self.get(other))) != rate:
                self.notes.append(f"{other} is {value:g} there, and dropout {rate:g} here, as {name}")
        return {"dropout": rate, "attention_dropout": float(self.get(attention, default))}

    def rotary(self, *, theta: float, section: str | None = None) -> RotaryConfig:
        """Rotary positions, in any form in which the config writes them.

        Args:
            theta: their default.
            section: the section to read, of a config with several.
        """
        new = self.get("rope_parameters") or {}
        new = new.get(section, {}) if section is not None else new
        old = self.get("rope_scaling") or {}
        both = {**old, **new}
        return RotaryConfig(
            theta=float(both.get("rope_theta") or self.get("rope_theta", theta)),
            scaling=self._scaling(both),
            fraction=float(both.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)),
        )

    def _scaling(self, rope: Mapping[str, Any]) -> RotaryScaling:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        length = rope.get("original_max_position_embeddings")
        if kind == "linear":
            return RotaryScaling(kind="linear", factor=float(rope["factor"]))
        if kind == "llama3":
            return RotaryScaling(
                kind="llama3", factor=float(rope["factor"]), original_length=length,
                slow_turns=float(rope["low_freq_factor"]), fast_turns=float(rope["high_freq_factor"]),
            )  # fmt: skip
        if kind == "yarn" and not any(rope.get(name) for name in ("mscale", "mscale_all_dim")):
            attention = rope.get("attention_factor")
            return RotaryScaling(
                kind="yarn", factor=float(rope["factor"]),
                original_length=length or self.get("max_position_embeddings"),
                slow_turns=float(rope.get("beta_slow") or 1), fast_turns=float(rope.get("beta_fast") or 32),
                attention_factor=None if attention is None else float(attention),
            )  # fmt: skip
        if kind != "default":
            self._wrong.append(f"rope_type: got {kind!r}; supported: default, linear, llama3, yarn without mscale")
        return RotaryScaling()

    def done(self, source: str) -> None:
        """Raise a `UserError` with everything that was wrong."""
        if self._wrong:
            raise UserError(f"{source}: " + "; ".join(self._wrong))


def rotary_fields(rotary: RotaryConfig) -> dict[str, Any]:
    """The fields that `HFConfigReader.rotary` reads, in the form of version 5 of transformers."""
    scaling = rotary.scaling
    rope: dict[str, Any] = {"rope_theta": rotary.theta, "rope_type": "default"}
    if rotary.fraction != 1.0:
        rope["partial_rotary_factor"] = rotary.fraction
    if scaling.kind != "none":
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.slow_turns, "high_freq_factor": scaling.most_turns}
    if scaling.kind == "yarn":
        rope |= {"beta_slow": scaling.slow_turns, "beta_fast": scaling.most_turns}
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    return rope


def softmax_of(mixer: Any) -> SoftmaxConfig:
    """A mixer as softmax attention, the only kind that their architectures have.

    Raises:
        UserError: it is of another kind.
    """
    if not isinstance(mixer, SoftmaxConfig):
        raise UserError(f"attention of kind {mixer.kind}")
    return mixer


def rotary_of(mixer: SoftmaxConfig) -> RotaryConfig:
    """A mixer's rotary positions.

    Raises:
        UserError: it has other positions, or none.
    """
    if not isinstance(mixer.position, RotaryConfig):
        raise UserError(f"attention.position of kind {mixer.position.kind!r}")
    return mixer.position


def only_mixer(config: Any) -> SoftmaxConfig:
    """The mixer that all layers share.

    Raises:
        UserError: they differ, or are of another kind.
    """
    first, *others = dict.fromkeys(config.mixers())
    if others:
        raise UserError("a pattern of mixers that differ")
    return softmax_of(first)


def dense_mlp(config: Any) -> DenseConfig:
    """The feed-forward part.

    Raises:
        UserError: it is a mixture of experts.
    """
    if not isinstance(config.mlp, DenseConfig):
        raise UserError("a mixture of experts")
    return config.mlp


def name_of(table: Mapping[str, str], ours: str) -> str | None:
    """The first of their names for one of ours; None if there is none."""
    return next((theirs for theirs, name in table.items() if name == ours), None)
