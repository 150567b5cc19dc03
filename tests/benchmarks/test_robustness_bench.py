"""The benchmarks of killed, moved and long runs: their configs, and what they make of what was seen."""

from __future__ import annotations

import json

import pytest

from benchmarks.report import report
from benchmarks.robustness import resume, soak, suite
from benchmarks.stage import folder_of
from train.data.prepared.prepare import prepare
from train.run.begin import check_data
from transformer.errors import UserError


def test_every_family_has_data_that_fits():
    for family in resume.CONFIGS:
        config = resume.config_of(family)
        check_data(config, prepare(config.data, progress=False))


@pytest.fixture
def finished(tmp_path):
    """Reports of runs that were killed before, in the folders where they belong."""
    kill = {"meant": "save", "step": 5, "while_saving": True, "while_evaluating": False}
    parts = {"one device": 1, "8, 4, 2, 1, 8 devices": len(resume.DEVICES), "2, 1, 2 processes": len(resume.PROCESSES)}
    for family in resume.CONFIGS:
        for name, kills in parts.items():
            folder = folder_of(str(tmp_path), family, name, kills)
            folder.mkdir()
            found = {
                "kills": [kill] * kills,
                "runs": 1,
                "steps": 40,
                "seed": 0,
                "differences": [],
                "largest_difference": 0.0,
            }
            (folder / "report.json").write_text(json.dumps(found))
    return tmp_path


def test_finished_parts_are_kept_and_reported(finished):
    resume.run(1, str(finished))
    lines = report(finished).splitlines()
    assert sum("killed and resumed on" in line for line in lines) == 3 * len(resume.CONFIGS)
    assert any("5 kills, 5 in a save, 0 in an evaluation" in line for line in lines)
    assert (
        sum("first batch of a run that resumes after step 1, and after step 1,000,000" in line for line in lines) == 4
    )


def test_a_difference_is_an_error(finished):
    path = folder_of(str(finished), "bert", "one device", 1) / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"differences": ["train/loss: 3 steps differ"]}))
    with pytest.raises(UserError, match="3 steps differ"):
        resume.run(1, str(finished))


def test_growth_is_that_after_the_warm_up():
    seen = [
        {
            "step": step,
            "seconds": step / 10,
            "resident": 2**20 * (100 if step < 20 else 200 + step // 50),
            "files": 8,
            "threads": 9,
        }
        for step in range(101)
    ]
    figures = soak._figures(seen, 100, {50: 0.25, 100: 0.25})
    assert figures["resident_growth"] == pytest.approx(0.005) and figures["checkpoints"] == 2
    assert figures["checkpoint_stall"] == pytest.approx(0.5 / 9.9)
    assert figures["open_files"] == {"after_warm_up": 8, "at_the_end": 8}


@pytest.mark.parametrize(
    ("output", "expected"),
    [("....\n3 failed, 41 passed in 2.3s\n", 41), ("bringing up nodes...\n....s. [ 50%]\n...... [100%]\n", 11)],
)
def test_tests_are_counted(output, expected):
    assert suite.passed(output) == expected
