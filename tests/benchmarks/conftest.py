"""A config that several files of tests plan."""

import pytest


@pytest.fixture
def config_file(tmp_path):
    # Shapes and types are checked of what is imported after pytest's set-up.
    from tests.benchmarks.small import TEXT

    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path
