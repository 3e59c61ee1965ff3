# make quickstart          install into .venv, then train the digits example, about a minute: accuracy, checkpoint, curves
# make test                install the same way, then run the default tests; test-slow: those that train longer; test-all: both
# make test-integration    install packages that others combine with this project, then run the tests that need them
# make test-long           tests that take many minutes: bugs planted in the wiring, each seen by a default test; the whole fuzz suite
# make kernels             compile the fused attention kernel if there is a compiler; the commands above do so too
# make lint                check style and format with ruff;  bench  time whole models on the CPU;  clean  remove .venv and caches
#
# PYTHON=python            use that interpreter's environment (conda, container, ...); nothing is created or installed
# SYSTEM_PYTHON=python3.12 the interpreter that creates .venv;  VENV=DIR  where to create it
# ARGS="--seed 1"          more flags for the training of the quickstart, or for pytest;  JOBS=1  number of test processes (2)

VENV ?= .venv
SYSTEM_PYTHON ?= python3
JOBS ?= 2
ARGS ?=
# Compiled once for each state of the sources; without a compiler this is one line that says so.
KERNELS = $(RUN) -m kernels.window_attention
PYTEST = OMP_NUM_THREADS=1 MPLBACKEND=Agg $(RUN) -m pytest -n $(JOBS) --dist worksteal

ifdef PYTHON
RUN = $(PYTHON)
RUN_READY = check-run
DEV_READY = check-dev
INTEGRATION_READY = check-integration
else
RUN = $(VENV)/bin/python
RUN_READY = $(VENV)/requirements.done
DEV_READY = $(VENV)/requirements-dev.done
INTEGRATION_READY = $(VENV)/requirements-integration.done
endif

.DEFAULT_GOAL = help
.PHONY: help kernels quickstart test test-slow test-all test-long test-integration lint bench clean check-run check-dev check-integration

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

quickstart: $(RUN_READY)
	@$(KERNELS)
	$(RUN) main.py --cfg configs/digits/digits_tiny.yaml $(ARGS)

test: $(DEV_READY)
	@$(KERNELS)
	$(PYTEST) -m "not slow and not long" $(ARGS)

test-slow: $(DEV_READY)
	@$(KERNELS)
	$(PYTEST) -m "slow and not long" $(ARGS)

test-all: $(DEV_READY)
	@$(KERNELS)
	$(PYTEST) -m "not long" $(ARGS)

test-long: $(DEV_READY)
	@$(KERNELS)
	$(PYTEST) -m long $(ARGS)

# Here a test that is skipped is a failure: its package should be installed.
test-integration: $(INTEGRATION_READY)
	@$(KERNELS)
	REQUIRE_INTEGRATION=1 $(PYTEST) tests/integration $(ARGS)

kernels: $(RUN_READY)
	@$(KERNELS)

lint: $(DEV_READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(RUN_READY)
	@$(KERNELS)
	$(RUN) benchmarks/cpu_models.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info

check-run:
	@$(RUN) tools/check_environment.py requirements.txt

check-dev:
	@$(RUN) tools/check_environment.py requirements-dev.txt

check-integration:
	@$(RUN) tools/check_environment.py requirements-integration.txt

# A step that is done leaves a .done file and is repeated only when its requirements file changes.
$(VENV)/bin/python:
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "error: '$(SYSTEM_PYTHON)' is not\
	 Python 3.10 or newer ($$($(SYSTEM_PYTHON) --version 2>&1 | head -n 1)); name one that is: make SYSTEM_PYTHON=python3.12 ..., or use\
	 an environment of yours: make PYTHON=python ..." >&2; exit 2; }
	@echo "== creating the environment $(VENV) with $$($(SYSTEM_PYTHON) --version)"
	@$(SYSTEM_PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(SYSTEM_PYTHON) cannot create environments (on Debian and\
	 Ubuntu: apt install python3-venv), or use one of yours: make PYTHON=python ..." >&2; exit 2; }

$(VENV)/%.done: %.txt | $(VENV)/bin/python
	@echo "== installing $< into $(VENV); PyTorch is several GB, so the first time takes minutes"
	@$(RUN) -m pip install --disable-pip-version-check -r $<
	@touch $@

$(VENV)/requirements-dev.done: requirements.txt
$(VENV)/requirements-integration.done: requirements.txt requirements-dev.txt
