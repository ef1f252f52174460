# Two entry points: `make book` and `make test`. Each sets up .venv by itself.
# Variables: PROFILE=quick|paper, SEED=0, FRESH=1 (train again), PYTHON=python3.11

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= paper
SEED ?= 0
FRESH ?=
PYTEST_ARGS ?=
LOCK_FLAGS ?= --torch-backend=cpu

UV_VERSION := 0.13.9
TORCH := torch==2.13.0
GPAW := gpaw==25.7.0 gpaw-data==1.0.1
DEBIAN := libxc-dev libopenblas-dev libfftw3-dev openmpi-bin libopenmpi-dev
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

BIN := .venv/bin
PY := $(BIN)/python
UV := $(BIN)/uv
INSTALL := $(UV) pip install --python $(PY)
STAMP := .venv/installed

export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1
unexport PYTHONPATH
# An empty HOME is replaced, so that every cache has a place.
ifeq ($(strip $(HOME)),)
export HOME := $(CURDIR)/.cache/home
endif
# A folder with the data tables next to the checkout is used as the mirror.
ifndef MEIDNET_DATA_MIRROR
ifneq ($(wildcard ../shared/data),)
export MEIDNET_DATA_MIRROR := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install book test test-unit test-notebooks test-slow lint dft fairchem lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP)  ## create .venv with the pinned packages

book: $(STAMP)  ## run the notebooks and build book/_build/html (PROFILE, SEED, FRESH=1)
	$(PY) book/build.py --profile $(PROFILE) --seed $(SEED) $(if $(filter-out 0,$(FRESH)),--fresh)

test: test-unit test-notebooks  ## unit tests, then every notebook in its quick profile

test-unit: $(STAMP)  ## unit tests that take seconds, two at a time with one thread each
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow" tests $(PYTEST_ARGS)

test-notebooks: $(STAMP)  ## run the notebooks with nbval (quick profile)
	$(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 notebooks $(PYTEST_ARGS)

test-slow: $(STAMP)  ## tests that take minutes
	$(PY) -m pytest -m slow tests $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff
	$(PY) -m ruff check .

dft: .venv/gpaw-installed  ## add GPAW to .venv (chapters 13, 14, 16), with its Debian packages

# Compiled by mpicc; the libraries come from Debian (as root, or with sudo) unless they are there.
.venv/gpaw-installed: $(STAMP)
	@command -v mpicc >/dev/null && [ -e /usr/include/xc.h ] && [ -e /usr/include/fftw3.h ] || \
	  { $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq -o Acquire::Retries=3 $(DEBIAN) >/dev/null; }
	@printf "mpi = True\ncompiler = 'mpicc'\nlibraries = ['xc', 'openblas', 'fftw3']\nfftw = True\n" > .venv/gpaw_siteconfig.py
	GPAW_CONFIG=$(CURDIR)/.venv/gpaw_siteconfig.py $(INSTALL) --no-deps --no-build-isolation $(GPAW)
	@touch $@

fairchem: $(STAMP)  ## add fairchem-core to .venv
	$(INSTALL) --no-deps -r requirements-fairchem.lock

lock: $(STAMP)  ## write both lock files again from pyproject.toml
	$(call compile,--extra dev,requirements.lock)
	$(call compile,--extra dev --extra fairchem,requirements-fairchem.lock)

clean:  ## remove what `make book` and `make test` wrote; .venv, .cache and runs stay
	rm -rf book/_build book/notebooks book/generated build .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# A CPU build where the configured sources hold one; else, and on a machine with a
# GPU, uv asks the PyTorch index and picks CPU or CUDA from the driver.
define install_torch
if ! nvidia-smi >/dev/null 2>&1 && $(PY) -m pip install -q --no-deps $(TORCH)+cpu; then :; \
else echo "Asking the PyTorch index for $(TORCH)"; \
$(INSTALL) --torch-backend=auto -c requirements.lock $(TORCH); fi
endef

# Resolved with the CPU build, then the local version (+cpu) is dropped: the lock serves
# CPU and CUDA builds alike, and what a CUDA build needs comes with that build.
define compile
echo $(TORCH)+cpu | $(UV) pip compile -q pyproject.toml -c - $(1) --python-version 3.11 $(LOCK_FLAGS) --no-annotate --no-header -o $(2)
sed -i -E 's/^(torch==[^+]*)\+.*/\1/' $(2)
endef

# The stamp is written last; a run that was cut short leaves the mark `.installing`
# and the next one starts over.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(if $(wildcard .venv/.installing),--clear) .venv
	@touch .venv/.installing
	$(PY) -m pip install -q uv==$(UV_VERSION)
	$(install_torch)
	$(INSTALL) --no-deps -r requirements.lock
	$(INSTALL) --no-deps --no-build-isolation -e .
	@rm .venv/.installing
	@touch $@
