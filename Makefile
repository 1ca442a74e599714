# From nothing but Python 3.11 and make:  `make demo` for a forecast, `make test` for the test suite.
# The environment is .venv; packages are installed only when their list has changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STABLE := .venv/.stable-installed
DEV := .venv/.dev-installed
# Each file that is installed is one whose hash stands in a lock; the locks name all that is needed.
LOCKED := --no-deps --require-hashes
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Test workers share the cores: one torch thread each is faster than all of them fighting.
WORKERS ?= 2
FUZZ ?= 2000
SOAK_S ?= 3600
BENCHES := $(filter-out bench/__init__.py bench/harness.py bench/gpu_ladder.py,$(wildcard bench/*.py))

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

$(STABLE): requirements.lock requirements-cuda.lock | $(BIN)/python
	@echo "==> installing requirements.lock into .venv (some minutes the first time)"
	@$(PIP_INSTALL) $(LOCKED) -r requirements.lock
	@if $(BIN)/python -c 'import importlib.metadata as m; exit("nvidia" not in str(m.requires("torch")))'; then \
		echo "==> installing requirements-cuda.lock, which this build of torch needs"; \
		$(PIP_INSTALL) $(LOCKED) -r requirements-cuda.lock; fi
	@touch $@

$(DEV): requirements-dev.lock | $(STABLE)
	@echo "==> installing requirements-dev.lock into .venv"
	@$(PIP_INSTALL) $(LOCKED) -r requirements-dev.lock
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
