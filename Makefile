# From nothing but Python 3.11 and make:  `make demo` for a forecast, `make test` for the test suite.
# The environment is .venv; packages are installed only when their list has changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STABLE := .venv/.stable-installed
DEV := .venv/.dev-installed
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Test workers share the cores: one torch thread each is faster than all of them fighting.
WORKERS ?= 2
FUZZ ?= 2000
SOAK_S ?= 3600
BENCHES := $(filter-out bench/__init__.py bench/harness.py,$(wildcard bench/*.py))

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format bench wheel clean fuzz soak

help:
	@echo "make demo    install what is needed into .venv and make a real forecast from bundled prices"
	@echo "make venv    only install into .venv"
	@echo "make test    run all tests        (WORKERS=$(WORKERS))"
	@echo "make fuzz    damaged files for every reader, drawn anew, $(FUZZ) each"
	@echo "make soak    an hour of downloading, training, killing, resuming, forecasting and serving"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make format  let ruff mend what it can"
	@echo "make bench   measure; results go to bench/results/"
	@echo "make wheel   build dist/*.whl"
	@echo "make clean   remove caches and build products (.venv, models and results stay)"

venv: $(STABLE)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3 on the PATH; install Python 3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) does not run or is older than Python 3.11; try: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "==> making .venv with $(PYTHON)"
	@"$(PYTHON)" -m venv .venv || \
		{ rm -rf .venv; echo "error: no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }

$(STABLE): requirements_stable.txt | $(BIN)/python
	@echo "==> installing requirements_stable.txt into .venv (some minutes the first time)"
	@$(PIP_INSTALL) -r requirements_stable.txt
	@touch $@

$(DEV): requirements-dev.txt requirements-peers.txt requirements_stable.txt | $(STABLE)
	@echo "==> installing requirements-dev.txt into .venv"
	@$(PIP_INSTALL) -r requirements_stable.txt -r requirements-dev.txt
	@$(PIP_INSTALL) --no-deps -r requirements-peers.txt
	@touch $@

demo: $(STABLE)
	@echo "==> quick_start.py"
	@$(BIN)/python quick_start.py

test: $(STABLE) $(DEV)
	@echo "==> pytest"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

fuzz: $(STABLE) $(DEV)
	@echo "==> $(FUZZ) damaged files for each reader"
	@OMP_NUM_THREADS=1 STOCKLORA_FUZZ=$(FUZZ) $(BIN)/python -m pytest -q tests/project/test_damaged_files.py

soak: $(STABLE) $(DEV)
	@echo "==> an hour of use"
	@OMP_NUM_THREADS=1 STOCKLORA_SOAK=$(SOAK_S) $(BIN)/python -m pytest -q -s tests/project/test_endurance.py

lint: $(STABLE) $(DEV)
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

format: $(DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STABLE)
	@set -e; for script in $(BENCHES); do echo "==> $$script"; $(BIN)/python $$script; done

wheel: $(DEV)
	@echo "==> building dist/"
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null
	@ls dist/*.whl

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
	@echo "==> caches and build products removed"
