"""`manyheads-bench finetuning`: a classifier fine-tuned here, by transformers, and here with low-rank adapters.

All begin with the same pretrained weights, read the same batches in the same order, and have the same settings (adapters: a
learning rate of their own); each of several seeds is scored at its last step on the same held-out documents.

    DIRECTORY/FINGERPRINT/weights/          the import
    DIRECTORY/FINGERPRINT/manyheads-0/      a run: arm and seed
    DIRECTORY/FINGERPRINT/manyheads-0.json  its figures; there once it is finished
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks import record
from benchmarks.encoders.reviews import CONFIG, MINILM
from benchmarks.stage import classify, folder_of, once, over_seeds, scored_at_the_end
from train.config import RunConfig, load, to_data
from train.data.labelled import commonest_share
from train.data.loader import evaluation_batches, train_batches
from train.data.prepare import prepare
from train.data.store import Prepared
from train.hf.bring import bring
from train.hf.source import fetch
from train.optimizer import make_schedule
from transformer.layers.adapter import AdapterConfig
from transformer.models.bert import BertConfig

ARMS = ("manyheads", "transformers", "LoRA")
ADAPTER = AdapterConfig(rank=4, alpha=8.0)
ADAPTER_RATE = 1e-3
SEEDS = 5
DIRECTORY = "runs/finetuning"


def run(
    seeds: int = SEEDS, directory: str = DIRECTORY, *, config: Path = CONFIG, source: str = MINILM
) -> dict[str, Any]:
    """Fine-tune in every arm with each seed, print and save. What is finished is not run again.

    Args:
        seeds: how many, from 0.
        directory: where runs and figures are kept.
        source: of the weights, as of `manyheads import`.
        config: of the fine-tuning; its `init_from` and tokenizer are those of the import.

    Raises:
        UserError: whatever `train` raises, and an interruption.
    """
    tuning = load(config)
    folder = folder_of(directory, to_data(tuning), dataclasses.asdict(ADAPTER), ADAPTER_RATE)
    print(f"fine-tuning {tuning.name}; everything is kept in {folder}", flush=True)
    weights = folder / "weights"
    if not weights.exists():
        bring(source, weights, verify=False)
    tokenizer = dataclasses.replace(tuning.data.tokenizer, path=str(weights / "tokenizer" / "tokenizer.json"))
    data = dataclasses.replace(tuning.data, tokenizer=tokenizer)
    tuning = scored_at_the_end(dataclasses.replace(tuning, init_from=str(weights), data=data))
    prepared = prepare(tuning.data, progress=False)
    makers: dict[str, Callable[[RunConfig], dict[str, float]]] = {
        "manyheads": lambda config: classify(config, "finetuning"),
        "transformers": lambda config: _theirs(config, prepared, source),
        "LoRA": lambda config: classify(_adapted(config), "finetuning"),
    }
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            name = f"{arm}-{seed}"
            seeded = dataclasses.replace(tuning, seed=seed, run_dir=str(folder / name))
            figures = once(folder / f"{name}.json", functools.partial(makers[arm], seeded))
            found[arm].append(figures["accuracy"])
            seconds[arm].append(figures["seconds"])
            print(f"{arm}, seed {seed}: accuracy {figures['accuracy']:.2%}, {figures['seconds']:.0f} s", flush=True)
    result = {
        "classifier": tuning.name,
        "steps": tuning.steps,
        "batch_size": tuning.batch_size,
        "length": tuning.sequence_length,
        "held_out_documents": sum(array.documents for array in prepared.validation),
        "commonest_class": commonest_share(prepared.validation),
        "accuracies": found,
        "finetuned": {arm: over_seeds(values) for arm, values in found.items()},
        "seconds": seconds,
    }
    print(json.dumps(result["finetuned"], indent=2))
    record.save(
        "finetuning", "manyheads-bench finetuning" + (f" --seeds {seeds}" if seeds != SEEDS else ""), result, show=False
    )
    return result


def _adapted(config: RunConfig) -> RunConfig:
    optimizer = dataclasses.replace(config.optimizer, learning_rate=ADAPTER_RATE)
    return dataclasses.replace(config, adapter=ADAPTER, optimizer=optimizer)


def _theirs(config: RunConfig, prepared: Prepared, source: str) -> dict[str, float]:
    """The same training by transformers' model and torch's optimiser."""
    import torch
    import transformers

    torch.manual_seed(config.seed)
    assert isinstance(config.model, BertConfig)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        fetch(source), num_labels=config.model.num_labels, attn_implementation="sdpa"
    ).train()
    o, schedule = config.optimizer, make_schedule(config.optimizer, config.steps)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.epsilon, fused=True)
    options: dict[str, Any] = {
        "batch_size": config.batch_size, "length": config.sequence_length, "objective": config.objective,
        "process_index": 0, "process_count": 1,
    }  # fmt: skip
    batches = train_batches(prepared, config.data, seed=config.seed, **options).iterate(0)
    for step in track(range(config.steps), description=f"transformers, seed {config.seed}", transient=True):
        inputs, labels, _ = _tensors(next(batches))
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        if o.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    right = total = loss = 0.0
    with torch.no_grad():
        for batch in evaluation_batches(prepared, config.data, max_batches=None, **options):
            inputs, labels, real = _tensors(batch)
            logits = model(**inputs).logits[real]
            right += float((logits.argmax(-1) == labels[real]).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, labels[real], reduction="sum"))
            total += float(real.sum())
    return {"accuracy": right / total, "loss": loss / total}


def _tensors(batch: dict[str, np.ndarray]) -> tuple[dict[str, Any], Any, Any]:
    """The model's inputs, the labels, and which rows are none that only fill the batch."""
    import torch

    tensors = {name: torch.tensor(np.asarray(array)) for name, array in batch.items()}
    inputs = {"input_ids": tensors["tokens"].long(), "attention_mask": (tensors["segments"] > 0).long()}
    return inputs, tensors["labels"].long(), tensors["weights"][:, 0] > 0
