# Each target sets up .venv by itself; the stamps say what was installed from which pyproject.toml.
#
#   make demo [TASK=har] [OUT=DIR] [ROUNDS=N] [SEED=S]
#   make test [ARGS='tests/shared -k masks']
#   make check   make bench   make clean
#   make fuzz [NETS=10000]   (random networks, traced, cut and held against the dense ones)
#   make fuzz-wire [RUNS=300000]   (all parsers of foreign bytes, with atheris)
#   make crashes [KILLS=20000] [AGENT_KILLS=200] [POWER_CUTS=60] [SEED=N]   (half an hour)
#   make state-matrix   (writes docs/installation-matrix.md)
#   make matrix   (every model with every granularity, schedule and criterion: 15 minutes)
#   make network   (every host of a fleet is cut off in turn, on several bad lines: as root, 5 minutes)
#   make study OUT=DIR [SEEDS='60 61']   (docs/method.md: four hours, to be taken up again any time)

PYTHON ?= python3
TASK ?= digits
WORKERS ?= 3
BIN := .venv/bin

.PHONY: demo test check bench fuzz matrix network study clean
.DEFAULT_GOAL := demo

demo: .venv/.demo
	@$(BIN)/fleetprune demo --task $(TASK) $(if $(OUT),--out '$(OUT)') \
		$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED))

test: .venv/.dev
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/.dev
	@echo 'ruff format'; $(BIN)/ruff format --check .
	@echo 'ruff check';  $(BIN)/ruff check .
	@echo 'mypy';        $(BIN)/mypy
	@echo 'import boundaries'; $(BIN)/pytest tests/test_boundaries.py

bench: .venv/.dev
	@set -e; for file in benchmarks/*.py; do echo "$$file"; PYTHONPATH=. $(BIN)/python "$$file"; done

NETS ?= 2000

fuzz: .venv/.dev
	@FUZZ=$(NETS) $(BIN)/pytest --timeout 0 tests/coordinator/test_random_nets.py $(ARGS)

RUNS ?= 300000

fuzz-wire: .venv/.fuzz
	@$(BIN)/python tests/fuzz/run.py --all $(RUNS)

KILLS ?= 20000
AGENT_KILLS ?= 200
POWER_CUTS ?= 60

crashes: .venv/.dev
	@KILLS=$(KILLS) AGENT_KILLS=$(AGENT_KILLS) POWER_CUTS=$(POWER_CUTS) SEED=$(or $(SEED),0) \
		$(BIN)/pytest -s tests/agent/test_crashes.py tests/agent/test_power_cuts.py \
		tests/e2e/test_kills.py $(ARGS)

state-matrix: .venv/.dev
	@$(BIN)/python tests/agent/state_matrix.py > docs/installation-matrix.md

matrix: .venv/.dev
	@MATRIX=1 $(BIN)/pytest -n $(WORKERS) --timeout 0 tests/coordinator/test_matrix.py $(ARGS)

network: .venv/.dev
	@NETWORK=1 $(BIN)/pytest tests/e2e/test_network.py $(ARGS)

# Every method at the learning rate that was best on the validation sets of other seeds.
RATE := training.learning_rate
SEEDS ?= 60 61 62 63 64
comma := ,
empty :=
STUDY = $(BIN)/fleetprune simulate --resume --jobs 2 --seed $(subst $(empty) ,$(comma),$(SEEDS))
METHODS := nested,small,fjord,heterofl,fedrolex,exclude,dense
SPARSE := prunefl,feddst,fedtiny,fedrts
STILL := --set training.criterion=none
FIRST := --set training.first_criterion
WARM := --warm-rounds 40 --rounds 20 --set $(RATE)=0.1 --set simulation.evaluate_every=1

study: .venv/.dev
	@test -n '$(OUT)' || { echo 'make: say where the study goes: make study OUT=DIR'; exit 1; }
	@$(STUDY) --task har --out '$(OUT)/har' --method $(METHODS) \
		--set fjord:$(RATE)=0.2 --set heterofl:$(RATE)=0.2 --set fedrolex:$(RATE)=0.2
	@$(STUDY) --task fashion --out '$(OUT)/fashion' --method $(METHODS) \
		--set small:$(RATE)=0.1 --set fedrolex:$(RATE)=0.2 --set exclude:$(RATE)=0.1 \
		--set dense:$(RATE)=0.2
	@$(STUDY) --task fashion --out '$(OUT)/sparse' --method $(SPARSE) \
		--set prunefl:$(RATE)=0.2 --set feddst:$(RATE)=0.1
	@$(STUDY) --task har --out '$(OUT)/sparse-har' --method $(SPARSE) --set $(RATE)=0.2 \
		--set prunefl:$(RATE)=0.4 --set fedtiny:$(RATE)=0.4
	@for seed in $(SEEDS); do \
		warm="$(BIN)/fleetprune simulate --resume --task fashion --seed $$seed $(WARM)"; \
		$$warm --out '$(OUT)'/warm/reconstruction-$$seed && \
		$$warm --out '$(OUT)'/warm/random-$$seed $(STILL) $(FIRST)=none --set training.refit=false && \
		$$warm --out '$(OUT)'/warm/taylor-$$seed $(STILL) $(FIRST)=taylor --set training.refit=false && \
		$$warm --out '$(OUT)'/warm/random-refitted-$$seed $(STILL) $(FIRST)=none && \
		$$warm --out '$(OUT)'/warm/order-$$seed $(STILL) --set training.refit=false || exit 1; \
	done
	@$(BIN)/fleetprune compare '$(OUT)/har' '$(OUT)/fashion' --baseline nested --out '$(OUT)/study.html'

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

# Not in dev: it is for CPython 3.11 to 3.13 on Linux alone.
.venv/.fuzz: .venv/.dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	@touch $@
