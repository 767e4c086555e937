# `make test` and `make demo` do their whole set-up themselves, in $(VENV); the pins are in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install test demo lint benchmark clean

help:
	@echo "make demo        fit, sample, fine-tune and compare a tiny model (1 to 3 minutes, no GPU)"
	@echo "make test        run the tests"
	@echo "make lint        ruff and mypy"
	@echo "make benchmark   measure this machine and regenerate the README's tables and plots"

install: $(VENV)/.installed-test

# The demo needs less than the tests: no Triton, no linters.
$(VENV)/.installed-%: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

test: install
	$(BIN)/python -m pytest

demo: $(VENV)/.installed-training
	$(BIN)/python -m training.demo

lint: install
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

benchmark: install
	$(BIN)/python -m benchmarks.loss --shape reference real --json benchmarks/results/loss_cpu.json
	$(BIN)/python -m benchmarks.logps --shape reference --json benchmarks/results/logps_cpu.json
	$(BIN)/python -m benchmarks.scaling --json benchmarks/results/scaling_cpu.json
	$(BIN)/python -m benchmarks.step --json benchmarks/results/step_cpu.json
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) build dist *.egg-info
