"""Hard attention: each query takes one key. The kinds differ in how they handle a choice that has no gradient.

B batch, T query position, S key position, D query features, E key features, V value features, A alignment features.

    soft        α = softmax(e / τ): not hard, but it approaches `argmax` as τ falls to 0
    argmax      the key with the greatest score; the scores get no gradient
    gumbel      a key drawn from softmax(e) by the Gumbel-max trick; its backward pass is that of the relaxed draw
                softmax((e + g) / τ) (straight-through; Jang et al. 2017; Maddison et al. 2017)
    reinforce   a key drawn from softmax(e); its gradient comes from `reinforce_loss` (Xu et al. 2015, section 4.1)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer.attention.common import check_shapes, softmax
from transformer.randomness import gumbel
from transformer.types import Array, Bool, Float, Int, Keys, widen


class HardSample(NamedTuple):
    """A key drawn for each query. If a query sees no key, everything is 0."""

    weights_BTS: Float[Array, "B T S"]
    """One-hot, with no gradient."""
    log_prob_BT: Float[Array, "B T"]
    """Log-probability of the drawn keys."""
    entropy_BT: Float[Array, "B T"]
    """Entropy of the distribution they were drawn from, in nats."""


def argmax_weights(
    scores_BTS: Float[Array, "B T S"], allowed_BTS: Bool[Array, "B_ T_ S_"] | None = None
) -> Float[Array, "B T S"]:
    """1 for the key with the greatest score (the first of equal ones), else 0. No gradient."""
    scores_BTS = jax.lax.stop_gradient(_floor(widen(scores_BTS), allowed_BTS))
    one_hot_BTS = jax.nn.one_hot(jnp.argmax(scores_BTS, axis=-1), scores_BTS.shape[-1], dtype=scores_BTS.dtype)
    return one_hot_BTS if allowed_BTS is None else jnp.where(allowed_BTS, one_hot_BTS, 0)


def gumbel_weights(
    scores_BTS: Float[Array, "B T S"],
    allowed_BTS: Bool[Array, "B_ T_ S_"] | None = None,
    *,
    key: Keys,
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B T S"]:
    """A one-hot draw from softmax(e) whose gradient is that of softmax((e + g) / τ) for the same Gumbel noise g.

    Raises:
        ValueError: a temperature that is not positive.
    """
    check_temperature("gumbel_weights", temperature)
    scores_BTS = widen(scores_BTS)
    noisy_BTS = scores_BTS + gumbel(key, scores_BTS)
    soft_BTS = softmax(noisy_BTS / temperature, allowed_BTS)
    return argmax_weights(noisy_BTS, allowed_BTS) + (soft_BTS - jax.lax.stop_gradient(soft_BTS))


def sample_weights(
    scores_BTS: Float[Array, "B T S"], allowed_BTS: Bool[Array, "B_ T_ S_"] | None = None, *, key: Keys
) -> HardSample:
    """A draw from softmax(e), with the quantities that REINFORCE needs (Xu et al. 2015, section 4.1)."""
    scores_BTS = widen(scores_BTS)
    noise_BTS = gumbel(key, scores_BTS)
    weights_BTS = argmax_weights(scores_BTS + noise_BTS, allowed_BTS)
    log_probs_BTS = jax.nn.log_softmax(_floor(scores_BTS, allowed_BTS), axis=-1)
    if allowed_BTS is not None:
        # Zeros add nothing to the sums below.
        log_probs_BTS = jnp.where(allowed_BTS, log_probs_BTS, 0)
    entropy_BT = -jnp.sum(jnp.exp(log_probs_BTS) * log_probs_BTS, axis=-1)
    return HardSample(weights_BTS, jnp.sum(weights_BTS * log_probs_BTS, axis=-1), entropy_BT)


def reinforce_loss(
    log_likelihood_B: Float[Array, " B"],
    sample: HardSample,
    baseline: Float[Array, ""],
    *,
    reward_weight: float = 1.0,
    entropy_weight: float = 0.0,
    decay: float = 0.9,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A loss whose gradient is REINFORCE's estimate, and the next baseline.

    For one draw s, the gradient (Xu et al. 2015, section 4.1) is minus the mean over the batch of

        ∂ log p(y|s) + λ_r (log p(y|s) - b) ∂ log p(s) + λ_e ∂ H[s]

    With λ_r = 1 and λ_e = 0 its expectation is the exact gradient of -E_s[log p(y|s)], for any b that does not depend on s.
    The baseline follows the rewards: b ← 0.9 b + 0.1 log p(y|s).

    Args:
        log_likelihood_B: log p(y|s), the reward, with its gradient for the model that predicts y.
        sample: from `sample_weights`.
        baseline: b from the previous step; 0 at first.
        reward_weight, entropy_weight: λ_r and λ_e.
        decay: decay rate of the baseline.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shapes(
        "reinforce_loss",
        log_likelihood=(log_likelihood_B, "B"), log_prob=(sample.log_prob_BT, "B T"), entropy=(sample.entropy_BT, "B T"),
    )  # fmt: skip
    reward_B = jax.lax.stop_gradient(widen(log_likelihood_B))
    advantage_B = reward_B - jax.lax.stop_gradient(baseline)
    gain_B = widen(log_likelihood_B) + reward_weight * advantage_B * sample.log_prob_BT.sum(-1)
    loss = -jnp.mean(gain_B + entropy_weight * sample.entropy_BT.sum(-1))
    return loss, decay * jax.lax.stop_gradient(baseline) + (1 - decay) * reward_B.mean()


def temperature_at(step: int | Int[Array, ""], *, start: float, end: float, num_steps: int) -> Float[Array, ""]:
    """A temperature that falls geometrically from `start` at step 0 to `end` at `num_steps`, and then stays constant.

    Raises:
        ValueError: a temperature that is not positive, or no steps.
    """
    check_temperature("temperature_at", start)
    check_temperature("temperature_at", end)
    if num_steps < 1:
        raise ValueError(f"temperature_at: num_steps={num_steps}; expected 1 or more")
    share = jnp.clip(jnp.asarray(step, jnp.float32) / num_steps, 0, 1)
    return start * (end / start) ** share


def check_temperature(caller: str, temperature: float | Array) -> None:
    """Raise a `ValueError` for a temperature that is not positive, if its value is known while tracing."""
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"{caller}: temperature={temperature}; expected a positive number")


def _floor(scores_BTS: Array, allowed_BTS: Array | None) -> Array:
    """The scores, with a finite floor where not allowed, so that a row that allows nothing does not give NaN."""
    return scores_BTS if allowed_BTS is None else jnp.where(allowed_BTS, scores_BTS, jnp.finfo(scores_BTS.dtype).min)
