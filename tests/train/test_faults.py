"""Faults injected into runs: signals in each phase, full disks, dead threads, data and clocks that change, and hangs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.devices import on_one_device
from tests.train.run_records import surroundings
from train.checkpoints import stored
from train.checkpoints.checkpoint import Checkpoints
from train.config import dump, load
from train.examine.verify_resume import compare
from train.parallel.runtime import Watchdog
from train.report.display import Display
from train.report.meter import Meter
from train.run.evaluate import Evaluator
from train.run.loop import train
from train.run.run_files import finished_step
from train.run.steps import Run
from transformer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def config(corpus, config_file, tmp_path_factory):
    """A run over a corpus of its own, which a test may change."""
    own = shutil.copytree(corpus, tmp_path_factory.mktemp("faults") / "corpus")
    return load(config_file, [f'--data.sources=[{{"kind": "files", "path": "{own}/*.txt"}}]', "--sample.every", "6"])


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "undisturbed"
    with on_one_device():
        train(dataclasses.replace(config, run_dir=str(folder)))
    return folder


def when(patch, owner, name, number, act):
    """Call `act` when the method `name` is called for the `number`th time, before the call itself."""
    real, calls = getattr(owner, name), []

    def called(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(*arguments, **options)

    patch.setattr(owner, name, called)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


PHASES = {
    "its first step": (Meter, "push", 1),
    "a step": (Meter, "push", 2),
    "a save": (Checkpoints, "save", 1),
    "an evaluation": (Evaluator, "evaluate", 1),
    "reading a checkpoint": (stored, "restore", 2),
    "a sample": (Run, "sample", 1),
    "its first line": (Display, "say", 1),
    "the last evaluation": (Evaluator, "evaluate", 2),
    "the end": (Checkpoints, "wait", 1),
}


def test_signals_in_each_phase_change_nothing(config, undisturbed, tmp_path):
    run, seen = dataclasses.replace(config, run_dir=str(tmp_path)), []
    for phase, (owner, name, number) in PHASES.items():
        with pytest.MonkeyPatch.context() as patch:
            when(patch, owner, name, number, terminate)
            ended = train(run)
        if ended.interrupted:
            assert ended.signal == signal.SIGTERM
            seen.append(phase)
    train(run)
    assert len(seen) >= len(PHASES) - 1
    assert finished_step(tmp_path) == config.steps
    assert compare(undisturbed, tmp_path, exact=True) == []


def test_a_clock_that_jumps_changes_nothing(config, undisturbed, tmp_path, monkeypatch):
    real, jumped = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + jumped[0])
    for day, number in ((-86_400.0, 3), (2 * 86_400.0, 7)):
        when(monkeypatch, Meter, "push", number, lambda day=day: jumped.__setitem__(0, day))
    run = dataclasses.replace(config, run_dir=str(tmp_path))
    train(dataclasses.replace(run, checkpoint=dataclasses.replace(config.checkpoint, every_minutes=60.0)))
    assert compare(undisturbed, tmp_path, exact=True) == []


def test_data_that_changes_under_a_run_is_not_read(config, undisturbed, tmp_path):
    (source,) = config.data.sources
    one = sorted(Path(source.path).parent.glob("*.txt"))[3]
    before, times = one.read_text(), one.stat()
    run = dataclasses.replace(config, run_dir=str(tmp_path))
    try:
        with pytest.MonkeyPatch.context() as patch:
            when(patch, Meter, "push", 5, lambda: one.write_text("Other text. " * 50))
            when(patch, Meter, "push", 7, terminate)
            assert train(run).interrupted
        with pytest.raises(UserError, match=r"the checkpoint of step \d+.*other data"):
            train(run)
    finally:
        one.write_text(before)
        os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    train(run)
    assert compare(undisturbed, tmp_path, exact=True) == []


def test_a_thread_of_the_loader_that_dies_ends_the_run(config, tmp_path):
    from train.data.loader import MixedBatches

    def die():
        raise RuntimeError("this thread dies")

    with pytest.MonkeyPatch.context() as patch:
        when(patch, MixedBatches, "batch", 5, die)
        with pytest.raises(RuntimeError, match="this thread dies"):
            train(dataclasses.replace(config, run_dir=str(tmp_path)))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place):
    """Use up the disk."""
    with (place / "filler").open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1024))


# Trains as the command line does, and fills the disk before each save but the first.
ON_A_FULL_DISK = """
import sys
from pathlib import Path
import pytest
from tests.train.test_faults import fill, when
from train.checkpoints.checkpoint import Checkpoints
from train.commands.cli import main
place = Path(sys.argv.pop(1))
with pytest.MonkeyPatch.context() as patch:
    for number in (2, 3, 4):
        when(patch, Checkpoints, "save", number, lambda: fill(place))
    when(patch, Checkpoints, "after_failure", 2, lambda: fill(place))
    sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_ends_a_run_at_its_end_and_not_before(config, undisturbed, small_disk, tmp_path):
    run = dataclasses.replace(config, run_dir=str(small_disk / "run"))
    (tmp_path / "config.yaml").write_text(dump(run))
    command = [
        sys.executable,
        "-c",
        ON_A_FULL_DISK,
        str(small_disk),
        "train",
        str(tmp_path / "config.yaml"),
        "--devices",
        "1",
    ]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=root, env=surroundings(), check=False)
    assert ended.returncode == 2 and "training continues" in ended.stdout
    # One line, and above it at most those that orbax logs of an error, and one about metrics, which the disk refuses too.
    others = ("tokenising", "ERROR:absl:", "metrics cannot be written ([Errno 28] No space left on device)")
    (line,) = (one for one in ended.stderr.splitlines() if one and not one.startswith(others))
    assert re.search(r"manyheads: .*cannot write a checkpoint .*No space left", line)
    assert "Traceback" not in ended.stdout + ended.stderr
    (small_disk / "filler").unlink()
    train(run)
    assert compare(undisturbed, small_disk / "run", exact=True) == []


def test_a_full_disk_leaves_no_part_of_a_file(undisturbed, small_disk, texts, encoder, capsys):
    from train.commands.cli import main

    fill(small_disk)
    commands = {
        "vectors.npy": ["embed", str(encoder), "--file", str(texts)],
        "vectors.parquet": ["embed", str(encoder), "--file", str(texts)],
        "exported": ["export", str(undisturbed)],
        "scores": ["eval", str(undisturbed)],
        "curves.png": ["plot", str(undisturbed)],
    }
    for name, command in commands.items():
        assert main([*command, "--out", str(small_disk / name)]) == 2, name
        said = capsys.readouterr().err
        assert re.search(r"cannot (be )?writ", said) and "No space left" in said and len(said.splitlines()) == 1
    assert {path.name for path in small_disk.iterdir()} <= {"filler", "scores"}


def test_a_process_that_hangs_ends_with_its_stacks():
    program = (
        "import time\nfrom train.parallel.runtime import Watchdog\n"
        "def stuck(): time.sleep(100)\n"
        "with Watchdog(1.5) as watch:\n    for _ in range(3): time.sleep(0.8); watch.alive()\n    stuck()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=90, env=surroundings(), check=False
    )
    assert ran.returncode == 1 and "Timeout (0:00:01" in ran.stderr and "in stuck" in ran.stderr


def test_a_run_says_that_it_is_alive_at_each_step_and_evaluated_batch(config, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Watchdog, "alive", lambda self: said.append(1))
    train(dataclasses.replace(config, run_dir=str(tmp_path), steps=4))
    assert len(said) > 4 + 2
