VENV ?= .venv
PYTHON ?= python3
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := adadiff_kernels benchmarks docs examples python tests setup.py

.DEFAULT_GOAL := help
.PHONY: help install bench test test-all lint docs resources sanitize gpu-verdict gpu-bench gpu-python

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(INSTALLED) ## make the virtual environment .venv (VENV=...) and install into it
$(INSTALLED): setup.py pyproject.toml $(wildcard csrc/*)
	@echo 'Installing PyTorch, the packages for tests and benchmarks, and the C++ extension: a few minutes.' >&2
	@rm -f $@
	@$(PYTHON) -m venv $(VENV)
	@{ $(BIN)/python -m pip install $(PIP_FLAGS) -e '.[test,train,bench]' && touch $@; } | sed -unE $(PROGRESS) >&2
	@test -e $@ || { echo 'The installation failed, see above.' >&2; exit 1; }

# Of what pip prints: large downloads, the build and the end. Its errors are not on stdout and stay as they are.
PIP_FLAGS := --disable-pip-version-check --progress-bar off
PROGRESS := -e 's/^ *Downloading ([^ ]*\/)?([^-\/ ]+)-[^ ]*\.whl \(([0-9]{3}.* MB|.* GB)\).*/  downloading \2, \3/p' \
	-e 's/^ *Building editable for adadiff_kernels.* started.*/  building the C++ extension/p' \
	-e 's/^Installing collected packages.*/  unpacking/p'

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

bench: install ## run the main job; ARGS=--quick for its short form
	@$(BIN)/python benchmarks/run.py $(ARGS)

test: install ## run the quick tests; ARGS="-k policies" for some
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: install ## run all tests, in two processes
	ADADIFF_FUZZ=300 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: install ## check style, format and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# The packages of the extra alone: pages are made from the sources, so neither PyTorch nor the extension is needed.
DOCS_NEED := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*project["optional-dependencies"]["docs"], sep="\n")

docs: $(BIN)/python ## build the site into build/site; warnings are errors
	@$(BIN)/python -c '$(DOCS_NEED)' | $(BIN)/python -m pip install --quiet $(PIP_FLAGS) --requirement /dev/stdin
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

resources: install ## write what the GPU kernels take: registers, memory, loads (needs nvcc 13.0, no GPU)
	$(BIN)/python -m pip install --quiet triton==3.9.0
	$(BIN)/python -m benchmarks.gpu.resources

sanitize: install ## test the C++ core under AddressSanitizer and UndefinedBehaviourSanitizer
	$(BIN)/python -m pip install --quiet 'cmake>=3.24' 'ninja>=1.11'
	$(BIN)/cmake -S csrc -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_BUILD_TYPE=Debug -DADADIFF_BUILD_TESTS=ON -DADADIFF_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/core_tests

# With PYTHON and its packages as they are: a machine with a GPU often has an image of its own, and no network.
gpu-python:
	@$(PYTHON) -c 'import torch' 2>/dev/null || { echo "$(PYTHON) has no PyTorch; name one that has it: PYTHON=..."; exit 1; }

gpu-verdict: gpu-python ## tests, measurements and traces on this machine's GPU, in 10 minutes; ARGS="--only tests,passes"
	@PYTHONPATH=python $(PYTHON) -m benchmarks.gpu.verdict $(ARGS)

gpu-bench: gpu-python ## measure more on it: SUITE=ceilings|attention|passes|mlp|network|serving|decision|diffusers|all
	@PYTHONPATH=python $(PYTHON) -m benchmarks.gpu.run --suite $(or $(SUITE),all) $(ARGS)
