# Every target makes its own virtual environment first and can be repeated.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
STAMP := $(VENV)/.installed

XLA_VENV ?= .venv-xla
XLA_STAMP := $(XLA_VENV)/.installed

.PHONY: help demo test test-llamacpp test-xla test-xla-quick test-gpu test-multigpu bench-kernels bench-training bench-scaling bench-data lint format clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (Python packages pinned by constraints.txt) =="
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gpu,gguf,dev]'
	@touch $@

demo: $(STAMP)  ## fine-tune the embedded model and watch it get better (about a minute on two CPU cores)
	$(BIN)/pantheraml demo

test: $(STAMP)  ## run the tests that need no accelerator
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu"

test-llamacpp: $(STAMP)  ## build llama.cpp once (six minutes) and compare what it computes from GGUF files
	$(BIN)/python tests/llamacpp/build.py
	$(BIN)/python -m pytest -m llamacpp tests/llamacpp

$(XLA_STAMP): tests/xla/make_environment.sh tests/xla/cuda_stubs.py constraints.txt
	@echo "== setting up $(XLA_VENV) (torch_xla 2.9.0 with torch 2.9.0) =="
	sh tests/xla/make_environment.sh $(XLA_VENV)
	@touch $@

test-xla: $(XLA_STAMP)  ## run the tests of TPU training on torch_xla's CPU backend, with one device and with eight
	PJRT_DEVICE=CPU $(XLA_VENV)/bin/python -m pytest tests/xla
	PJRT_DEVICE=CPU CPU_NUM_DEVICES=8 $(XLA_VENV)/bin/python -m pytest tests/xla

# What trains, on eight devices; the compiler's figures, saving and the command are for test-xla.
XLA_QUICK := $(addprefix tests/xla/test_,training.py names.py head.py attention.py)
test-xla-quick: $(XLA_STAMP)  ## run those of test-xla that change the most with the rest of the code, with eight devices
	PJRT_DEVICE=CPU CPU_NUM_DEVICES=8 $(XLA_VENV)/bin/python -m pytest $(XLA_QUICK)

test-gpu:  ## run the tests that need a GPU, in the current environment
	$(PYTHON) -m pytest -m gpu tests

test-multigpu:  ## run the tests of several GPUs over NCCL on this host's first two, in the current environment
	$(PYTHON) -m pytest -m gpu tests/distributed tests/test_multi_gpu.py

bench-kernels:  ## time every fused op beside its peers on this GPU, into benchmarks/reports
	$(PYTHON) benchmarks/kernels/run.py --out benchmarks/reports

bench-training:  ## time fine-tuning steps beside the peers on this GPU, into benchmarks/reports
	$(PYTHON) benchmarks/training/run.py --out benchmarks/reports

bench-scaling:  ## time fine-tuning steps on one and on several GPUs of this host, into benchmarks/reports
	$(PYTHON) benchmarks/training/scaling.py --out benchmarks/reports

bench-data: $(STAMP)  ## time the preparation of chats beside `tokenizers` alone, into benchmarks/reports
	$(BIN)/python benchmarks/data/tokenise.py --out benchmarks/reports

lint: $(STAMP)  ## style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyrefly check --summary=none

format: $(STAMP)  ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(XLA_VENV) .pytest_cache .ruff_cache build dist *.egg-info
