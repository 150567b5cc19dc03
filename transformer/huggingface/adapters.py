"""Low-rank adapters in PEFT's format: low-rank matrices of each adapted layer, and whole modules trained in addition to them.

I inputs of a layer, O outputs of it, r rank, M layers that one tensor of theirs concatenates.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from transformer.errors import UserError
from transformer.huggingface.mapping import Layout, Matrix, Path, Tables, TensorRule, Vector
from transformer.layers.adapter import AdapterConfig

_PREFIX = "base_model.model."
_TASKS = {
    "classification": "SEQ_CLS", "tokens": "TOKEN_CLS", "answer": "QUESTION_ANS", "embedding": "FEATURE_EXTRACTION",
    "gpt": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "vaswani": "SEQ_2_SEQ_LM",
}  # fmt: skip
"""PEFT's task by the model's head, or by its family if it has no choice of heads."""
_OWN_MODULES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks for which PEFT expects a head among the modules that are kept whole."""


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """The contents of a PEFT folder."""

    config: dict[str, Any]
    """adapter_config.json."""
    tensors: dict[str, np.ndarray]
    """adapter_model.safetensors."""


def to_peft(
    tables: Tables,
    ours: Mapping[Path, Any],
    adapter: AdapterConfig,
    trained: Collection[Path],
    *,
    model: Any,
    base: str,
) -> PeftAdapter:
    """An adapted model's adapters, and the modules that were trained in addition to them.

    If their tensor concatenates M layers, M adapters of rank r become one of rank M · r. The product is the same, because B
    is zero except where an output belongs to the adapter of that part of the rank.

    Args:
        ours: all parameters of the adapted model.
        trained: paths of those that were trained.
        model: the plain model's config.
        base: the base model of the adapters, as `from_pretrained` takes it.

    Raises:
        UserError: only a part of a tensor, or only a layer of a stack, was trained, which PEFT cannot represent.
    """
    tensors: dict[str, np.ndarray] = {}
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    modules: dict[str, None] = {}
    for rule in tables.rules:
        adapted = [path for path in rule.paths if (*path[:-1], "adapter", "lora_a") in ours and path[-1] == "kernel"]
        module = rule.theirs.rpartition(".")[0]
        if adapted:
            pattern = re.escape(module).replace(r"\{\}", r"\d+")
            targets.append(pattern)
            if len(adapted) > 1:
                many = len(adapted)
                ranks[pattern] = many * adapter.rank
                # The factor stays alpha / r, or alpha / sqrt(r).
                alphas[pattern] = adapter.alpha * (math.sqrt(many) if adapter.rank_stabilized else many)
            tensors |= dict(_matrices(rule, adapted, ours, module))
        elif any(path in trained for path in rule.paths):
            if rule.stacked or not all(path in trained for path in rule.paths):
                raise UserError(
                    f"{rule.theirs}: adapter.train_also trains it in addition to the adapters, which PEFT supports only for "
                    "whole modules outside the layers; export the merged model instead of the adapters"
                )
            modules[module] = None
    for rule in tables.rules:
        # A module is kept whole, including what was not trained of it.
        if (module := rule.theirs.rpartition(".")[0]) in modules:
            held = rule.layout.give([np.asarray(jax.device_get(ours[path])) for path in rule.paths])
            tensors[_PREFIX + rule.theirs] = np.ascontiguousarray(held)
    task = _TASKS.get(model.head.kind if hasattr(model, "head") else model.family)
    if task in _OWN_MODULES and not modules:
        task = None
    is_conv1d = any(isinstance(rule.layout, Matrix) and not rule.layout.transposed for rule in tables.rules)
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.kind == "dora",
        "use_rslora": adapter.rank_stabilized,
        "bias": "none",
        "fan_in_fan_out": is_conv1d,
        "target_modules": "|".join(targets),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": list(modules) or None,
    }
    return PeftAdapter(config, tensors)


def _matrices(
    rule: TensorRule, adapted: list[Path], ours: Mapping[Path, Any], module: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and tensor of each layer's low-rank matrices, and of its norms (DoRA)."""
    held = {path: _held(ours, path) for path in rule.paths}
    num_in = rule.layout.num_in if isinstance(rule.layout, Matrix) else 1
    for number in range(held[adapted[0]]["kernel"].shape[0]) if rule.stacked else [0]:
        layer = {
            path: {name: one[number] if rule.stacked else one for name, one in all.items()}
            for path, all in held.items()
        }
        name = _PREFIX + module.format(number)
        rank = layer[adapted[0]]["lora_a"].shape[-1]
        a_IR = np.concatenate([layer[path]["lora_a"].reshape(-1, rank) for path in adapted], axis=1)
        yield f"{name}.lora_A.weight", np.ascontiguousarray(a_IR.T)
        b = [np.zeros((a_IR.shape[1], *layer[path]["kernel"].shape[num_in:]), np.float32) for path in rule.paths]
        for place, path in enumerate(adapted):
            b[rule.paths.index(path)][place * rank : (place + 1) * rank] = layer[path]["lora_b"]
        yield f"{name}.lora_B.weight", np.ascontiguousarray(_of_outputs(rule.layout).give(b))
        if "magnitude" in layer[adapted[0]]:
            lengths = [
                one.get("magnitude", np.sqrt(np.square(one["kernel"]).sum(tuple(range(num_in)))))
                for one in layer.values()
            ]
            yield f"{name}.lora_magnitude_vector", _of_bias(rule.layout).give(lengths)


def _held(ours: Mapping[Path, Any], path: Path) -> dict[str, np.ndarray]:
    """A kernel, and the parameters of its adapter."""
    paths = {"kernel": path} | {name: (*path[:-1], "adapter", name) for name in ("lora_a", "lora_b", "magnitude")}
    return {name: np.asarray(jax.device_get(ours[one])) for name, one in paths.items() if one in ours}


def _of_outputs(layout: Layout) -> Layout:
    """The layout in torch of a linear layer from r features to the outputs of a layer with this layout."""
    return Matrix() if isinstance(layout, Matrix) else layout


def _of_bias(layout: Layout) -> Layout:
    """The layout of the bias of a layer with this layout."""
    return Vector() if isinstance(layout, Matrix) else layout
