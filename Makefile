# Every target that needs an environment makes ./.venv first, and renews it when the packaging or the C++
# changes; the demo alone makes ./.venv-demo, a third of it, where that isn't there. A change of PYTHON or TORCH needs
# a `make clean`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Installed before the package. On Linux a plain `torch==...` may be a CUDA build of several GB: pass pip the
# options for an index of CPU builds in PIP_ARGS, or another build here.
TORCH ?= torch==2.13.0
PIP_ARGS ?=
# The CUDA compiler as packages (270 MB) where there is none, for the CUDA kernels and their tests; empty for without.
CUDA_TOOLKIT ?= $(if $(shell command -v nvcc)$(CUDA_HOME)$(CUDA_PATH),,-r tests/cuda-toolkit.txt)
DEMO_SECONDS ?= 120
# How many cases the fuzzer draws, and from which seed; without one from a new seed, which it prints.
CASES ?= 20000
SEED ?=

BIN := .venv/bin
DEMO_ENVIRONMENT := $(if $(wildcard .venv/installed),.venv,.venv-demo)
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
INSTALL_INPUTS = pyproject.toml setup.py $(wildcard build_backend/*.py) $(filter csrc/%,$(CXX_FILES))

.DEFAULT_GOAL := help
.PHONY: help install test fuzz mutants peers demo bench gpu tables lint format clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

.venv/torch .venv-demo/torch: %/torch:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install $(PIP_ARGS) '$(TORCH)'
	touch $@

.venv/installed: .venv/torch $(INSTALL_INPUTS)
	$(if $(CUDA_TOOLKIT),$(BIN)/python -m pip install $(PIP_ARGS) $(CUDA_TOOLKIT))
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]'
	touch $@

.venv-demo/installed: .venv-demo/torch $(INSTALL_INPUTS)
	.venv-demo/bin/python -m pip install $(PIP_ARGS) -e '.[demo]'
	touch $@

install: .venv/installed  ## make .venv with the package and all its tools

# New memory is filled with garbage, so that scratch which a kernel reads before it writes shows. A process a core, each
# with whole files: what these build for their tests takes minutes. Threads that wait sleep, for other processes' sake.
test: .venv/installed peers  ## run the tests
	MALLOC_PERTURB_=165 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile

fuzz: .venv/installed  ## hold CASES drawn calls of everything to formulas of their own (20,000: a quarter of an hour)
	MALLOC_PERTURB_=165 OMP_WAIT_POLICY=passive $(BIN)/python tests/fuzz.py --cases $(CASES) $(if $(SEED),--seed $(SEED))

mutants: .venv/installed peers  ## plant single changes in the code and see whether the tests notice (three hours)
	$(BIN)/python tests/mutants.py

# Attention modules of other code bases, without their dependencies (120 MB): what accelerate is tested with.
peers: .venv/installed  ## install the code bases that are tested and timed against
	$(BIN)/python -m attnext.bench.code_bases.packages

demo: $(DEMO_ENVIRONMENT)/installed  ## train the demo model for DEMO_SECONDS and show what it attends to
	$(DEMO_ENVIRONMENT)/bin/attnext demo --seconds $(DEMO_SECONDS) --out demo-output

bench: .venv/installed  ## measure the kernels against their peers
	$(BIN)/attnext bench

gpu: .venv/installed  ## on a machine with a GPU: prove, tune and time everything, into gpu-check/ (25 minutes)
	$(BIN)/attnext gpu-check --out gpu-check

tables: .venv/installed  ## write what benchmarks/results has into the README
	$(BIN)/python benchmarks/tables.py

lint: .venv/installed  ## check style, types and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy attnext attnext_command.py kernels build_backend
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

format: .venv/installed  ## put Python and C++ into the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

clean:  ## remove everything that was built
	rm -rf .venv .venv-demo .peers build dist demo-output gpu-check *.egg-info attnext/_C.*.so attnext/_build.json
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
