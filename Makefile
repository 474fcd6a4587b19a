# All that is needed beforehand: make, and Python 3.11 or newer with its venv module.
#
#   make fit                                          fit the COVID-19 Tucker model on this machine
#   make fit CONFIG=configs/x.yaml ARGS='--trainer.max_epochs 5'
#   make test                                         checks and tests;  ARGS='-k tucker' goes to pytest
#   make fit PYTHON=/path/to/python3.11               choose the interpreter that .venv is made from

PYTHON ?= python3
CONFIG = configs/covid_tucker.yaml
ARGS =

# Every path is relative, so that a checkout under a name with spaces works.
VENV := .venv
PY := $(VENV)/bin/python

# .venv answers for what is imported, not the shell that make was called from.
unexport PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help fit test test-slow lint format bench docs clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s  %s\n", $$1, $$2}' Makefile

fit: $(VENV)/.installed  ## fit CONFIG, with further options in ARGS
	$(PY) -m tenzoo fit --config $(CONFIG) $(ARGS)

test: lint  ## all checks, then the tests that take seconds, in two processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.installed-dev  ## only the tests marked slow
	$(PY) -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev  ## style, types and the direction of imports
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-dev  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

bench: $(VENV)/.installed-bench  ## timings against peers
	$(PY) -m benchmarks $(ARGS)

docs: $(VENV)/.installed-docs  ## the documentation, into build/docs; NB_EXECUTION=off leaves out the notebooks' runs
	OMP_NUM_THREADS=1 $(PY) -m sphinx -W --keep-going -b html docs build/docs $(ARGS)

clean:  ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist docs/api/generated .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv too
	rm -rf $(VENV)

# ---- set-up ----------------------------------------------------------------------------------------------------------
# A stamp is written only after its step has succeeded, so a step that was interrupted is done again, and a step that is
# done is skipped until pyproject.toml or the interpreter changes.

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	$(PY) -m pip install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.created
	$(PY) -m pip install -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml $(VENV)/.created
	$(PY) -m pip install -e '.[bench]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.created
	$(PY) -m pip install -e '.[docs]'
	@touch $@ $(VENV)/.installed

SUITABLE := 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

# An environment that works is kept; a broken, half-made or too old one is made anew.
$(VENV)/.created: $(PY)
	@{ $(PY) -c $(SUITABLE) && $(PY) -m pip --version; } >/dev/null 2>&1 || { \
	  "$(PYTHON)" -c $(SUITABLE) >/dev/null 2>&1 || { \
	    echo "tenzoo needs Python 3.11 or newer with its venv module; PYTHON=$(PYTHON) is not that" \
	      "($$("$(PYTHON)" --version 2>&1)): make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  echo "$(PYTHON) -m venv --clear $(VENV)"; "$(PYTHON)" -m venv --clear $(VENV); }
	@touch $@

# Missing, or a link to an interpreter that is gone: the rule above sees to it.
$(PY): ;
