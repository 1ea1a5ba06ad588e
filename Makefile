# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint clean
help:
	@echo "make demo   set up, build shards from real photos, inspect, train a tiny model on the CPU, answer questions"
	@echo "make test   set up and run the whole test suite"

.venv/.installed: pyproject.toml
	@echo "Installing into .venv (PyTorch is large; the first time takes some minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

test: .venv/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest

demo: .venv/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash pipelines/demo/demo.sh

lint: .venv/.installed
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf data runs build *.egg-info
