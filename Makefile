# Everything happens in .venv and .qemu, nothing system-wide. PYTHON: 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
MEASURED := wire protocol dma migration server client

.DEFAULT_GOAL := help
.PHONY: help demo test check format lint types layers tests coverage qemu bench clean

help:
	@echo "make demo    a live migration of a device at work, verified byte by byte"
	@echo "make test    the test suite"
	@echo "make check   what CI runs: format, lint, types, layers, tests with coverage, QEMU"
	@echo "make bench   speed, in ratios to a C server"

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/developing: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

demo: $(VENV)/installed
	$(BIN)/vfio-user demo

test: $(VENV)/developing
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

check: format lint types layers qemu tests coverage

format: $(VENV)/developing
	$(BIN)/ruff format --check

lint: $(VENV)/developing
	$(BIN)/ruff check
	$(BIN)/codespell

types: $(VENV)/developing
	$(BIN)/mypy

layers: $(VENV)/developing
	$(BIN)/lint-imports

# Where QEMU cannot be had this says why and goes on: the tests that need it are skipped, or in CI fail.
qemu:
	-$(PYTHON) scripts/fetch_qemu.py --guest --guest-tools --lspci --sshd --tshark
	-$(PYTHON) scripts/fetch_nbd.py

tests: $(VENV)/developing
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --cov --cov-report=

coverage: $(VENV)/developing
	$(BIN)/coverage report --skip-covered --fail-under=95 \
	  --include="$$(echo $(MEASURED:%=src/vfio_user/%/*) | tr ' ' ',')"

bench: $(VENV)/developing
	$(BIN)/python -m bench.run

clean:
	rm -rf $(VENV) .qemu .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* build dist
