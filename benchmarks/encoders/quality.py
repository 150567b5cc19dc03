"""`manyheads-bench finetuning`: a classifier fine-tuned here, by transformers, and here with low-rank adapters.

All begin with the same pretrained weights, read the same batches in the same order, and have the same settings (adapters: a
separate learning rate, chosen on seed 0); each of several seeds is scored at its last step on the same held-out documents.

    DIRECTORY/FINGERPRINT/weights/           the import
    DIRECTORY/FINGERPRINT/manyheads-0/       a run: arm and seed, and for adapters their learning rate
    DIRECTORY/FINGERPRINT/manyheads-0.json   its figures; exists once it is finished
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks import record
from benchmarks.encoders.reviews import CONFIG, MINILM
from benchmarks.stage import classify, folder_of, load, once, over_seeds, scored_at_the_end
from train.config import RunConfig, to_data
from train.data.evaluation import evaluation_batches
from train.data.examples.labelled import commonest_share
from train.data.loader import train_batches
from train.data.prepared.prepare import prepare
from train.data.prepared.store import Prepared
from train.huggingface.import_checkpoint import import_checkpoint
from train.huggingface.source import fetch
from train.optimizer import make_schedule
from transformer.huggingface.encoders import num_labels_of
from transformer.layers.adapter import AdapterConfig
from transformer.models.bert import BertConfig

OURS, THEIRS, LORA = ARMS = ("manyheads", "transformers", "LoRA")
ADAPTER = AdapterConfig(rank=8, alpha=16.0, train_also=("pooled_head.out.*",))
"""Changes of the fine-tuning config: the pretrained pooler is kept."""
ADAPTER_RATES = (5e-4, 1e-3)
"""Candidates for the adapters' learning rate; the accuracy with seed 0 decides."""
SEEDS = 5
DIRECTORY = "runs/finetuning"


def run(
    seeds: int = SEEDS, directory: str = DIRECTORY, *, config: Path = CONFIG, source: str = MINILM
) -> dict[str, Any]:
    """Fine-tune in every arm with each seed, print and save. Finished runs are not repeated.

    Args:
        seeds: how many, from 0.
        directory: where runs and figures are kept.
        source: of the weights, as in `manyheads import`.
        config: of the fine-tuning; its `init_from` and tokenizer are those of the import.

    Raises:
        UserError: errors of `train`, or an interruption.
    """
    tuning = load(config)
    folder = folder_of(directory, to_data(tuning), dataclasses.asdict(ADAPTER))
    print(f"fine-tuning {tuning.name}; runs and figures are stored in {folder}", flush=True)
    weights = folder / "weights"
    if not weights.exists():
        import_checkpoint(source, weights, verify=False)
    tokenizer = dataclasses.replace(tuning.data.tokenizer, path=str(weights / "tokenizer" / "tokenizer.json"))
    data = dataclasses.replace(tuning.data, tokenizer=tokenizer)
    tuning = scored_at_the_end(dataclasses.replace(tuning, init_from=str(weights), data=data))
    prepared = prepare(tuning.data, progress=False)

    def figures(arm: str, seed: int, rate: float | None = None) -> dict[str, float]:
        name = f"{arm}-{seed}" if rate is None else f"{arm}-{rate:g}-{seed}"
        config = dataclasses.replace(tuning, seed=seed, run_dir=str(folder / name))
        if rate is not None:
            optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
            config = dataclasses.replace(config, adapter=ADAPTER, optimizer=optimizer)
        work = (
            (lambda: _theirs(config, prepared, source)) if arm == THEIRS else (lambda: classify(config, "finetuning"))
        )
        found = once(folder / f"{name}.json", work)
        print(f"{name}: accuracy {found['accuracy']:.2%}, {found['seconds']:.0f} s", flush=True)
        return found

    tried = {rate: figures(LORA, 0, rate)["accuracy"] for rate in ADAPTER_RATES}
    best = max(ADAPTER_RATES, key=lambda rate: tried[rate])
    found = {arm: [figures(arm, seed, best if arm == LORA else None) for seed in range(seeds)] for arm in ARMS}
    result = {
        "classifier": tuning.name,
        "steps": tuning.steps,
        "batch_size": tuning.batch_size,
        "length": tuning.sequence_length,
        "held_out_documents": sum(array.documents for array in prepared.validation),
        "commonest_class": commonest_share(prepared.validation),
        "adapter": dataclasses.asdict(ADAPTER) | {"learning_rate": best},
        "tried_with_seed_0": {f"{rate:g}": accuracy for rate, accuracy in tried.items()},
        "accuracies": {arm: [one["accuracy"] for one in each] for arm, each in found.items()},
        "finetuned": {arm: over_seeds([one["accuracy"] for one in each]) for arm, each in found.items()},
        "seconds": {arm: [one["seconds"] for one in each] for arm, each in found.items()},
    }
    print(json.dumps(result["finetuned"], indent=2))
    command = "manyheads-bench finetuning" + (f" --seeds {seeds}" if seeds != SEEDS else "")
    results = record.folder_for(directory, DIRECTORY, "finetuning", command)
    record.save("finetuning", command, result, show=False, folder=results)
    return result


def _theirs(config: RunConfig, prepared: Prepared, source: str) -> dict[str, float]:
    """The same training by transformers' model and torch's optimiser."""
    import torch
    import transformers

    torch.manual_seed(config.seed)
    assert isinstance(config.model, BertConfig)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        fetch(source), num_labels=num_labels_of(config.model), attn_implementation="sdpa"
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
    """The model's inputs, the labels, and which rows are not padding of the batch."""
    import torch

    tensors = {name: torch.tensor(np.asarray(array)) for name, array in batch.items()}
    inputs = {"input_ids": tensors["tokens"].long(), "attention_mask": (tensors["segments"] > 0).long()}
    return inputs, tensors["labels"].long(), tensors["weights"][:, 0] > 0
