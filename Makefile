# Set-up and checks of a checkout; `make quickstart` and `make test` need nothing before them.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
# Processes that run tests; one needs up to 4 GiB. A file stays with one of them, for its fixtures.
WORKERS ?= logical
QUICKSTART_ARGS ?=

# Where python3 is too old or too new, one that the user did not name may still fit.
ifeq ($(origin PYTHON),file)
CANDIDATES := $(PYTHON) python3.11 python3.12 python3.13
else
CANDIDATES := $(PYTHON)
endif
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# Two stamps: the quickstart needs no linter and no second implementation of LLaMA. It ends with a
# report, whose figures matplotlib draws.
INSTALLED := $(VENV)/.installed
TEST_INSTALLED := $(VENV)/.installed-test
PIP_INSTALL := $(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt

.PHONY: help venv quickstart test lint types clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make quickstart   the whole path, from text to a sheared model"
	@echo "make test         tests"
	@echo "make lint types   ruff; mypy"
	@echo "make venv         only the environment these need"
	@echo "make clean        remove the environment and caches"
	@echo "knobs: PYTHON VENV PIP_ARGS PYTEST_ARGS WORKERS QUICKSTART_ARGS"

venv: $(TEST_INSTALLED)

quickstart: $(INSTALLED)
	$(VENV)/bin/python -m megashear quickstart $(QUICKSTART_ARGS)

test: $(TEST_INSTALLED)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 \
	  --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(TEST_INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(TEST_INSTALLED)
	$(VENV)/bin/mypy megashear tools

$(INSTALLED): setup.py constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[report]"
	@touch $@

$(TEST_INSTALLED): setup.py constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[test]"
	@touch $(INSTALLED) $@

$(VENV)/bin/python:
	@for python in $(CANDIDATES); do \
	  if $$python -c '$(IS_SUPPORTED)' 2>/dev/null; then \
	    echo "making $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "megashear needs Python 3.11, 3.12 or 3.13; none of these is one:" >&2; \
	for python in $(CANDIDATES); do \
	  echo "  $$python: $$($$python --version 2>&1 | head -n 1)" >&2; \
	done; \
	echo "install one and name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1

clean:
	rm -rf $(VENV) build megashear.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find megashear tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} +
