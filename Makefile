# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# The versions that both install: those that the tests last passed with (`make lock`). `LOCK=` takes the newest.
LOCK ?= constraints.txt
NEWEST := .venv-newest/bin
FLOORS := .venv-floors/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test faults trials slow bench docs test-newest test-floors lock audit lint clean
help:
	@echo "make demo         set up, build shards from real photos, inspect, train a tiny model on the CPU, answer questions"
	@echo "make test         set up and run the test suite"
	@echo "make slow         run the tests that take longer than about ten seconds each"
	@echo "make faults       kill, cut the power, fill the disk, break the code: prints a table of what was lost (nothing)"
	@echo "make trials       kill and stop training runs 82 times, in 1 to 3 ranks (about 8 minutes)"
	@echo "make bench        run the CPU benchmarks beside the peers that are installed; writes benchmarks/results/"
	@echo "make docs         write what docs/ takes from the code"
	@echo "make test-newest  run the test suite with the newest versions that pyproject.toml allows, in .venv-newest"
	@echo "make test-floors  the same with the oldest, in .venv-floors"
	@echo "make lock         test-newest, then write those versions to constraints.txt for the commands above"
	@echo "make audit        ask for known holes in the versions of constraints.txt; needs the network"
	@echo "make lint         mend and format the code"
	@echo "make clean        remove what building and testing leave; data/ and runs/ stay"

.venv/.installed: pyproject.toml $(LOCK)
	@echo "Installing into .venv (PyTorch is large; the first time takes some minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP_INSTALL) $(if $(LOCK),-c $(LOCK)) -e '.[test]'
	@touch $@

test: .venv/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -m "not slow"

slow: .venv/.installed
	@$(BIN)/python -m pytest -m slow

faults: .venv/.installed
	@cd tests && PYTHONPATH="$(CURDIR):$(CURDIR)/tests" ../$(BIN)/python -m faults

trials: .venv/.installed
	@cd tests && PYTHONPATH="$(CURDIR):$(CURDIR)/tests" ../$(BIN)/python -m faults trials

test-newest:
	@$(PYTHON) -m venv .venv-newest
	@$(NEWEST)/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[test]'
	@$(NEWEST)/python -m pytest -m "not slow"

# Old versions warn of newer ones beside them: that is not ours to mend.
test-floors:
	@$(PYTHON) -m venv .venv-floors
	@$(FLOORS)/python $(PIP_INSTALL) uv
	@$(FLOORS)/uv pip install --quiet --python $(FLOORS)/python --resolution lowest-direct -e '.[test]'
	@$(FLOORS)/python -m pytest -m "not slow" -W ignore

# nvidia-*, cuda-* and triton are torch's own exact choice, which differs by platform.
lock: test-newest
	@( echo "# What \`make demo\` and \`make test\` install; written by \`make lock\`. The ranges are in pyproject.toml."; \
	   $(NEWEST)/python -m pip --disable-pip-version-check freeze --exclude-editable \
	   | grep -E '^[A-Za-z0-9._-]+==' | grep -vE '^(nvidia|cuda|triton)' | sed 's/+.*//' ) > constraints.txt

audit:
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python $(PIP_INSTALL) pip-audit
	@.venv-audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt

demo: .venv/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash pipelines/demo/demo.sh

bench: .venv/.installed
	@$(BIN)/python benchmarks/bench.py $(if $(wildcard .bench/bin/python),--peers-python .bench/bin/python)

docs: .venv/.installed
	@$(BIN)/python docs/generate.py

lint: .venv/.installed
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	@$(BIN)/python docs/generate.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
