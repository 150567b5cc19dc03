"""`manyheads prepare`: tokenise a config's data, without training."""

from __future__ import annotations

import argparse

from train.commands.command import Command, load_config


def run(options: argparse.Namespace) -> None:
    config = load_config(options)
    from train.data.prepared.prepare import prepare
    from train.data.prepared.store import Split
    from train.run.begin import check_data, with_data

    prepared = prepare(config.data)
    check_data(with_data(config, prepared), prepared)
    meta = prepared.meta
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        for counts in meta.counts(split):
            skipped = f", {counts.skipped} documents skipped" if counts.skipped else ""
            print(
                f"{split:10}  {counts.name}: {counts.documents:,} documents, {counts.tokens:,} tokens, "
                f"{counts.bytes:,} bytes{skipped}"
            )
    print(
        f"vocabulary  {meta.vocab_size:,} tokens, {meta.bytes_per_token('train'):.2f} bytes each in the training text"
    )
    print(f"folder      {prepared.directory}")


COMMAND = Command(
    name="prepare", help="tokenise a config's data into the cache, without training", run=run, takes_config=True
)
