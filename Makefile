# Every target sets up .venv by itself and is quick when it is there already.
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo test check planted clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check src tests recipes examples
	$(BIN)/ruff format --check src tests recipes examples
	$(BIN)/mypy

planted: $(READY)
	$(BIN)/python -m tests.planted

# torch first and by its exact version: a range would fetch the newest build with its gigabytes of CUDA libraries
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[quantised,dev]'
	touch $(READY)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
