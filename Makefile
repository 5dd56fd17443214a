# `make image PROMPT="…"` and `make test` set up all they need, once, in .venv.
PYTHON ?= python3
# Pinned, so that every machine tests the same PyTorch. On a machine with a GPU: make image TORCH=torch
TORCH ?= torch==2.13.0
PROMPT ?= a large red circle in the center on a white background
OUT ?= image.png
VENV := .venv
BIN := $(VENV)/bin

.PHONY: image bundled-model test test-all test-gpu support lint format clean

image: $(VENV)/.installed ## draw PROMPT into OUT with the bundled model, at the guidance it draws best
	@$(BIN)/fastsd generate --cfg-scale 2.5 -p "$$FASTSD_PROMPT" -o "$(OUT)"
image: export FASTSD_PROMPT := $(PROMPT)

BUNDLED := build/shapes-128
bundled-model: $(VENV)/.installed-train ## train the model that comes with fastsd; goes on where it stopped; STEPS=n: n steps more
	$(BIN)/fastsd train --config fastsd/training/recipes/shapes-128.toml --output $(BUNDLED) $(if $(STEPS),--stop-after $(STEPS))
	@if [ -d $(BUNDLED)/model ]; then mkdir -p fastsd/assets/shapes-128 && cp -r $(BUNDLED)/model/. fastsd/assets/shapes-128/; fi

test: $(VENV)/.installed-test ## every test that is not slow
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu"

test-all: $(VENV)/.installed-test ## also the slow ones: full-size nets, minutes and gigabytes
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(VENV)/.installed-test ## what needs a CUDA device; the outcomes go to bench/results/gpu-tests.json
	$(BIN)/python -m pytest -m gpu --results bench/results/gpu-tests.json

support: $(VENV)/.installed-test ## each feature of docs/SUPPORT.md with its oracle and the error measured; fails on a breach
	$(BIN)/python -m tests.support_matrix

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

# The environment. Each stamp is older than what it was made from only when that has changed.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fastsd needs Python 3.11 or later; say which: make PYTHON=python3.12 …"; exit 1; }
	@echo "fastsd: making an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.py
	@echo "fastsd: installing $(TORCH) and fastsd's other needs into $(VENV), once; this takes a minute or two"
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-train: $(VENV)/.installed
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[train]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "fastsd: installing what the tests need (pytest, diffusers, transformers, matplotlib, ruff, mypy), once"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,lint,bench]"
	@touch $@
