"""A reader of a checkpoint's config.json that collects all errors, and the helpers that families share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from transformer.errors import UserError, shown
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.layers.position import RotaryConfig, RotaryScaling
from transformer.mixers.softmax import SoftmaxConfig

ACTIVATIONS = {
    "gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "relu": "relu",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
"""Their name of an activation → ours."""
GATED = {"gelu": "geglu_exact", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu", "silu": "swiglu", "swish": "swiglu"}
"""The same for gated activations."""


FULL, SLIDING = "full_attention", "sliding_attention"
"""Their names of layers without a window and with one."""
UNTIED = "untied by its tensors"
"""A field that no config.json has: whether the output projection is a separate tensor from the embedding."""


_ROPE_FIELDS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim",
    "truncate", "short_factor", "long_factor",
}  # fmt: skip
_LARGEST = 2**31 - 1
_MOST_LAYERS = 10_000
_LARGEST_NUMBER = 1e30


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

    def size(self, name: str, default: int | None = None, *, least: int = 1, most: int = _LARGEST) -> int:
        """A whole number, of 1 or more where `least` does not say otherwise."""
        return self._size(name, self.get(name, default), least, most)

    def _size(self, name: str, value: Any, least: int, most: int = _LARGEST) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._wrong.append(f"{name}: got {shown(value)}; allowed: a whole number from {least} to {most:,}")
            return least
        return value

    def layers(self, name: str, default: int) -> int:
        """The number of layers."""
        return self.size(name, default, most=_MOST_LAYERS)

    def token(self, name: str, default: int) -> int:
        """A token's id, or another number from 0 up."""
        return self.size(name, default, least=0)

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        return self._number(name, self.get(name, default), default)

    def _number(self, name: str, value: Any, usual: float = 1.0) -> float:
        """A value as a number; another one where it is none, which is recorded."""
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER:
            return float(value)
        self._wrong.append(f"{name}: got {shown(value)}; allowed: a number")
        return usual

    def optional_number(self, name: str, default: float | None) -> float | None:
        """A finite number, or None where the field is null, or missing without a default."""
        if name not in self and (default is None or self.written(name)):
            return None
        return self._number(name, self.get(name, default))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self._wrong.append(f"{name}: got {shown(value)}; allowed: true or false")
            return default
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty where the field is missing."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self._wrong.append(f"{name}: got {shown(value)}; allowed: a list of texts")
            return []
        return value

    def section(self, name: str) -> dict[str, Any]:
        """A mapping of fields; empty where it is missing."""
        return self._section(name, self.get(name, {}))

    def _section(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._wrong.append(f"{name}: got {shown(value)}; allowed: a mapping of fields")
            return {}
        return {key: one for key, one in value.items() if one is not None}

    def one_of(self, name: str, allowed: Mapping[str, Any], default: str) -> Any:
        """The entry for a field's value in a table."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in allowed:
            self._wrong.append(f"{name}: got {shown(value)}; supported: {', '.join(allowed)}")
            return next(iter(allowed.values()))
        return allowed[value]

    def must(self, name: str, allowed: Collection[Any], default: Any) -> None:
        """Check a field of which other values change what the model computes in a way that is not supported."""
        value = self.get(name, default)
        if value not in allowed:
            self._wrong.append(f"{name}: got {shown(value)}; supported: {', '.join(map(shown, allowed))}")

    def wrong(self, text: str) -> None:
        """Record another setting that is not supported."""
        self._wrong.append(text)

    def dropouts(self, name: str, attention: str, *others: str, default: float = 0.1) -> dict[str, Any]:
        """`dropout` and `attention_dropout`, with a note where other rates differ from the first."""
        rate = self.number(name, default)
        for other in others:
            if other in self and (value := self.number(other, rate)) != rate:
                self.notes.append(f"{other} is {value:g} there, and dropout {rate:g} here, as {name}")
        return {"dropout": rate, "attention_dropout": self.number(attention, default)}

    def rotary(
        self, *, theta: float, section: str | None = None, name: str = "rope_theta", scaled: bool = True,
        kinds: Mapping[str, str] | None = None, original: int | None = None,
    ) -> RotaryConfig:  # fmt: skip
        """Rotary positions, in any form in which the config writes them.

        Args:
            theta: their default.
            section: the section to read, of a config with several.
            name: of the field for theta outside of a section.
            scaled: whether the field rope_scaling applies.
            kinds: other names of rope_type.
            original: their default of original_max_position_embeddings, if the model's own config has that field.
        """
        new = self.section("rope_parameters")
        new = new if section is None else self._section(f"rope_parameters.{section}", new.get(section) or {})
        both = {**(self.section("rope_scaling") if scaled else {}), **new}
        usual = {
            "rope_theta": self.get(name, theta),
            "partial_rotary_factor": self.get("partial_rotary_factor", 1.0),
        }
        found = {name: self._number(name, both.get(name, value)) for name, value in usual.items()}
        kind = both.get("rope_type") or both.get("type") or "default"
        kind = (kinds or {}).get(kind, kind) if isinstance(kind, str) else kind
        return RotaryConfig(
            theta=found["rope_theta"],
            scaling=self._scaling(kind, both, original),
            fraction=found["partial_rotary_factor"],
        )

    def _scaling(self, kind: Any, rope: Mapping[str, Any], original: int | None) -> RotaryScaling:
        if unknown := sorted(rope.keys() - _ROPE_FIELDS):
            # It may change what the model computes.
            self._wrong.append(f"rope_parameters: fields that are not known: {', '.join(unknown)}")
        if rope.get("truncate", True) is not True:
            self._wrong.append(f"truncate: got {shown(rope['truncate'])}; supported: true")
        # The field outside of the section has the last word there too.
        length = self.get("original_max_position_embeddings", original) or rope.get("original_max_position_embeddings")

        def number(name: str, usual: float | None = None) -> float:
            return self._number(name, rope.get(name) or usual)

        if kind == "linear":
            return RotaryScaling(kind="linear", factor=number("factor"))
        if kind == "llama3":
            return RotaryScaling(
                kind="llama3", factor=number("factor"), original_length=length, slow_turns=number("low_freq_factor"),
                fast_turns=number("high_freq_factor"),
            )  # fmt: skip
        if kind == "yarn" and not any(rope.get(name) for name in ("mscale", "mscale_all_dim")):
            return RotaryScaling(
                kind="yarn", factor=number("factor"), original_length=length or self.get("max_position_embeddings"),
                slow_turns=number("beta_slow", 1.0), fast_turns=number("beta_fast", 32.0),
                attention_factor=None if rope.get("attention_factor") is None else number("attention_factor"),
            )  # fmt: skip
        if kind == "longrope":
            return self._longrope(rope, length)
        if kind != "default":
            self._wrong.append(
                f"rope_type: got {shown(kind)}; supported: default, linear, llama3, longrope, yarn without mscale"
            )
        return RotaryScaling()

    def _longrope(self, rope: Mapping[str, Any], length: Any) -> RotaryScaling:
        longest = self.size("max_position_embeddings")
        length = self._size("original_max_position_embeddings", length or longest, 2)
        factor = self._number("factor", rope.get("factor") or longest / length)
        own = rope.get("attention_factor")
        lists = {name: rope.get(name) for name in ("short_factor", "long_factor")}
        for name, given in lists.items():
            if not isinstance(given, list) or not given:
                self._wrong.append(f"{name}: got {shown(given)}; allowed: a list of numbers")
                lists[name] = [1.0]
        short, long = (tuple(self._number(name, one) for one in given) for name, given in lists.items())  # type: ignore[union-attr]
        return RotaryScaling(
            # From a factor of 1 down, nothing is scaled.
            kind="longrope", original_length=length, factor=max(factor, 1.0), short_factors=short, long_factors=long,
            attention_factor=None if own is None else self._number("attention_factor", own),
        )  # fmt: skip

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
    if scaling.kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.slow_turns, "high_freq_factor": scaling.most_turns}
    if scaling.kind == "yarn":
        rope |= {"beta_slow": scaling.slow_turns, "beta_fast": scaling.most_turns}
    if scaling.kind == "longrope":
        rope |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    if scaling.attention_factor is not None:
        rope["attention_factor"] = scaling.attention_factor
    return rope


def layer_types(mixers: Iterable[SoftmaxConfig]) -> list[str]:
    """The field of this name: whether a layer has a window."""
    return [FULL if mixer.window is None else SLIDING for mixer in mixers]


def repeated(mixers: Sequence[SoftmaxConfig]) -> tuple[SoftmaxConfig, ...]:
    """The shortest sequence that divides the layers and that they repeat, as a pattern; empty if all are equal."""
    lengths = (size for size in range(1, len(mixers) + 1) if len(mixers) % size == 0)
    size = next(size for size in lengths if all(one == mixers[at % size] for at, one in enumerate(mixers)))
    return tuple(mixers[:size]) if size > 1 else ()


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


def experts_mlp(config: Any) -> ExpertsConfig:
    """The feed-forward part, as a mixture of experts.

    Raises:
        UserError: it is dense.
    """
    if not isinstance(config.mlp, ExpertsConfig):
        raise UserError("a dense feed-forward part")
    return config.mlp


def name_of(table: Mapping[str, str], ours: str) -> str | None:
    """The first of their names for one of ours; None if there is none."""
    return next((theirs for theirs, name in table.items() if name == ours), None)
