# All set-up happens in .venv, from Python 3.11 or newer and make alone. The first `make` of anything
# installs (a few minutes, needs network); later ones start at once and work offline, until
# pyproject.toml or constraints.txt changes. Another interpreter: make clean test PYTHON=python3.13

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
NOTEBOOK ?= notebooks/00_quickstart.ipynb
# notebooks/00_quickstart.ipynb -> reports/quickstart.html
REPORT = reports/$(lastword $(subst _, ,$(basename $(notdir $(NOTEBOOK))))).html
WORKERS ?= 4
# More tests after tests/: every notebook is run from top to bottom. tests/test_notebooks.py runs those that train or
# measure with less, and the quickstart.
NOTEBOOKS := $(if $(wildcard notebooks/*.ipynb),--nbmake notebooks)
QUICK_NOTEBOOKS := $(addprefix notebooks/,01_where_does_time_go.ipynb 03_scheduling.ipynb 05_sweeps.ipynb)
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest \
	-n logical --maxprocesses $(WORKERS) --dist loadfile
# What the host does beside a GPU, which tests interpret, is compiled by nobody else on a machine without one. Within a
# test, the limit of its time cut that off on a busy machine, and all that needed it failed with it.
COMPILE_FIRST = $(BIN)/python -m tests.support.compile_first
# Jupyter refuses to run as root unless told.
LAB_AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
# Nor does it open a notebook outside the folder that a user's own settings may name.
LAB_FOLDER = --ServerApp.root_dir=$(dir $(NOTEBOOK))

# Clusters' modules and ROS put packages of another Python there, and those come before the ones in .venv.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help lab report docs test test-all check format clean setup

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

lab: $(STAMP)  ## Open JupyterLab on the quickstart notebook
	$(BIN)/python -m jupyter lab $(LAB_AS_ROOT) $(LAB_FOLDER) --LabApp.extension_manager=readonly $(NOTEBOOK)

report: $(STAMP)  ## Run the quickstart (or NOTEBOOK=...) and write it as one HTML file that opens offline
	$(BIN)/python -m prescope.report $(NOTEBOOK) --out $(REPORT)

docs: $(STAMP)  ## Build site/: executed notebooks, API reference, pages; opens offline (some minutes)
	$(BIN)/python docs/build_site.py --out site

test: $(STAMP)  ## Run the tests and the notebooks (no GPU needed; GPU tests skip themselves)
	$(COMPILE_FIRST)
	$(PYTEST) -m "not slow" tests --nbmake $(QUICK_NOTEBOOKS)

test-all: $(STAMP)  ## The same with the tests that take long, those in a real browser among them
	$(COMPILE_FIRST)
	$(PYTEST) tests $(NOTEBOOKS)

check: $(STAMP)  ## Lint, format, types, import direction, house rules
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q tests/house

format: $(STAMP)  ## Format the code, fix what ruff can fix, strip notebook outputs
	$(BIN)/python -m ruff check --fix-only --quiet .
	$(BIN)/python -m ruff format .
	$(if $(wildcard notebooks/*.ipynb),$(BIN)/python -m nbstripout notebooks/*.ipynb)

setup: $(STAMP)  ## Install into .venv (the other targets do it by themselves)

clean:  ## Remove .venv, caches and reports
	rm -rf $(VENV) reports site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp's age says when pip last ran to its end, its text for which folder: a .venv that was copied
# or moved along still imports prescope from the old place. A .venv without pip was interrupted while it
# was made, or made by another tool (uv): it gets one. Lab's news and update checks are turned off
# inside .venv, so that no setting of the user is touched. --no-user: pip refuses a user's `user = true` in a .venv.
$(STAMP): pyproject.toml constraints.txt $(if $(filter-out $(CURDIR),$(shell cat $(STAMP) 2>/dev/null)),moved)
	@set -e; fits='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(BIN)/python -c "$$fits" 2>/dev/null; then \
		python=""; \
		for candidate in $(CANDIDATES); do \
			if $$candidate -c "$$fits" 2>/dev/null; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "prescope needs Python 3.11 or newer with its venv module; tried: $(CANDIDATES)." >&2; \
			echo "Install one (Debian, Ubuntu: apt install python3-venv), or name it: make test PYTHON=/path/to/python3.12" >&2; \
			exit 1; \
		fi; \
		echo "Setting up $(VENV) with $$($$python --version); the first time this downloads PyTorch and takes minutes."; \
		$$python -m venv --clear $(VENV); \
	elif ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(BIN)/python -m venv $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-user -c constraints.txt -e ".[lab,sweep,dev]"
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' \
		> $(VENV)/share/jupyter/lab/settings/overrides.json
	$(BIN)/python -m prescope compile
	@pwd -P > $@

.PHONY: moved
