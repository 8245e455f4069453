# Two commands for users, each does all the set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test test-all check bench claims tiny-base clean

quickstart: $(VENV)/.core
	$(BIN)/posttrain run recipes/quickstart.yaml

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# Also what takes minutes: every objective under every tuner.
test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m ""

# The fast inner loop: everything but the tests that start processes or train for long.
check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -x --ignore tests/test_mutants.py --ignore tests/test_resume.py

# posttrain beside TRL and transformers on this machine, about an hour: the tables of docs/performance.md.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

# What papers claim about the methods, measured: claims/results and the table of docs/claims.md; each at most ten minutes.
claims: $(VENV)/.core
	OMP_NUM_THREADS=1 $(BIN)/python -m claims

# Makes the model in src/posttrain/assets/tiny-base anew, into runs/tiny_base (at most an hour on two cores).
tiny-base: $(VENV)/.core
	$(BIN)/posttrain run recipes/tiny_base.yaml

# $(call installed,extra): the environment with posttrain and one set of its extras.
define installed
	$(PYTHON) -c 'import sys; sys.exit("posttrain needs Python 3.11 or newer; set PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch -e '.$(1)'
	touch $@
endef

$(VENV)/.core: pyproject.toml constraints.txt
	$(call installed)

$(VENV)/.test: pyproject.toml constraints.txt
	$(call installed,[test])
	touch $(VENV)/.core

$(VENV)/.bench: pyproject.toml constraints.txt
	$(call installed,[bench])
	touch $(VENV)/.core

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
