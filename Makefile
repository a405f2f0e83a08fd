# `make` prints this help. Every target sets up what it needs; a second run is quick.
SHELL := /bin/bash
VENV  := .venv
PY    := $(VENV)/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test check unit kernel e2e bench lint types layers format lock clean

help:  ## print this help
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## install apt packages and the virtual environment .venv/ (root, Debian 12)
	@bash scripts/setup.sh

demo: setup ## a cluster on this machine: policies, packets, explanations (leaves the lab running)
	@$(VENV)/bin/netpol-ctl lab demo

test: setup ## everything: check, then the real kernel, then the lab
	@bash scripts/test.sh

check: setup lint types layers unit ## lint, types, layers, unit and spec tests (no root needed once set up)

lint:
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
types:
	@$(VENV)/bin/mypy
layers:
	@$(VENV)/bin/lint-imports --no-logo 2>/dev/null || $(VENV)/bin/lint-imports
unit:  ## unit, spec and property tests
	@$(PY) -m pytest -q -n 2 -m "not kernel and not e2e"
kernel: setup ## tests on the real kernel, in network namespaces
	@$(PY) -m pytest -q -m kernel
e2e: setup ## tests that start a lab
	@$(PY) -m pytest -q -m e2e
bench: setup ## the figures of the README, as ratios of one run; writes bench/results.json
	@$(PY) -m bench
format: ## ruff format, and the fixes that ruff knows
	@$(VENV)/bin/ruff check --fix-only -q . ; $(VENV)/bin/ruff format .
lock:  ## renew requirements/*.lock from pyproject.toml
	@$(VENV)/bin/uv pip compile -q --upgrade --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements/run.lock
	@$(VENV)/bin/uv pip compile -q --upgrade --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header pyproject.toml --extra lab --extra dev -o requirements/dev.lock
clean: ## remove .venv and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
