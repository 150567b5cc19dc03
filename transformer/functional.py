"""A model as a pure function of its parameters: `nnx.merge(graphdef, params)(tokens)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

ModelFactory = Callable[[nnx.Rngs], nnx.Module]


def graphdef_of(make_model: ModelFactory) -> Any:
    """The model's structure without its arrays; no array is created."""
    return nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))[0]
