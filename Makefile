# `make lab` opens the course, `make test` checks everything. Each makes the environment it needs in .venv, and leaves
# it alone while pyproject.toml and constraints.txt stay as they are.

# The Python that .venv is made from: make PYTHON=/path/to/python3.12 lab
PYTHON ?= python3
VENV ?= .venv
# Test processes that run side by side.
WORKERS ?= 2
# Where the libraries live that the benchmarks compare with.
PEERS ?= .venv-peers
# Passed on to the command: make lab ARGS=--no-browser, make test-python ARGS="-k noise_mask"
ARGS ?=
# `make constraints` keeps this torch, whatever is newer.
TORCH ?= 2.13.0

BIN := $(VENV)/bin
LAB_EXTRAS := course
ALL_EXTRAS := course,classroom,cluster,dev
LAB_READY := $(VENV)/.ready-lab
ALL_READY := $(VENV)/.ready-all
PEERS_READY := $(PEERS)/.ready
PIP_INSTALL := -m pip --disable-pip-version-check install

# Notebooks that are run: not the assignments, whose source has cells meant to fail and is tested with nbgrader.
NOTEBOOKS := find course -name '*.ipynb' -not -path 'course/assignments/*' -not -path '*/.ipynb_checkpoints/*'

# Two processes with one thread each, not two with two, on a laptop's cores.
ONE_THREAD := OMP_NUM_THREADS=1

define need_python
@command -v "$(PYTHON)" >/dev/null || { \
	echo "polrl needs Python 3.11 or newer, and '$(PYTHON)' was not found."; \
	echo "Name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "polrl needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)."; \
	echo "Name another: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
endef

.DEFAULT_GOAL := help
# One thing after the other, but for what `test` itself does side by side.
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif
.DELETE_ON_ERROR:
.PHONY: help lab test lint types types-and-browser test-python test-browser test-notebooks course bench bench-peers format constraints clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# What of JupyterLab gets in a learner's way is switched off here as on Binder.
define quiet_lab
-@PATH="$(abspath $(BIN)):$$PATH" binder/postBuild 2>/dev/null
endef

# ----------------------------------------------------------------------------------------------------- the environment

$(BIN)/python:
	$(need_python)
	"$(PYTHON)" -m venv $(VENV)

$(LAB_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[$(LAB_EXTRAS)]"
	$(quiet_lab)
	@touch $@

$(ALL_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[$(ALL_EXTRAS)]"
	$(quiet_lab)
	@touch $@ $(LAB_READY)

# ---------------------------------------------------------------------------------------------------------- the course

lab: $(LAB_READY) ## open the course in JupyterLab, on this computer only
	$(BIN)/polrl lab $(ARGS)

course: $(ALL_READY) ## execute the notebooks as they are committed
	$(BIN)/python course/build.py $(ARGS)

# ----------------------------------------------------------------------------------------------------------- the tests

# Types are checked beside the browser tests, which wait for the page half of their time.
test: $(ALL_READY) ## style, types, tests, browser tests, notebooks; goes on after a failure and reports it
	@$(MAKE) --no-print-directory --keep-going lint test-python types-and-browser test-notebooks

types-and-browser: $(ALL_READY)
	@$(MAKE) --no-print-directory --keep-going --jobs=2 SIDE_BY_SIDE=1 types test-browser

lint: $(ALL_READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(ALL_READY) ## mypy
	$(BIN)/mypy

test-python: $(ALL_READY) ## everything in tests/ but the browser
	$(ONE_THREAD) $(BIN)/pytest -p no:nbval -n $(WORKERS) --dist worksteal --ignore=tests/browser $(ARGS) tests

test-browser: $(ALL_READY) ## the lab in a real Chromium, one test at a time
	$(BIN)/pytest -p no:nbval $(ARGS) tests/browser

test-notebooks: $(ALL_READY) ## every notebook of the course once, with tiny budgets
	@if $(NOTEBOOKS) | grep -q .; then set -x; \
		$(ONE_THREAD) POLRL_MODE=smoke $(BIN)/pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=120 \
			-n $(WORKERS) --dist loadfile --ignore=course/assignments $(ARGS) course; \
	else echo "No notebook in course/ yet."; fi

bench: $(ALL_READY) ## what the house costs, and the lab in a browser
	$(BIN)/python -m benchmarks $(ARGS)

# The peers want other versions than the course: an environment of their own.
$(PEERS_READY): pyproject.toml
	$(need_python)
	test -x $(PEERS)/bin/python || "$(PYTHON)" -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP_INSTALL) "torch==$(TORCH)" -e ".[peers]"
	@touch $@

bench-peers: $(PEERS_READY) ## the methods beside d3rlpy, TRL, diffusers, POT and scipy
	$(ONE_THREAD) $(PEERS)/bin/python -m benchmarks peers $(ARGS)

# -------------------------------------------------------------------------------------------------------------- upkeep

format: $(ALL_READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

constraints: ## resolve the newest versions that go together into constraints.txt
	$(need_python)
	rm -rf build/constraints
	"$(PYTHON)" -m venv build/constraints
	build/constraints/bin/python $(PIP_INSTALL) "torch==$(TORCH)" ".[$(ALL_EXTRAS)]"
	build/constraints/bin/python -m pip check
	build/constraints/bin/python -m pip list --format=freeze --exclude polrl --exclude pip --exclude setuptools \
		| sed 's/+.*//' | grep -viE '^(nvidia|cuda|triton)' > build/constraints.new
	{ grep '^#' constraints.txt; cat build/constraints.new; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints build/constraints.new

clean: ## remove caches and build results
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)
