"""Every shipped config loads, opens with what a user must know, and has a step for its data; all that differs in kind trains."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import pytest

from tests.shrunk import shrunk, write_documents
from train.config import load
from train.data.loader import train_batches
from train.data.prepared.prepare import prepare
from train.parallel.mesh import make_mesh, use_mesh
from train.program.program import batch_shapes
from train.run.begin import check_data
from train.run.loop import train
from train.run.steps import Run

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
    folder = tmp_path_factory.mktemp("documents")
    write_documents(folder)
    return folder


@functools.cache
def config_of(path):
    return load(path)


def traits(path):
    """What a config has that others may not have: settings that choose code, and no sizes."""
    config = config_of(path)
    model = config.model
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
    """Few configs that have, among them, each trait of all: always the one that has most of those still missing."""
    chosen, missing = [], set().union(*map(traits, paths))
    while missing:
        chosen.append(max(paths, key=lambda path: len(traits(path) & missing)))
        missing -= traits(chosen[-1])
    return chosen


def one_each(paths):
    """What is there to plan with says how many devices lie where; the others take one."""
    marks = {path: [pytest.mark.all_devices] if path.parent.name == "scale" else [] for path in paths}
    return pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=marks[path]) for path in paths])


@pytest.mark.usefixtures("one_device")
@one_each(CONFIGS)
def test_its_step_takes_the_batches_of_its_data(path, folder, tmp_path):
    config = dataclasses.replace(shrunk(config_of(path), folder), run_dir=str(tmp_path / "run"))
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
    # How many documents a row has depends on the data.
    longest = {name: shape[:-1] if name.endswith("lengths") else shape for name, shape in longest.items()}
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
    finished = train(dataclasses.replace(shrunk(config_of(path), folder), run_dir=str(tmp_path / "run")))
    assert finished.step == 1
    assert finished.scores.loss < 7
