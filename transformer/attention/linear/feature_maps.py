"""Feature maps φ of linear attention and fast weights: φ(q)·φ(k) replaces exp(q·k).

H head_dim, M features; "*dims" is any number of leading dims. A map uses one position alone, so it can be applied to a whole
sequence, to a chunk of it, or to one token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from transformer.attention.common import check_name
from transformer.precision import matmul
from transformer.types import Array, Float

FeatureMap = Callable[[Array], Array]
"""From [..., H] to [..., M], in the same type."""


def identity(x: Float[Array, "*dims H"]) -> Float[Array, "*dims M"]:
    """x itself, as in Schmidhuber 1992."""
    return x


def relu(x: Float[Array, "*dims H"]) -> Float[Array, "*dims M"]:
    """max(x, 0)."""
    return jax.nn.relu(x)


def elu_plus_one(x: Float[Array, "*dims H"]) -> Float[Array, "*dims M"]:
    """elu(x) + 1, which is positive (Katharopoulos et al. 2020, equation 7)."""
    return jax.nn.elu(x) + 1


def dpfp(x: Float[Array, "*dims H"], *, nu: int = 1) -> Float[Array, "*dims M"]:
    """Deterministic parameter-free projection to M = 2 H ν features (Schlag et al. 2021, section 5.3).

    With r = relu([x; -x]), the features are r_i r_(i+j) for j from 1 to ν, indices in a circle: sparse, so that more keys can
    be orthogonal to one another than there are dims.

    Raises:
        ValueError: ν is not from 1 to 2 H - 1.
    """
    r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    if not 1 <= nu < r.shape[-1]:
        raise ValueError(f"dpfp: nu={nu}; for x of shape {x.shape} it is from 1 to {r.shape[-1] - 1}")
    return jnp.concatenate([r * jnp.roll(r, j, axis=-1) for j in range(1, nu + 1)], axis=-1)


def positive_random_features(
    x: Float[Array, "*dims H"], *, num_features: int | None = None, seed: int = 0
) -> Float[Array, "*dims M"]:
    """FAVOR+: exp(w·x - |x|²/2) / √M for M random vectors w, after a scale of H^(-1/4) on x.

    φ(q)·φ(k) is then exp(q·k / √H) in expectation (Choromanski et al. 2021, lemma 1), with less variance where the w are
    orthogonal (their section 2.4). Nothing is subtracted for stability, which would make a position depend on others; the
    exponent is at most |w|²/2, about H/2, and far less for inputs of usual size.

    Args:
        num_features: M; 2 H by default.
        seed: of the vectors w, which are constants of the program and not parameters: they are not saved.
    """
    w_MH = orthogonal_projection(2 * x.shape[-1] if num_features is None else num_features, x.shape[-1], seed)
    x = x * x.shape[-1] ** -0.25
    exponent = matmul(x, jnp.asarray(w_MH.T, x.dtype)) - jnp.sum(x * x, axis=-1, keepdims=True) / 2
    return jnp.exp(exponent) * len(w_MH) ** -0.5


@functools.cache
def orthogonal_projection(num_features: int, head_dim: int, seed: int) -> np.ndarray:
    """[M, H] Gaussian rows, orthogonal within each H of them and as long as independent ones would be.

    Choromanski et al. 2021, section 2.4. Each row's distribution is N(0, I), so that the features stay unbiased.

    Raises:
        ValueError: less than one feature.
    """
    if num_features < 1:
        raise ValueError(f"positive_random_features: num_features={num_features}; expected 1 or more")
    rng = np.random.default_rng(seed)
    blocks = [np.linalg.qr(rng.normal(size=(head_dim, head_dim)))[0].T for _ in range(-(-num_features // head_dim))]
    lengths = np.linalg.norm(rng.normal(size=(num_features, head_dim)), axis=1, keepdims=True)
    signs = rng.choice([-1.0, 1.0], size=(num_features, 1))
    return signs * lengths * np.concatenate(blocks)[:num_features]


FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": identity,
    "relu": relu,
    "elu": elu_plus_one,
    "dpfp": dpfp,
    "favor": positive_random_features,
}
"""Feature maps by name, with their defaults; `functools.partial` gives others."""


def feature_map_of(name_or_map: str | FeatureMap) -> FeatureMap:
    """The map with this name, or the map itself.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(name_or_map, str):
        return name_or_map
    check_name("feature_map", "name", name_or_map, FEATURE_MAPS)
    return FEATURE_MAPS[name_or_map]


def feature_dim(feature_map: FeatureMap, head_dim: int) -> int:
    """M for a given H."""
    return jax.eval_shape(feature_map, jax.ShapeDtypeStruct((head_dim,), np.float32)).shape[-1]


def unit_length(x: Float[Array, "*dims M"]) -> Float[Array, "*dims M"]:
    """x / |x|, which keeps the delta rule stable for β from 0 to 2."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def unit_sum(x: Float[Array, "*dims M"]) -> Float[Array, "*dims M"]:
    """x / Σ x, for positive features (Schlag et al. 2021, section 4.2)."""
    return x / (jnp.sum(x, axis=-1, keepdims=True) + 1e-6)


FEATURE_NORMS: dict[str, FeatureMap] = {"none": identity, "l2": unit_length, "sum": unit_sum}
"""Normalisations of the features after the map."""
