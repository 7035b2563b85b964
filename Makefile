# Two commands on a fresh machine: make demo, make test. Both make .venv and install what they need, once.
PYTHON ?= python3
DATA ?= phantom
OUT ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test bench lint clean

demo: $(VENV)/.installed
	$(BIN)/emae demo --data $(DATA) --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/scores.py

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("emae needs Python 3.11 or newer: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV)
