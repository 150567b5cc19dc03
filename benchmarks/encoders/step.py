"""`manyheads-bench finetuning-step`: a step of fine-tuning an encoder compared with transformers' in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import peer
from benchmarks.record import ratio, save, speeds_in_turn, summary
from benchmarks.workload import OPTIMIZER, our_step, padded, random_batch
from train.config import RunConfig
from train.objectives import Classification
from train.parallel.hardware import utilization
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.families import flops_per_token
from transformer.models.heads import ClassificationHeadConfig


def workload() -> RunConfig:
    """all-MiniLM-L6-v2's shape in float32 on a CPU; BERT's base model in bfloat16, 32 × 128, without attention dropout, on an
    accelerator."""
    if jax.default_backend() == "cpu":
        # A few layers compile quickly without a scan, and XLA:CPU then copies nothing in and out of stacks.
        small = BertConfig(
            head=ClassificationHeadConfig(),
            num_layers=6,
            embed_dim=384,
            attention=SoftmaxConfig(num_heads=12),
            scan_layers=False,
        )
        return _of(small, length=48)
    return _of(BertConfig(head=ClassificationHeadConfig(), dtype="bfloat16", attention_dropout=0.0), length=128)


def _of(model: BertConfig, length: int) -> RunConfig:
    return RunConfig(
        name="benchmark", batch_size=32, length=length, model=model, objective=Classification(),
        optimizer=OPTIMIZER,
    )  # fmt: skip


def run(
    rounds: int, steps: int, work: RunConfig | None = None, *, case: str = "plain", compiled_peer: bool = False
) -> dict[str, Any]:
    """Tokens per second of each, in turn, and the ratio. Both use dropout 0.1, clipping and AdamW.

    Args:
        rounds: how often the candidates take turns.
        steps: training steps in a turn.
        work: model and batch; the device's usual ones by default.
        case: plain, or padded: rows of half the length to the whole.
        compiled_peer: also compare with torch.compile.
    """
    work = workload() if work is None else work
    model = work.model
    assert isinstance(model, BertConfig)
    batch = random_batch(work)
    batch = padded(batch) if case == "padded" else batch
    candidates: dict[str, Callable[[], object]] = {
        "manyheads": our_step(work, batch),
        "torch": _torch_step(work, batch, compiled=False),
    }
    if compiled_peer:
        candidates["torch compiled"] = _torch_step(work, batch, compiled=True)
    speeds = speeds_in_turn(candidates, rounds, steps, work.tokens_per_step)
    flops = 3 * flops_per_token(model, work.sequence_length)
    result: dict[str, Any] = {
        "case": case,
        "workload": f"BERT with a classifier, {model.num_layers} layers, {model.embed_dim} wide, "
        f"{model.attention.num_heads} heads, "
        f"batch {work.batch_size} × {work.sequence_length}, {model.dtype}, dropout {model.dropout:g} "
        f"(attention {model.attention_dropout:g}), AdamW, clipping",
        "tokens_per_second": {name: summary(speed) for name, speed in speeds.items()},
        "flops_per_token": flops,
        "finetuning_ratio_to": {
            name: ratio(speeds["manyheads"], speed) for name, speed in speeds.items() if name != "manyheads"
        },
    }
    median = result["tokens_per_second"]["manyheads"]["median"]
    result["mfu"] = utilization(median * flops, jax.devices()[:1], model.dtype)
    name, option = ("finetuning_step", "") if case == "plain" else (f"finetuning_step_{case}", f" --case {case}")
    option += " --compiled-peer" if compiled_peer else ""
    save(name, f"manyheads-bench finetuning-step{option} --rounds {rounds} --steps {steps}", result)
    return result


def _torch_step(work: RunConfig, batch: dict[str, np.ndarray], *, compiled: bool) -> Callable[[], object]:
    import torch

    model = peer.bert_classifier(work.model)
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["segments"], "labels": batch["labels"]}

    def loss_of(**tensors: Any) -> Any:
        return model(**tensors).loss

    return peer.training_step(work, model, inputs, torch.compile(loss_of) if compiled else loss_of)
