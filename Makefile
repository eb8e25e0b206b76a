# make forecast   the main job on the built-in example patient; prints the path of the report
# make test       the fast tests          make test-all   all tests but the benchmarks
# make bench      benchmark tables        make notebooks  write and execute examples/*.ipynb
# make bench-pinn the table of networks beside classical solvers
# make lint       ruff and mypy           make lock       rewrite constraints.txt
# make clean      remove what was built (build/ and .venv)
#
# Settings, as in `make test PYTHON=python3.12 JOBS=4 PYTEST_ARGS="-k domain"`:
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
EXAMPLE := build/example
NOTEBOOKS := forecast uncertainty

# Real data for tests and examples; whatever needs them is skipped, with its reason, where they are absent.
TUMORCAST_DATA ?= $(abspath $(wildcard ../shared/data))
ifneq ($(strip $(TUMORCAST_DATA)),)
export TUMORCAST_DATA
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1
SINGLE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1

.DELETE_ON_ERROR:
.PHONY: help forecast test test-all bench bench-pinn notebooks lint lock clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

# --- environment: one stamp per set of extras, so that a second call does nothing -------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tumorcast needs Python 3.11 or newer, found: $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another interpreter: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

CORE := $(VENV)/.stamp-core
TEST := $(VENV)/.stamp-test
BENCH := $(VENV)/.stamp-bench
NOTEBOOK := $(VENV)/.stamp-notebooks

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes a minute or more."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(TEST) $(BENCH) $(NOTEBOOK): $(VENV)/.stamp-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@

# --- the main job ----------------------------------------------------------------------------------------------------

$(EXAMPLE)/patient/patient.json: | $(CORE)
	$(BIN)/tumorcast virtual --out $(EXAMPLE)/patient --seed 7

forecast: $(CORE) $(EXAMPLE)/patient/patient.json
	$(BIN)/tumorcast forecast $(EXAMPLE)/patient --calibrate-on 2 --draws 200 --seed 0 --out $(EXAMPLE)/forecast
	@test -s $(EXAMPLE)/forecast/report.html

# --- tests -----------------------------------------------------------------------------------------------------------

# Tests run beside each other, each on one thread; a module's tests stay together because they share fixtures.
PYTEST := $(SINGLE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadscope

test: $(TEST)
	$(PYTEST) -m "not slow and not bench" $(PYTEST_ARGS)

test-all: $(TEST)
	$(PYTEST) -m "not bench" $(PYTEST_ARGS)

bench: $(BENCH)
	@set -e; for script in $(sort $(wildcard tests/benchmarks/bench_*.py)); do \
	  echo "== $$script"; $(BIN)/python $$script; done

bench-pinn: $(BENCH)
	$(SINGLE_THREAD) $(BIN)/python tests/benchmarks/bench_pinn.py --results build/bench_pinn.jsonl

lint: $(TEST)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# --- notebooks -------------------------------------------------------------------------------------------------------

# Executed under another name in the same folder: a notebook that failed does not replace one that worked.
notebooks: $(NOTEBOOK)
	@set -e; for name in $(NOTEBOOKS); do \
	  partial=examples/.$$name.partial.ipynb; trap 'rm -f $$partial' EXIT; \
	  $(BIN)/jupytext --quiet --to ipynb --set-kernel python3 --output $$partial examples/$$name.py; \
	  $(SINGLE_THREAD) $(BIN)/python -m jupyter execute --inplace $$partial; \
	  mv $$partial examples/$$name.ipynb; echo examples/$$name.ipynb; done

# --- lock ------------------------------------------------------------------------------------------------------------

# A clean environment, so that only what is required is written. Pins that exist are kept, new requirements get the
# newest version; to move a package on, delete its line first. Local versions (torch's +cpu) exist on some indexes only.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet -c constraints.txt '.[test,notebooks,bench]'
	build/lock/bin/python -m pip freeze --all \
	  | grep -ivE '^(pip|tumorcast)(==| @)' | sed -E 's/\+[A-Za-z0-9.]+$$//' > build/constraints.new
	{ sed -n '/^#/!q;p' constraints.txt; cat build/constraints.new; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/lock build/constraints.new

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
