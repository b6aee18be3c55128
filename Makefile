# Each target sets up .venv by itself; the stamps say what was installed from which pyproject.toml.
#
#   make demo [TASK=har] [OUT=DIR] [ROUNDS=N] [SEED=S]
#   make test [ARGS='tests/shared -k masks']
#   make check   make bench   make clean

PYTHON ?= python3
TASK ?= digits
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test check bench clean
.DEFAULT_GOAL := demo

demo: .venv/.demo
	@$(BIN)/fleetprune demo --task $(TASK) $(if $(OUT),--out '$(OUT)') \
		$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED))

test: .venv/.dev
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: .venv/.dev
	@echo 'ruff format'; $(BIN)/ruff format --check .
	@echo 'ruff check';  $(BIN)/ruff check .
	@echo 'mypy';        $(BIN)/mypy
	@echo 'import boundaries'; $(BIN)/pytest tests/test_boundaries.py

bench: .venv/.dev
	@set -e; for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python "$$file"; done

# Caches and builds; .venv stays, since it takes minutes to download.
clean:
	@rm -rf dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is older than Python 3.11; say which one: make PYTHON=..."; exit 1; }
	@echo 'making .venv'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# The tools for development include all that the demo needs.
.venv/.demo: pyproject.toml | .venv/bin/python
	@if [ ! -e .venv/.dev ] || [ pyproject.toml -nt .venv/.dev ]; then \
		echo "installing fleetprune[demo] into .venv (torch is large: minutes the first time)"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'; \
	fi
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	@echo "installing fleetprune[dev] into .venv (torch is large: minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
