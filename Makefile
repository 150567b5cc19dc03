# make train · make test: each does all its own set-up on a machine with Python >= 3.11 and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/stdlib_small.yaml
# constraints.txt pins every package; empty: the newest that setup.cfg allows.
CONSTRAINTS ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS))

.PHONY: help train test test-fast lint test-newest docs bench bench-gpu clean lock

help:
	@echo "make train        train a small GPT on Python's own library (CONFIG=... for another run)"
	@echo "make test         linters, types and all tests"
	@echo "make test-fast    linters, types and the quick half of the tests, for work in between"
	@echo "make lint         linters and types alone"
	@echo "make test-newest  the tests that need no torch, on Python 3.13 with the newest jax and flax"
	@echo "make docs         the documentation as a site, site/index.html"
	@echo "make lock         write constraints.txt, the versions of all packages of this environment"
	@echo "make bench        CPU benchmarks, results into benchmarks/results/"
	@echo "make bench-gpu    GPU benchmarks, on a machine that has jax with CUDA already"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "manyheads needs Python 3.11 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

train: $(VENV)/.installed
	$(BIN)/manyheads train $(CONFIG)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A worker that crashes ends the run: with another in its place pytest-xdist would never end.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-fast: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# An environment of its own: jax 0.11 and newer need a newer Python than the main one may be.
# A name on the PATH may be a stub that does not run.
NEWEST ?= $(shell for p in python3.13 $(HOME)/.pyenv/versions/3.13*/bin/python3.13; do "$$p" -c "" 2>/dev/null && { echo "$$p"; break; }; done)
test-newest:
	@test -n "$(NEWEST)" || { echo "test-newest needs Python 3.13; name one with make NEWEST=/path/to/python3.13 test-newest"; exit 2; }
	test -x .venv-newest/bin/python || $(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable '.[test-core]' jax flax optax
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not torch"

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	@touch $@

# A warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees docs site
	@echo "the site is in site/index.html"

lock: $(VENV)/.installed-test
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's,+cpu$$,,'; } > constraints.new
	mv constraints.new constraints.txt

bench: $(VENV)/.installed-test
	$(BIN)/manyheads-bench step
	$(BIN)/manyheads-bench compile
	$(BIN)/manyheads-bench decode
	$(BIN)/manyheads-bench experts
	$(BIN)/manyheads-bench data
	$(BIN)/manyheads-bench finetuning-step
	$(PIP) --no-deps sentence-transformers
	$(BIN)/manyheads-bench embedding
	$(BIN)/manyheads-bench attention --certify
	$(BIN)/manyheads-bench attention --speed --length

# Runs with the Python at hand, because a GPU image brings its own jax; it needs jax, flax, optax, orbax, numpy and torch.
bench-gpu:
	$(PYTHON) -m benchmarks.cli gpu

clean:
	rm -rf .venv .venv-newest build site *.egg-info
