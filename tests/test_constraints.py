"""The pinned versions are those of packages that the tests need, and setup.cfg allows them."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def wanted() -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    return [Requirement(line) for line in texts.splitlines() if line.strip() and not line.startswith("#")]


def test_every_package_has_an_exact_version_that_is_allowed():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in lines)
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for one in wanted():
        assert one.specifier.contains(pinned[canonicalize_name(one.name)], prereleases=True), one
