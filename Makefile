# On a fresh machine with git, Python and make: `make train` or `make test`. Each first sets up what it needs in .venv.

VENV := .venv
PYTHON ?= python3 python3.12 python3.13 python3.14 python
ARGS ?=

# The GPU wheels: CUDA 13 needs driver 580 or newer. The tests take them without a GPU too, to compile for GPUs that are
# not there. Only Linux has them.
ifeq ($(shell uname -s),Linux)
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n '1s/\..*//p')
CUDA_EXTRA ?= $(if $(DRIVER),$(shell [ $(DRIVER) -ge 580 ] && echo cuda13 || echo cuda12),cuda13)
endif
comma := ,
TRAIN_EXTRAS := $(if $(DRIVER),[$(CUDA_EXTRA)])
TEST_EXTRAS := [dev,hf$(addprefix $(comma),$(CUDA_EXTRA))]

.DEFAULT_GOAL := help
.PHONY: help train test lint format typecheck

help:
	@echo "make train      set up and train on Python's own sources;  make train ARGS='--steps 50' passes options on"
	@echo "make test       set up and run the tests;                  make test ARGS='-k layout' runs some of them"
	@echo "make lint       ruff: rules and formatting"
	@echo "make format     ruff: fix what it can, and format"
	@echo "make typecheck  pyright"
	@echo "PYTHON=...      the interpreter for .venv, 3.12 or newer;  CUDA_EXTRA=cuda12|cuda13 the GPU wheels"

train: $(VENV)/train.stamp
	$(VENV)/bin/python -m ring_jax.train $(ARGS)

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: $(VENV)/test.stamp
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

typecheck: $(VENV)/test.stamp
	$(VENV)/bin/pyright

# A stamp is older than pyproject.toml only when that has changed: then, and only then, pip runs again.
$(VENV)/train.stamp: pyproject.toml | $(VENV)/bin/pip
	@echo "Installing ring_jax$(TRAIN_EXTRAS) into $(VENV)"
	$(VENV)/bin/pip install --editable ".$(TRAIN_EXTRAS)"
	@touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/bin/pip
	@echo "Installing ring_jax$(TEST_EXTRAS) into $(VENV)"
	$(VENV)/bin/pip install --editable ".$(TEST_EXTRAS)"
	@touch $(VENV)/train.stamp $@

# The first Python that is new enough makes .venv. Where there is none, uv fetches one.
$(VENV)/bin/pip:
	@for python in $(PYTHON); do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || continue; \
	    echo "Making $(VENV) with $$("$$python" --version) ($$python)"; \
	    "$$python" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "$$python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	done; \
	echo "None of '$(PYTHON)' is Python 3.12 or newer: fetching one with uv"; \
	python3 -m venv $(VENV)/uv && $(VENV)/uv/bin/pip install --quiet uv \
	    && $(VENV)/uv/bin/uv python install 3.12 \
	    && "$$($(VENV)/uv/bin/uv python find 3.12)" -m venv $(VENV) && exit 0; \
	rm -rf $(VENV); \
	echo "That failed. Install Python 3.12 or newer and run: make PYTHON=/path/to/python3.12 ..." >&2; exit 1
