# Everything needed is set up on first use, in .venv; nothing is installed outside it.
#
#   make generate      text from the model that comes with the project     (PROMPT="JULIET:" ARGS="--seed 7")
#   make test          lint, format check, types and the tests              (ARGS="tests/test_layer.py -x")
#   make test-slow     the long tier of the tests
#   make lint | typecheck | format | clean
#
# PYTHON       the interpreter to build .venv from; default: the first python3 here that is 3.11 or newer
# TORCH_INDEX  an index to take torch alone from. Without an NVIDIA GPU the torch version in constraints-cpu.txt is
#              installed; where your package index serves its CUDA build (several GB), name PyTorch's index of CPU
#              wheels here, as given on pytorch.org under "Get Started": make test TORCH_INDEX=<address>

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
TORCH_INDEX ?=
PROMPT ?= ROMEO:
ARGS ?=

BIN := $(VENV)/bin
PIP := PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip -qq
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints-cpu.txt)

.PHONY: help generate test test-slow lint typecheck format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

generate: $(VENV)/.core
	@$(BIN)/tlstm generate --prompt "$(PROMPT)" $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.dev
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

typecheck: $(VENV)/.dev
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Stamps: a step is repeated only when what it depends on has changed.
$(VENV)/.venv:
	@[ -n "$(PYTHON)" ] || { echo "tlstm needs Python 3.11 or newer, and no python3 here is; install one," \
		"or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tlstm needs Python 3.11 or newer;" \
		"$(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version); this is done once" >&2
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu" \
		"install the package python3-venv, then try again" >&2; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.venv constraints-cpu.txt
	@echo "Installing torch$(if $(HAS_GPU),, (CPU version from constraints-cpu.txt))" >&2
	@$(PIP) install $(CONSTRAINTS) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "torch>=2.11"
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	@echo "Installing tlstm" >&2
	@$(PIP) install $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "Installing what the tests need" >&2
	@$(PIP) install $(CONSTRAINTS) -e ".[dev]"
	@touch $@
