"""Every shipped config loads, opens with what a user must know, and has a step for its data; all that differs in kind trains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from tests.changed import changed
from train.config import load
from train.data.loader import train_batches
from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.source_config import FilesSource, SourceConfig, SyntheticSource
from train.data.tokenization.tokenizer import TokenizerConfig
from train.parallel.mesh import make_mesh, use_mesh
from train.run.loop import Run, check_data, train
from train.run.program import batch_shapes
from transformer.models.recurrent import RecurrentConfig

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_opens_with_command_hardware_time_and_result(path):
    opening = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    # What no machine at hand could train is there to plan with.
    command = "manyheads-bench plan" if path.parent.name == "scale" else "manyheads train"
    assert f"{command} {path.relative_to(FOLDER.parent)}" in opening
    for word in ("Hardware:", "Time:", "Expected:"):
        assert word in opening


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of all kinds, and few of them: the last evaluation reads all of the held-out ones."""
    folder = tmp_path_factory.mktemp("documents")
    texts = [f"Document {number} of forty. " + f"It says {number} and is short. " * 8 for number in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def traits(path):
    """What a config has that others may not have: settings that choose code, and no sizes."""
    config, model = load(path), load(path).model
    found = {
        "family": model.family, "dtype": model.dtype, "optimizer": config.optimizer.name, "packing": config.data.packing,
        "strategy": config.mesh.strategy, "objective": (config.objective.kind, config.data.label_kind),
        "microbatches": config.microbatches > 1, "head": getattr(getattr(model, "head", None), "kind", None),
    }  # fmt: skip
    if model.family == "recurrent":
        return set(found.items())
    found |= {"mlp": model.mlp.kind, "remat": model.remat}
    mixers = {("mixer", mixer.kind) for mixer in (model.attention, *model.pattern)}
    position = getattr(model.attention, "position", None)
    return {*found.items(), *mixers, ("position", position and position.kind)}


def covering(paths):
    """The configs that have, among them, each trait of all."""
    chosen, seen = [], set()
    for path in paths:
        if new := traits(path) - seen:
            chosen.append(path)
            seen |= new
    return chosen


def one_each(paths):
    """What is there to plan with says how many devices lie where; the others take one."""
    marks = {path: [pytest.mark.all_devices] if path.parent.name == "scale" else [] for path in paths}
    return pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=marks[path]) for path in paths])


@pytest.mark.usefixtures("one_device")
@one_each(CONFIGS)
def test_its_step_takes_the_batches_of_its_data(path, folder, tmp_path):
    config = _small(path, folder, tmp_path)
    prepared = prepare(config.data)
    check_data(config, prepared)
    batch = train_batches(
        prepared, config.data, batch_size=config.batch_size, length=config.sequence_length, seed=0, objective=config.objective
    ).batch(0)  # fmt: skip
    del batch["example"]
    described = batch_shapes(config)
    assert batch.keys() == described.keys()
    # A batch is as long as its bucket, where rows are padded.
    longest = {name: rows.shape if config.data.packing != "pad" else rows.shape[:1] for name, rows in described.items()}
    assert {name: rows.shape[: len(longest[name])] for name, rows in batch.items()} == longest
    mesh = make_mesh(config.mesh)
    with use_mesh(mesh, config.mesh.rules):
        program = Run(config, prepared, mesh).program
        state, metrics = jax.eval_shape(program.train_step, program.abstract, batch)
    for after, before in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract), strict=True):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert metrics["loss"].shape == ()


@pytest.mark.usefixtures("one_device")
@one_each(covering(CONFIGS))
def test_it_trains_a_step(path, folder, tmp_path):
    finished = train(_small(path, folder, tmp_path))
    assert finished.step == 1
    assert finished.scores.loss < 7


def _small(path, folder, tmp_path):
    """The config at a size that a test can train, with few data of the kind that it reads."""
    config = load(path)
    model = _smaller(config.model)
    objective = config.objective
    if hasattr(objective, "source_length"):
        objective = dataclasses.replace(objective, source_length=None)
    return dataclasses.replace(
        config,
        run_dir=str(tmp_path / "run"),
        init_from=None,
        steps=1,
        batch_size=config.microbatches * 8,
        length=None,
        model=model,
        # Its own sources may be a download of gigabytes: their reading is tested elsewhere.
        data=DataConfig(
            sources=(_source(config, folder),),
            # A vocabulary that exists has its special tokens already.
            tokenizer=TokenizerConfig(
                special_tokens=config.data.tokenizer.special_tokens or config.objective.special_tokens, sentinels=20
            ),
            packing=config.data.packing,
        ),
        objective=objective,
        # Samples and translations have tests of their own.
        evaluation=dataclasses.replace(config.evaluation, translations=0),
        sample=dataclasses.replace(config.sample, max_tokens=0),
    )


def _smaller(model):
    """The same kind of model, whose parts have the same settings and small sizes."""
    sizes = {"vocab_size": 512, "max_length": 32, "num_layers": 2, "embed_dim": 32}
    if getattr(model, "source_vocab_size", None) is not None:
        sizes["source_vocab_size"] = 512
    if isinstance(model, RecurrentConfig):
        attention = changed(model.attention, **({"dim": None} if hasattr(model.attention, "dim") else {}))
        return dataclasses.replace(model, **sizes, hidden_dim=32, encoder_dim=None, attention=attention)

    def mixer(one):
        known = {"num_heads": 4, "num_kv_heads": 2 if getattr(one, "num_kv_heads", None) else None, "head_dim": None}
        return changed(one, **{name: size for name, size in known.items() if hasattr(one, name)})

    mlp = {"dim": None} | ({"num_experts": 4} if model.mlp.kind == "experts" else {})
    if getattr(model, "embedding_size", None) is not None:
        sizes["embedding_size"] = 16
    pattern = tuple(map(mixer, model.pattern[:3]))
    sizes["num_layers"] = max(len(pattern), 2)
    return changed(model, **sizes, attention=mixer(model.attention), pattern=pattern, mlp=mlp)


def _source(config, folder) -> SourceConfig:
    """A small source of the same kind of documents: with the same labels, pairs, or single texts."""
    first = config.data.sources[0]
    if isinstance(first, SyntheticSource):
        return dataclasses.replace(first, limit=100)
    if config.data.labelled:
        return _labelled_source(config, folder)
    if config.data.pairs:
        return SyntheticSource(limit=100)
    return FilesSource(path=str(folder / "texts.jsonl"))


def _labelled_source(config, folder) -> SourceConfig:
    (label,) = {source.label_field for source in config.data.sources}
    first, kind = config.data.sources[0], config.data.label_kind
    choices, rows = first.choice_fields, []
    # The answer of a question has no class.
    classes = len(choices) or getattr(config.model.head, "num_labels", 1)
    for number in range(120):
        row = {"first": f"text {number}", label: number % classes}
        if kind == "number":
            row[label] = number / 60
        elif kind == "tags":
            row |= {"first": [f"w{place}" for place in range(classes)], label: [str(place) for place in range(classes)]}
        elif kind == "answers":
            row[label] = {"text": ["of"], "answer_start": [5]}
        row |= {"second": "some of it"} | dict.fromkeys(choices, "goes on")
        rows.append(json.dumps(row) + "\n")
    path = folder / f"{config.name}.jsonl"
    path.write_text("".join(rows))
    return FilesSource(
        path=str(path), text_field="first", target_field="second" if first.target_field else "",
        choice_fields=choices, label_field=label, label_kind=kind,
    )  # fmt: skip
