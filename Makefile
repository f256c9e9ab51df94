# Plain `make` lists the targets.
#
# The environment is kept in .venv. `make SYSTEM=1 <target>` uses the interpreter at hand instead, with the torch it
# already has, and installs nothing from a registry: for GPU machines without internet.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test lint format bench sanitize wheel clean FORCE

# Pinned: a looser range may fetch another multi-gigabyte build. May carry pip options too:
#   make TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu' setup
TORCH ?= torch==2.13.0
# Headers for the kernels of expert parallelism, and the library that they run with; torch's own may be older. 300 MB, so
# only where kernels are compiled. `make NCCL= setup` builds without them, or with those at NCCL_HOME.
NCCL ?= nvidia-nccl-cu13>=2.30
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

# Threads that spin while they wait slow a machine that is busy otherwise to a quarter.
export GOMP_SPINCOUNT ?= 1000

# From the environment or the command line to CMake. All are always passed: CMake would remember the last value.
DSV3RT_CUDA ?= AUTO
DSV3RT_PREBUILT ?=
DSV3RT_FOR_RACECHECK ?= OFF
CMAKE_DEFINES := \
  --config-settings=cmake.define.DSV3RT_CUDA='$(DSV3RT_CUDA)' \
  --config-settings=cmake.define.DSV3RT_FOR_RACECHECK='$(DSV3RT_FOR_RACECHECK)' \
  --config-settings=cmake.define.DSV3RT_PREBUILT='$(abspath $(DSV3RT_PREBUILT))'

ifeq ($(SYSTEM),1)
  PY := $(PYTHON)
  BIN :=
  STATE := build/system
  export PIP_BREAK_SYSTEM_PACKAGES := 1
  NO_INDEX := --no-deps --no-index
  # A stamp that came along from another machine says nothing about this one: ask the interpreter.
  INSTALLED := $(shell $(PY) -c "import importlib.metadata as m, json, pathlib; \
    print(json.loads(m.distribution('dsv3rt').read_text('direct_url.json'))['url'] == pathlib.Path.cwd().as_uri())" 2>&1)
  STALE := $(if $(filter True,$(INSTALLED)),,FORCE)
else
  PY := $(VENV)/bin/python
  BIN := $(VENV)/bin/
  STATE := $(VENV)
  NO_INDEX :=
  STALE :=
endif

# A new Python package (its __init__.py) has to be made known to the editable installation; a new module need not.
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f) $(DSV3RT_PREBUILT) \
  $(shell find python -name __init__.py)
NVCC := $(or $(CUDACXX),$(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
COMPILES := $(if $(filter OFF,$(DSV3RT_CUDA))$(DSV3RT_PREBUILT),,$(NVCC))
BUILD_OPTIONS := cuda=$(DSV3RT_CUDA) prebuilt=$(DSV3RT_PREBUILT) racecheck=$(DSV3RT_FOR_RACECHECK)
CSRC := find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'
	@echo
	@echo "  ARGS=...         further arguments, e.g. make test ARGS='-k router -x'"
	@echo "  SYSTEM=1         use the python3 at hand instead of .venv and install nothing from a registry"
	@echo "  DSV3RT_CUDA=...  ON, OFF or AUTO (default): build the CUDA kernels"

setup: $(STATE)/.built ## make the environment and build the package (quick when nothing changed)

train: setup ## train a small model on this machine, a few minutes on a CPU
	$(BIN)dsv3rt train configs/quickstart.toml $(ARGS)

test: setup ## run the tests; those marked gpu are skipped without a GPU
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(PY) -m pytest $(ARGS)

lint: setup ## check style and types, change nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CSRC) | xargs -r $(BIN)clang-format --dry-run -Werror

format: setup ## fix what the linters can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CSRC) | xargs -r $(BIN)clang-format -i

bench: setup ## measure on a GPU, write benchmarks/results/ and docs/performance.md
	$(PY) -m benchmarks $(ARGS)

sanitize: setup ## look at the kernels with compute-sanitizer, on a GPU; what it prints goes to build/sanitize/
	PY='$(PY)' scripts/sanitize.sh build/sanitize $(ARGS)

wheel: setup ## build a wheel into dist/
	$(PY) -m pip wheel . -w dist --no-deps --no-build-isolation $(NO_INDEX) $(CMAKE_DEFINES)

clean: ## remove what was built; the environment in .venv stays
	rm -rf build dist .benchmarks .mypy_cache .pytest_cache .ruff_cache
	rm -f $(STATE)/.built
	find python tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

FORCE:

# Rewritten only when an option changes, so that a change rebuilds and nothing else does.
$(STATE)/.options: FORCE
	@mkdir -p $(@D)
	@echo '$(BUILD_OPTIONS)' | cmp -s - $@ || echo '$(BUILD_OPTIONS)' > $@

ifeq ($(SYSTEM),1)

$(STATE)/.built: $(BUILD_INPUTS) $(STATE)/.options $(STALE)
	$(PY) -m pip install --no-build-isolation $(NO_INDEX) $(CMAKE_DEFINES) -e .
	@touch $@

else

# The build tools stand here beside pyproject.toml because the package is built without isolation: a rebuild then reuses
# build/ and takes seconds.
$(STATE)/.packages: pyproject.toml Makefile
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: '$(PYTHON)' is no Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV) || \
	    { echo "make: '$(PYTHON) -m venv' failed. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install $(TORCH)
	$(PY) -m pip install scikit-build-core pybind11 ninja cmake
	@touch $@

$(STATE)/.built: $(STATE)/.packages $(BUILD_INPUTS) $(STATE)/.options
	$(if $(and $(NCCL),$(COMPILES)),$(PY) -m pip install --no-deps '$(NCCL)')
	$(PY) -m pip install --no-build-isolation $(CMAKE_DEFINES) -e '.[dev]'
	@touch $@

endif
