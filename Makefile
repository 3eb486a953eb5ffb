# Every target does its own set-up: it needs Python 3.10 or newer with pip, and nothing else.
PYTHON ?= python3
# The oldest that the package allows, for test-oldest.
PYTHON_OLDEST ?= python3.10
BIN := .venv/bin

.PHONY: demo test lint types unit test-oldest test-newest test-borders bench docs docs-serve clean

demo: .venv/examples.installed
	$(BIN)/python examples/quickstart.py

test: lint types unit

lint: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.installed
	$(BIN)/mypy

# One thread a worker: workers with two threads each fight for the cores. Three of them on two cores: they wait for
# processes and browsers half of the time. By file: a fixture may start processes once for all its tests.
unit: .venv/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile

# With the oldest versions that pyproject.toml allows, and with the newest that there are. Each has an environment of its
# own. Deprecation warnings are no errors here: old packages meet new ones.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n 2 --dist loadfile -W ignore

test-newest: .venv-newest/installed
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest -n 2 --dist loadfile -W default

# What meets other people's loaders, exporters, adapters, loggers and tools, with these installed: `make test` skips it.
BORDERS := tests/callbacks/test_second_pass_of_packages.py tests/callbacks/test_monitor_loggers.py \
	tests/layers/test_timm.py tests/layers/test_tools.py tests/recalibration/test_adapters.py \
	tests/rules/test_averages_of_packages.py tests/rules/test_exporters_in_a_fit.py tests/exports \
	tests/test_docs.py::test_recipes_run

test-borders: .venv-borders/installed
	OMP_NUM_THREADS=1 .venv-borders/bin/pytest -n 2 --dist loadfile $(BORDERS)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

.venv-newest/installed: pyproject.toml
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --editable ".[dev]"
	touch $@

.venv-borders/installed: pyproject.toml constraints.txt requirements-borders.txt
	test -x .venv-borders/bin/python || $(PYTHON) -m venv .venv-borders
	.venv-borders/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	.venv-borders/bin/pip install --quiet --no-deps --requirement requirements-borders.txt
	touch $@

bench: .venv/dev.installed
	$(BIN)/python benchmarks/host_cost.py
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/batch_norm.py
	$(BIN)/python benchmarks/recalibration.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/activation_stats.py
	$(BIN)/python benchmarks/first_run.py
	$(BIN)/python benchmarks/communication.py
	$(BIN)/python benchmarks/page.py
	$(BIN)/python benchmarks/journal.py

docs: .venv/docs.installed
	$(BIN)/mkdocs build --strict --quiet

# The site at http://127.0.0.1:8000, built anew when a page changes.
docs-serve: .venv/docs.installed
	$(BIN)/mkdocs serve --strict

.venv/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-borders build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis runs
