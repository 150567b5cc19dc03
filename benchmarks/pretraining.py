"""`manyheads-bench pretraining`: the benefit of a pretrained encoder for a classifier.

An encoder is pretrained as a masked language model once. Then the same classifier is trained from its weights and from random
ones, with each of several seeds, and both are scored on the same held-out documents.

    DIRECTORY/FINGERPRINT/encoder/                   the pretraining run
    DIRECTORY/FINGERPRINT/pretrained-0.0003-0/       a classifier's run: arm, learning rate, seed
    DIRECTORY/FINGERPRINT/pretrained-0.0003-0.json   its figures; exists once it is finished
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.stage import CONFIGS, classify, folder_of, load, once, over_seeds, scored_at_the_end, train_to_the_end
from train.config import RunConfig, to_data
from train.data.examples.labelled import commonest_share
from train.data.prepared.prepare import prepare

ENCODER = CONFIGS / "encoder_reviews_small.yaml"
CLASSIFIER = CONFIGS / "classify_reviews.yaml"
SEEDS = 5
DIRECTORY = "runs/pretraining"
ARMS = ("pretrained", "random")
LEARNING_RATES = (3e-4, 1e-3)
"""Candidate learning rates; for each arm the accuracy with seed 0 decides."""


def run(
    seeds: int = SEEDS, directory: str = DIRECTORY, *, encoder: Path = ENCODER, classifier: Path = CLASSIFIER
) -> dict[str, Any]:
    """Pretrain, fine-tune with each seed in both arms, print and save. Finished runs are not repeated.

    Args:
        seeds: how many, from 0.
        directory: where runs and figures are kept, in a folder for each pair of configs.
        encoder: config of the pretraining.
        classifier: config of the fine-tuning, whose `init_from` and tokenizer are those of the encoder's run.

    Raises:
        UserError: errors of `train`, or an interruption.
    """
    pretraining, tuning = load(encoder), load(classifier)
    folder = folder_of(directory, to_data(pretraining), to_data(tuning))
    print(f"pretraining {pretraining.name}; runs and figures are stored in {folder}", flush=True)
    pretraining = dataclasses.replace(pretraining, run_dir=str(folder / "encoder"))
    score = train_to_the_end(pretraining, "pretraining")["eval/loss"]
    print(f"pretrained for {pretraining.steps} steps: held-out loss {score:.4f}", flush=True)

    tokenizer = dataclasses.replace(
        tuning.data.tokenizer, path=str(folder / "encoder" / "tokenizer" / "tokenizer.json")
    )
    tuning = scored_at_the_end(dataclasses.replace(tuning, data=dataclasses.replace(tuning.data, tokenizer=tokenizer)))
    tried = {(arm, rate): _figures(tuning, folder, arm, rate, 0) for rate in LEARNING_RATES for arm in ARMS}
    rates = {arm: max(LEARNING_RATES, key=lambda rate: tried[arm, rate]["accuracy"]) for arm in ARMS}
    print(
        "learning rates, chosen on seed 0: " + ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items()), flush=True
    )
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            found[arm].append(_figures(tuning, folder, arm, rates[arm], seed)["accuracy"])

    prepared = prepare(tuning.data, progress=False)
    differences = [one - other for one, other in zip(*found.values(), strict=True)]
    result = {
        "encoder": pretraining.name,
        "classifier": tuning.name,
        "pretraining_steps": pretraining.steps,
        "pretraining_loss": score,
        "steps": tuning.steps,
        "held_out_documents": sum(array.documents for array in prepared.validation),
        "commonest_class": commonest_share(prepared.validation),
        "learning_rates": rates,
        "tried_with_seed_0": {f"{arm} {rate:g}": one["accuracy"] for (arm, rate), one in tried.items()},
        "accuracies": found,
        "accuracy": {arm: over_seeds(values) for arm, values in found.items()},
        "difference": over_seeds(differences),
    }
    _show(result)
    command = "manyheads-bench pretraining" + (f" --seeds {seeds}" if seeds != SEEDS else "")
    results = record.folder_for(directory, DIRECTORY, "pretraining", command)
    record.save("pretraining", command, result, show=False, folder=results)
    return result


def _figures(tuning: RunConfig, folder: Path, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """The score of one classifier at its last step: trained now, or read if it is already finished."""
    directory = folder / f"{arm}-{rate:g}-{seed}"
    config = dataclasses.replace(
        tuning,
        run_dir=str(directory),
        seed=seed,
        init_from=str(folder / "encoder") if arm == "pretrained" else None,
        optimizer=dataclasses.replace(tuning.optimizer, learning_rate=rate),
    )
    figures = once(Path(f"{directory}.json"), lambda: classify(config, "pretraining"))
    print(
        f"{arm}, learning rate {rate:g}, seed {seed}: accuracy {figures['accuracy']:.2%}, {figures['seconds']:.0f} s",
        flush=True,
    )
    return figures


def _show(result: dict[str, Any]) -> None:
    print(
        f"\nheld-out accuracy on {result['held_out_documents']} documents; the commonest class: {result['commonest_class']:.2%}"
    )
    print("  ".join([f"{'seed':>12}", *(f"{arm:>10}" for arm in ARMS), "difference"]))
    for seed, pair in enumerate(zip(*result["accuracies"].values(), strict=True)):
        print("  ".join([f"{seed:12}", *(f"{value:10.2%}" for value in pair), f"{pair[0] - pair[1]:+10.2%}"]))
    both = [*result["accuracy"].values(), result["difference"]]
    print("  ".join([f"{'mean':>12}", *(f"{one['mean']:10.2%}" for one in both)]))
    print("  ".join([f"{'deviation':>12}", *(f"{one['deviation']:10.2%}" for one in both)]))
