"""Direct logit attribution: what each part of a model adds to the difference of two logits (Elhage et al. 2021).

The residual stream of a pre-norm model is a sum: the embedding, each head's output, each feed-forward layer's output, and biases.
With the scale of the final norm held at its value on this input, a logit is linear in it, so that the parts add up to the logit.

B batch, T position, D embed, N query heads, H features of a head's output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.blocks import Norm
from transformer.errors import UserError
from transformer.hooks import Hooks
from transformer.interpret.interventions.subject import Inputs, Subject, answer_and_instead
from transformer.layers.norm import LayerNorm
from transformer.models.bert import Bert
from transformer.types import Array, Float, widen


@dataclasses.dataclass(frozen=True)
class Attribution:
    """The parts of a logit difference, in logits."""

    answer: int
    instead: int
    difference: float
    """The logit of `answer` minus that of `instead`, as the model computes it."""
    embedding: float
    heads: dict[str, Float[np.ndarray, "L N"]]
    """By part; nan where a layer has fewer heads."""
    mlps: Float[np.ndarray, " L"]
    biases: float
    """Those of the attention outputs, of the norms, and of the output projection."""

    @property
    def total(self) -> float:
        """The sum of all parts, which equals `difference` up to rounding."""
        heads = sum(float(np.nansum(table)) for table in self.heads.values())
        return self.embedding + heads + float(self.mlps.sum()) + self.biases


def attribute(
    subject: Subject, inputs: Inputs, *, answer: int | None = None, instead: int | None = None
) -> Attribution:
    """Attribute the difference of two logits of a row's answer; of an encoder-decoder to the parts of its decoder.

    Args:
        inputs: one row.
        answer, instead: tokens; by default the likeliest one, and the next likeliest.

    Raises:
        UserError: a model in which logits are not linear in the parts: post-norm, with a soft cap of the logits, or an encoder,
            whose head has a layer of its own.
    """
    _check(subject)
    scores_C = subject.scores(inputs)[0][0]
    answer, instead = answer_and_instead(scores_C, answer, instead)
    prefix, stack = subject.last, subject.stacks[subject.last]
    parts = [part for part in subject.parts.values() if part.stack == prefix]
    L = stack.num_layers
    kept = [f"{prefix}embed", f"{prefix}layers.{L - 1}.out"]
    kept += [f"{prefix}layers.{layer}.mlp.out" for layer in range(L)]
    kept += [part.place(layer, "heads") for part in parts for layer in range(L)]

    @jax.jit
    def pieces(params: nnx.State, inputs: Inputs, both: Array) -> tuple[Any, ...]:
        hooks = Hooks(keep=kept)
        model = subject.call(params, inputs, hooks)
        own = getattr(model, prefix.rstrip(".") or "layers")
        at = jnp.asarray(inputs.at_B)[0]
        value = {place: widen(value[0, at]) for place, value in hooks.kept.items()}
        direction_D, output_bias = _direction(model, both)
        final: Norm = own.final_norm
        # d(difference) / d(stream), with the norm's scale as it is here.
        direction_D = _scale_of(final, value[f"{prefix}layers.{L - 1}.out"]) * final.scale[...] * direction_D
        if isinstance(final, LayerNorm):
            direction_D = direction_D - direction_D.mean()
        bias = output_bias
        if isinstance(final, LayerNorm) and final.bias is not None:
            bias = bias + final.bias[...] @ _direction(model, both)[0]
        heads = {}
        for part in parts:
            kind = part.name.rpartition(".")[2]
            for layer, block in enumerate(own.single_blocks()):
                mixer, norm = getattr(block, kind), getattr(block, f"{kind}_output_norm")
                kernel = widen(mixer.out.kernel[...])
                read_NH = value[part.place(layer, "heads")]
                # One head of features without an axis of heads (LSTMN) has a kernel [H, D].
                kernel = kernel[None] if kernel.ndim == 2 else kernel
                written_ND = jnp.einsum("NH,NHD->ND", read_NH, kernel)
                constant_D = jnp.zeros(written_ND.shape[1:]) if mixer.out.bias is None else widen(mixer.out.bias[...])
                if norm is not None:
                    written_ND, constant_D = _through(norm, written_ND, constant_D)
                heads[part.place(layer, "heads")] = written_ND @ direction_D
                bias = bias + constant_D @ direction_D
        mlps = jnp.stack([value[f"{prefix}layers.{layer}.mlp.out"] @ direction_D for layer in range(L)])
        return value[f"{prefix}embed"] @ direction_D, heads, mlps, bias

    embedding, heads, mlps, biases = pieces(subject.params, inputs, np.array([answer, instead], np.int32))
    of_heads = {
        (part.name, layer, head): float(value)
        for part in parts
        for layer in range(L)
        for head, value in enumerate(np.asarray(heads[part.place(layer, "heads")]))
    }
    tables = {name: table for name, table in subject.tables(of_heads).items() if name in {part.name for part in parts}}
    return Attribution(
        answer, instead, float(scores_C[answer] - scores_C[instead]), float(embedding), tables, np.asarray(mlps),
        float(biases),
    )  # fmt: skip


def _check(subject: Subject) -> None:
    config, why = subject.config, None
    if not config.norm_first:
        why = "model.norm_first: false (post-norm) divides the stream anew after each sublayer"
    elif isinstance(subject.model, Bert):
        why = f"model.head: {config.head.kind!r} has a layer of its own before the scores"
    elif getattr(config, "logit_soft_cap", None) is not None:
        why = "model.logit_soft_cap: it bends the logits"
    if why is not None:
        raise UserError(
            f"{why}, so that logits are not a sum of parts; use ablation or patching instead of attribution"
        )


def _direction(model: Any, both: Array) -> tuple[Float[Array, " D"], Float[Array, ""]]:
    """The direction after the final norm in which the first logit grows against the second; the difference of their biases."""
    projection = model.projection()
    kernel_VD = projection.kernel if projection.is_table else projection.kernel.T
    first, second = widen(kernel_VD[both])
    factor = model.config.embed_dim**-0.5 if getattr(model.config, "scale_logits", False) else 1.0
    bias = jnp.zeros(()) if projection.bias_V is None else projection.bias_V[both[0]] - projection.bias_V[both[1]]
    return (first - second) * factor, bias


def _scale_of(norm: Norm, x_D: Float[Array, " D"]) -> Float[Array, ""]:
    """What the norm multiplies its (centred) input by."""
    centred = x_D - x_D.mean() if isinstance(norm, LayerNorm) else x_D
    return jax.lax.rsqrt(jnp.square(centred).mean() + norm.epsilon)


def _through(norm: Norm, written_ND: Array, constant_D: Array) -> tuple[Array, Array]:
    """The parts of a norm's input as parts of its output: what heads wrote, and what is constant."""
    factor = _scale_of(norm, written_ND.sum(0) + constant_D) * norm.scale[...]
    if not isinstance(norm, LayerNorm):
        return written_ND * factor, constant_D * factor
    written_ND, constant_D = (part - part.mean(-1, keepdims=True) for part in (written_ND, constant_D))
    bias = 0.0 if norm.bias is None else norm.bias[...]
    return written_ND * factor, constant_D * factor + bias
