"""`manyheads export --dtype` and `--max-shard-size`: transformers loads the files, and their import is the run again."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.huggingface.ours import BERT, BERT_SPECIAL, GPT, tokenizer_json, written
from tests.huggingface.peers import loaded
from train.commands.cli import main
from train.commands.export import bytes_of
from train.huggingface.import_checkpoint import import_checkpoint
from train.run.run_files import load_run
from transformer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("config", "name"), [(BERT, "BertModel"), (GPT, "GPT2LMHeadModel")], ids=["bert", "gpt"])
def test_several_files_and_narrow_weights_come_back(config, name, dtype, tmp_path, capsys):
    import torch

    written(config, tmp_path / "hf", extra={"pad_token_id": 0, "eos_token_id": 3})
    tokenizer_json(tmp_path / "hf", BERT_SPECIAL)
    run = import_checkpoint(str(tmp_path / "hf"), tmp_path / "run", verify=False)
    out = tmp_path / "out"
    flags = ["--out", str(out), "--dtype", dtype, "--max-shard-size", "8KB"]
    assert main(["export", str(run), *flags, "--verify"]) == 0
    assert "verified against transformers" in capsys.readouterr().out
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) >= 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    largest = max(path.stat().st_size for path in out.glob("*.safetensors"))
    assert largest < 8_000 + 2_000  # the header comes on top
    narrow = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    itemsize = np.dtype(narrow).itemsize
    theirs, wrong = loaded(name, out)
    assert not wrong and theirs.dtype == getattr(torch, dtype)
    unique = {one.data_ptr(): one for one in theirs.parameters()}.values()
    assert index["metadata"]["total_size"] == itemsize * sum(one.numel() for one in unique)
    again = load_run(import_checkpoint(str(out), tmp_path / "again", verify=False))
    first = load_run(run)
    assert again.config.model == first.config.model
    kept = jax.tree.map(lambda leaf: leaf.astype(narrow).astype(np.float32), first.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, again.params))


@pytest.mark.torch
def test_a_size_is_as_transformers_takes_it():
    import transformers.utils.hub

    for size in ("5GB", "500MB", "10KB", "2GiB", "3MiB", "7KiB"):
        assert bytes_of(size) == transformers.utils.hub.convert_file_size_to_int(size)
    assert bytes_of("1000") == 1000 and bytes_of("2 gb") == 2 * 10**9


@pytest.mark.parametrize("size", ["", "5G", "0MB", "-1MB", "1.5GB", "MB", "many", "٣MB", "5 M B"])
def test_other_sizes_are_refused(size):
    with pytest.raises(UserError, match="--max-shard-size: got .*; allowed: a whole number with KB, MB, GB, KiB, MiB"):
        bytes_of(size)
