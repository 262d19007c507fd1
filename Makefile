# `make demo` and `make test` set everything up by themselves; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt

.PHONY: help setup test demo bench gpu floors lint format clean

help:
	@echo "make demo    set everything up and compare methods on real speech: recognition, then prompts"
	@echo "make test    set everything up and run all tests"
	@echo "make bench   measure the kernels on this machine, into benches/results"
	@echo "make gpu     build, test, sanitize and measure on a machine with a CUDA GPU"
	@echo "make floors  run tests in environments with the oldest versions allowed, and with the peers"
	@echo "make lint    ruff, mypy, clang-format, and a build with warnings as errors"
	@echo "make format  let ruff and clang-format rewrite the sources"

# torch comes first and alone: all other packages are built against it, or resolved next to it.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "mmkernels needs Python 3.10 or later; choose one with: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python's venv module or headers are missing; install them with: apt-get install python3-venv python3-dev"; exit 1; }
	@echo "Installing torch into $(VENV) (minutes the first time)"
	@$(PIP) torch numpy
	@$(PIP) "scikit-build-core>=0.11" "pybind11>=2.13" ninja "cmake>=3.24"
	@# A CUDA build of torch brings its Triton; with a CPU build the tests need one too.
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) triton==3.6.0
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(SOURCES)
	@echo "Building the kernels and installing the other dependencies"
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation -e ".[transfer,dev]"
	@touch $@

setup: $(VENV)/.installed

# A process per core, at most 4, since each takes 1 to 2 GB. Triton's interpreter has to be chosen before Triton
# is imported, hence a second run.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
test: setup
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton/test_interpreter.py

demo: setup
	$(BIN)/mmtransfer compare --demo
	$(BIN)/mmtransfer compare --demo-prompts

bench: setup
	$(BIN)/python -m benches

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	@mkdir -p build
	@# Warnings come before machine code: PTX of one architecture has them all.
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/lint -G Ninja -DMMKERNELS_WERROR=ON -DCMAKE_CUDA_ARCHITECTURES=90-virtual \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > build/lint.log
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/lint

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# Uses the torch of $(PYTHON), which has to see the GPU; installs nothing but mmkernels itself, and that into a folder here.
gpu:
	PYTHON=$(PYTHON) bash tests/gpu/run.sh

# Environments of its own under build/floors; needs the package index, and 20 minutes of two cores.
floors: setup
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/floors/run.py

clean:
	rm -rf build $(VENV)
