# `make demo` and `make test` set everything up by themselves; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt

.PHONY: setup test demo bench gpu lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make test    set everything up and run all tests"
	@echo "make demo    set everything up and compare fusion methods on real speech"
	@echo "make bench   measure the kernels on this machine (benches/results/*.json)"
	@echo "make gpu     build, test, sanitize and measure on a machine with a CUDA GPU"
	@echo "make lint    ruff, mypy, clang-format, and a build with warnings as errors"

$(VENV)/.dependencies: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "mmkernels needs Python 3.10 or later as $(PYTHON); choose one with: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python's venv module is missing; install it with: apt-get install python3-venv python3-dev"; exit 1; }
	@echo "Installing dependencies into $(VENV) (minutes the first time)"
	$(PIP) torch numpy
	$(PIP) "scikit-build-core>=0.11" "pybind11>=2.13" ninja "cmake>=3.24"
	@# A CUDA build of torch brings the Triton it was made with; beside a CPU build any recent one will do.
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) "triton==3.6.0"
	@$(BIN)/python -c "import tomllib" 2>/dev/null || $(PIP) tomli
	$(BIN)/python tools/extras.py transfer dev > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@echo "Building the kernels"
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

setup: $(VENV)/.built

test: setup
	$(BIN)/python tools/test.py
