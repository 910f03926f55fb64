# `make demo` and `make test` do all set-up on a fresh machine: the environment in .venv, the model in ~/.cache.
# A second run starts at once: stamps in .venv carry a checksum of what the environment was built from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
MODEL := .models/SmolLM2-135M-Instruct.Q4_1.gguf
KEY := $(shell cat pyproject.toml constraints/*.txt | cksum | tr ' ' '-')
CORE := $(VENV)/.core-$(KEY)
DEV := $(VENV)/.dev-$(KEY)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo model test test-long lint format lock clean
.NOTPARALLEL:

help:
	@echo "make demo       see a model answer on this machine, then a table of precisions"
	@echo "make test       lint, types and all tests (under 20 minutes on 2 cores)"
	@echo "make test-long  the same with soak runs and deep random testing"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make format     ruff format, and the mistakes ruff can mend"
	@echo "make lock       constraints/requirements.lock (hashes) and constraints/sbom.cdx.json, from pyproject.toml"
	@echo "make model      fetch the model of demo and tests: $(MODEL)"
	@echo "make clean      remove what these commands made in this folder"

demo: $(CORE)
	@$(BIN)/omniserve demo --yes

model: $(MODEL)

test: lint $(MODEL)
	$(RUN_TESTS)

test-long: lint $(MODEL)
	$(RUN_TESTS) --long

# One thread for each worker: two threads of one process on a busy 2-core machine are far slower than one.
test test-long: export OMP_NUM_THREADS = 1
RUN_TESTS = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(DEV)
	@$(PIP) install --quiet 'uv>=0.9' 'cyclonedx-bom>=7'
	@$(BIN)/python scripts/lock.py

clean:
	rm -rf $(VENV) .models build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(CORE):
	@$(CREATE)
	@echo "Installing omniserve into $(VENV) (about a minute; torch is the large part)"
	@$(PIP) install --quiet --editable . --constraint constraints/cpu.txt
	@touch $@

$(DEV):
	@$(CREATE)
	@echo "Installing omniserve and its development tools into $(VENV) (about a minute)"
	@$(PIP) install --quiet --editable '.[dev]' --constraint constraints/cpu.txt
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --quiet --no-deps -r constraints/triton.txt
	@touch $(CORE) $@

define CREATE
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "omniserve needs Python 3.11 or newer; name one, for instance: make PYTHON=python3.12" >&2; exit 2; }; \
$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV); \
rm -f $(VENV)/.core-* $(VENV)/.dev-*
endef

$(MODEL): | $(CORE)
	@$(BIN)/python scripts/fetch_model.py
