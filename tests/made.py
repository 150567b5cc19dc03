"""Models with random parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def made(make_model, *, std=0.1, seed=0):
    """A model in two parts, of which no parameter is as at first, and with no program compiled to make it.

    Args:
        std: of all parameters, around 1 for the gains of norms and around 0 for the others.
    """
    graphdef, described = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        mean = 1.0 if any(getattr(part, "key", None) == "scale" for part in path) else 0.0
        return jnp.asarray(mean + std * rng.normal(size=leaf.shape), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(value, described)
