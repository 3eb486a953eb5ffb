# Every target does its own set-up: it needs Python 3.10 or newer with pip, and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types unit bench docs clean

demo: .venv/examples.installed
	$(BIN)/python examples/quickstart.py

test: lint types unit

lint: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.installed
	$(BIN)/mypy

# One thread a worker: two workers with two threads each fight for the cores. By file: a fixture may start processes once for all its tests.
unit: .venv/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

bench: .venv/dev.installed
	$(BIN)/python benchmarks/host_cost.py
	$(BIN)/python benchmarks/batch_norm.py
	$(BIN)/python benchmarks/recalibration.py
	$(BIN)/python benchmarks/activation_stats.py
	$(BIN)/python benchmarks/mode_check.py
	$(BIN)/python benchmarks/communication.py
	$(BIN)/python benchmarks/page.py

docs: .venv/docs.installed
	$(BIN)/mkdocs build --strict --quiet

.venv/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis runs
