# make run | test | test-all | check | report | benchmark
PYTHON ?= python3
VENV   ?= .venv
NAME   ?= lowrank
BIN     = $(VENV)/bin

.PHONY: run test test-all check report benchmark clean

run: $(VENV)/ready
	$(BIN)/python main.py

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-all: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m ""

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

report: $(VENV)/ready
	$(BIN)/python -m distil_rank report
	$(BIN)/python -m benchmarks.documents

benchmark: $(VENV)/ready
	$(BIN)/python -m benchmarks.$(NAME)

# Exact versions come from constraints.txt, so every machine gets what the committed results were made with.
$(VENV)/ready: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV)
