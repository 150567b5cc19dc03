"""The site of the documentation: it builds without a warning, works offline, has every page, and its links lead somewhere."""

from __future__ import annotations

import html.parser
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.train.run_records import surroundings
from train.commands.cli import COMMANDS
from train.config import RunConfig
from train.parallel.mesh import STRATEGIES
from transformer.errors import field_types

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FILES = DOCS / "how-to" / "files"
PAGES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))


class Page(html.parser.HTMLParser):
    """The links, the anchors and the parts from elsewhere of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.parts, self.anchors, self.tags = [], [], set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") != "canonical":
            self.parts.append(found["href"])
        self.parts += [found[name] for name in ("src", "data", "poster") if found.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = [
        "--fail-on-warning",
        "--keep-going",
        "--quiet",
        "--doctree-dir",
        folder / "doctrees",
        DOCS,
        folder / "html",
    ]
    environment = surroundings(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_is_built_and_in_the_navigation(site, pages):
    start = {link.partition("#")[0] for link in pages[site / "index.html"].links}
    for name in PAGES:
        assert (site / f"{name}.html").is_file(), name
        # What is below the pages of the navigation is in that of its section.
        assert name == "index" or f"{name}.html" in start, name


def test_links_lead_somewhere(site, pages):
    for path, page in pages.items():
        for link in page.links + page.parts:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            assert target.is_file(), (path, link)
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].anchors, (path, link)


def test_nothing_comes_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert not [part for part in page.parts if urlsplit(part).scheme not in ("", "data")], path
        assert not [part for part in page.parts if urlsplit(part).netloc], path
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert "@import" not in text and "url(http" not in text and "url(//" not in text, path


def test_the_search_finds_pages(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    for word in ("sparsemax", "kubernet", "warmup_step", "verify"):
        assert word in index, word


def test_what_is_made_from_the_code_is_there(site, pages):
    fields = (site / "reference" / "fields.html").read_text(encoding="utf-8")
    for name in field_types(RunConfig):
        assert f">{name}<" in fields, name
    assert {f"config-{kind}" for kind in ("runconfig", "gptconfig", "softmaxconfig", "filessource", "meshconfig")} <= (
        pages[site / "reference" / "fields.html"].anchors
    )
    commands = pages[site / "reference" / "commands.html"].anchors
    assert {f"manyheads-{command.name}" for command in COMMANDS} <= commands
    drawings = pages[site / "explanation" / "sharding.html"].anchors
    # One drawing serves for two strategies that hold the same.
    assert {f"sharding-{name}" for name in STRATEGIES if name not in ("pmap", "ulysses")} <= drawings
    attend = (site / "reference" / "api" / "attention.html").read_text(encoding="utf-8")
    assert "B T N H" in attend and "Vaswani et al. 2017, equation 1" in attend
    assert "math" in pages[site / "explanation" / "attention-history.html"].tags


def test_the_script_for_slurm_is_one():
    script = FILES / "train.slurm"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert "--signal=TERM@" in text and "--requeue" in text


@pytest.mark.parametrize(
    ("status", "again"), [(0, False), (2, False), (143, True), (130, True), (75, True), (1, True), (137, True)]
)
def test_the_script_for_slurm_restarts_on_the_statuses_that_call_for_it(tmp_path, status, again):
    """With stand-ins for Slurm's two programs."""
    for name, text in (("srun", f"exit {status}"), ("scontrol", f"echo $@ > {tmp_path / 'requeued'}")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", FILES / "train.slurm", "configs/tiny.yaml"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == again


def test_the_manifest_for_kubernetes_restarts_all_but_mistakes():
    job = yaml.safe_load((FILES / "job.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    (fails,) = (rule for rule in rules if rule["action"] == "FailJob")
    assert fails["onExitCodes"] == {"operator": "In", "values": [2]}
    pod = job["spec"]["template"]["spec"]
    # A policy for failed pods needs it.
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert container["args"][0] in {command.name for command in COMMANDS} and (ROOT / container["args"][1]).is_file()


def test_the_image_copies_what_is_there():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    # All packages that are installed, and what the build reads.
    assert {"manyheads", "transformer", "train", "benchmarks", "setup.cfg", "pyproject.toml", "README.md"} <= {*copied}
    assert 'ENTRYPOINT ["manyheads"]' in lines
