# `make demo` and `make test` work from a fresh clone: they make .venv first. Set PYTHON to choose an interpreter (3.11+).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The tools of an upload have dependencies of their own, which nothing else needs.
UPLOAD := $(VENV)/upload

.PHONY: demo test test-lowest lint format types docs dist check clean
.DEFAULT_GOAL := check

$(STAMP): requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $@

demo: $(STAMP)  ## train a CNN on digits with Adam and with FlatOpt; table and figure in demo-output/
	$(BIN)/python -m flatopt demo --out demo-output

test: $(STAMP)  ## all tests and the examples in docstrings
	$(BIN)/python -m pytest

test-lowest:  ## the tests of the core with the lowest versions that pyproject.toml allows, in .venv-lowest (6 GB)
	.ci/lowest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

dist: $(STAMP)  ## source archive and wheel in dist/, checked as before an upload
	rm -rf dist
	$(BIN)/python -m hatchling build
	test -x $(UPLOAD)/bin/twine || $(PYTHON) -m venv $(UPLOAD)
	$(UPLOAD)/bin/python -m pip install --disable-pip-version-check -q twine==7.0.0 check-wheel-contents==0.6.3
	$(UPLOAD)/bin/twine check --strict dist/*
	$(UPLOAD)/bin/check-wheel-contents dist/*.whl

check: lint types docs dist test

clean:
	rm -rf build dist demo-output docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find flatopt tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
