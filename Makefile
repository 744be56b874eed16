# `make serve` and `make test` do all the set-up on a fresh machine with git, make and Python >= 3.11.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test lint format bench demo clean

serve: $(VENV)/serve.stamp
	@$(BIN)/python serve.py $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp
	$(BIN)/python -m bench.overhead
	$(BIN)/python -m bench.kernels
	$(BIN)/python -m bench.load_memory
	$(BIN)/python -m bench.cpu_linear
	$(BIN)/python -m bench.demo_quality

demo: $(VENV)/dev.stamp
	$(BIN)/python -m demo.train

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Herd needs Python 3.11 or newer, found {sys.version.split()[0]}; try: make PYTHON=python3.12 serve")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # half of one would pass for whole

$(VENV)/serve.stamp: requirements.txt constraints.txt | $(VENV)/bin/python
	$(INSTALL) --requirement requirements.txt
	@$(BIN)/python -m kernels.native.build
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt requirements.txt constraints.txt | $(VENV)/bin/python
	$(INSTALL) --requirement requirements-dev.txt
	@$(BIN)/python -m kernels.native.build
	@touch $@ $(VENV)/serve.stamp

clean:
	rm -rf $(VENV) kernels/native/build .pytest_cache .ruff_cache .mypy_cache
