# `make demo` and `make test` do all of their own set-up in .venv, once for each state of pyproject.toml and constraints.txt.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS := .venv/.docs

# One thread a test process: two processes on two cores are faster than one with two threads.
test test-slow test-ui test-lowest: export OMP_NUM_THREADS = 1
# The C library otherwise hands each large buffer back to the kernel and faults it in again: 1.4 times slower training on CPU.
demo: export MALLOC_MMAP_THRESHOLD_ = 4294967296
demo: export MALLOC_TRIM_THRESHOLD_ = 17179869184

.PHONY: demo test test-slow test-ui test-lowest release-check lint docs install clean

demo: $(INSTALLED)
	$(BIN)/python scripts/recipes/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not ui"

# Runs that are killed, two real processes, measured memory, and whatever else takes long.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The studio in Chromium, Debian's, which is installed if it is not there.
test-ui: $(INSTALLED)
	test -x /usr/bin/chromium || { apt-get update && apt-get install -y --no-install-recommends chromium; }
	$(BIN)/python -m pip install --no-compile -q -c constraints.txt -e ".[test,ui]" playwright
	$(BIN)/python -m pytest -m ui tests/ui

# The fast tests with the oldest versions that pyproject.toml allows, in an environment of their own.
test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --no-compile -c constraints-lowest.txt -e ".[test]"
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not ui"

# Wheel and source archive, in dist/, and whether they work without the clone.
release-check:
	PYTHON=$(PYTHON) scripts/release_check.sh

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site. The API reference is read from the source, so nothing of the package has to be installed.
docs: $(DOCS)
	$(BIN)/python -m mkdocs build --strict

$(DOCS): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt mkdocs mkdocs-material "mkdocstrings[python]" ruff
	touch $@

install: $(INSTALLED)

# Without --no-compile most of the time is spent on compiling modules that are never imported.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv .venv-lowest runs build dist
