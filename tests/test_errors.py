"""A config dataclass that exists is valid, however it was made."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest

from transformer.errors import Config, ConfigError, UserError, check_fields, first_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Config):
    kind: Literal["small"] = "small"
    rate: float = 1.0
    count: int | None = None
    weights: tuple[float, ...] | Literal["balanced"] | None = None
    three: tuple[int, int, int] = (1, 2, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other(Config):
    flag: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Large(Config):
    text: str = ""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    part: Small | Other = Small()
    parts: tuple[Small | Other, ...] = ()


def test_whatever_fits_is_kept_and_an_integer_becomes_a_float():
    config = Small(rate=2, count=None, weights=(1, 2.5))
    assert (config.rate, type(config.rate)) == (2.0, float)
    assert config.weights == (1.0, 2.5)
    assert Small(weights="balanced").weights == "balanced"
    assert Large(part=Other(), parts=(Small(), Other())).parts == (Small(), Other())


@pytest.mark.parametrize(
    ("config_type", "field", "value", "message"),
    [
        (Small, "rate", "1", "rate: got '1'; allowed: a number"),
        (Small, "rate", True, "rate: got True; allowed: a number"),
        (Small, "count", 1.0, "count: got 1.0; allowed: an integer, or null"),
        (Small, "count", True, "count: got True; allowed: an integer, or null"),
        (Small, "weights", "balance", "Did you mean 'balanced'?"),
        (Small, "weights", [1.0], "each item is a number"),
        (Small, "three", (1, 2), "three: got (1, 2); allowed: a list (tuple) of 3 items"),
        (Small, "three", (1, 2, 3.0), "three: got"),
        (Other, "flag", 1, "flag: got 1; allowed: true or false"),
        (Large, "text", None, "text: got None; allowed: a text"),
        (Large, "activation", "silo", "allowed: 'relu', 'gelu', or 'silu'. Did you mean 'silu'?"),
        (Large, "activation", ["relu"], "activation: got ['relu']"),
        (Large, "part", 3, "part: got 3; allowed: Small, or Other"),
        (Large, "parts", (Small(), 3), "each item is Small, or Other"),
    ],
)
def test_whatever_does_not_fit_is_refused(config_type, field, value, message):
    with pytest.raises(ConfigError) as caught:
        config_type(**{field: value})
    assert message in str(caught.value)
    assert (caught.value.owner, caught.value.field) == (config_type, field)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first \nsecond"), "first"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 99), "x" * 17 + "..."),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error, 20) == line


def test_a_config_error_is_for_users_and_for_validators():
    assert issubclass(ConfigError, UserError)
    assert issubclass(ConfigError, ValueError)


def test_an_annotation_that_cannot_be_checked_is_a_mistake_of_the_code():
    @dataclasses.dataclass
    class Unsupported:
        table: Any = None

    Unsupported.__annotations__["table"] = dict
    with pytest.raises(TypeError, match="cannot have a field"):
        check_fields(Unsupported())
