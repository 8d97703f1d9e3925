# make demo: tune a prompt and predict with it, on the shipped backbone, task and rows.
# make test, make lint, make test-foreign (packages in the tools that load them), make gpu-check (on a machine with an
# NVIDIA GPU), make clean. Everything is installed in .venv, once; nothing outside this folder is touched.

PYTHON ?= python3
BIN := .venv/bin
CLI := $(BIN)/bbt-accel

export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-foreign lint types gpu-check clean

help:
	@echo "make demo | test | test-foreign | lint | gpu-check | clean"

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is Python %d.%d; bbt-accel needs 3.11 or later: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[cpu,export,serve,remote,test]'
	@touch $@

# What has no wheel for this system or Python is left out, and its tests are skipped. TensorRT for RTX builds plans
# without a GPU.
.venv/.extras: .venv/.installed
	@for extra in gguf openvino ray trt; do \
	  $(BIN)/pip install --quiet --editable ".[$$extra]" || echo "no [$$extra] here: its tests are skipped"; \
	done
	@touch $@

.venv/.lint: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

# The rows, the backbone and the label words are shipped: nothing is downloaded once .venv is there.
demo: .venv/.installed
	rm -rf demo-run && mkdir demo-run
	$(CLI) export demo -o demo-run/bundle --n-prompt-tokens 20
	$(CLI) optimize demo-run/bundle -o demo-run/bundle-ort
	@echo; echo "The paper's search, twice: in PyTorch on the exported bundle, in ONNX Runtime on the optimized one."
	$(CLI) tune --bundle demo-run/bundle --task demo --preset paper --engine torch --budget 300 -o demo-run/torch
	$(CLI) tune --bundle demo-run/bundle-ort --task demo --preset paper --engine ort --budget 300 -o demo-run/ort
	@echo; echo "The default: a readout that is fitted on the same rows, and a search for what it cannot give."
	$(CLI) tune --bundle demo-run/bundle-ort --task demo --budget 300 -o demo-run/auto
	$(CLI) evaluate demo-run/torch
	$(CLI) evaluate demo-run/ort
	$(CLI) evaluate demo-run/auto
	$(CLI) predict demo-run/auto "The striker scored twice in the final" "Shares fell after the bank cut its forecast" \
	  "The new phone has a faster chip" "Doctors recommend a flu shot this winter"
	@echo; echo "demo-run/auto holds $$(ls -m demo-run/auto)"

test: .venv/.installed .venv/.extras
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Loads packages with optimum, optimum-intel, transformers.js, Chromium and PEFT at pinned versions, each in an
# environment of its own under build/foreign. What cannot be installed here is skipped, with the reason.
test-foreign: .venv/.installed .venv/.extras
	$(BIN)/pip install --quiet 'peft>=0.13'
	OMP_NUM_THREADS=2 $(BIN)/python tests/foreign/run.py

# Holds the GPU engines to the CPU and measures them. PYTHON is one that has torch for CUDA, onnxruntime-gpu, TensorRT,
# cuda-python and bbt-accel: nothing is installed.
gpu-check:
	$(PYTHON) -m bbt_accel.benchmarks.gpu_check -o gpu-check

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy and import-linter do not follow the editable install's map of folders to packages: they read an installed copy.
types: .venv/.lint
	@rm -rf build
	@$(BIN)/pip install --quiet --no-deps --target build/types .
	cd build/types && MYPY_CACHE_DIR=../../.mypy_cache ../../$(BIN)/mypy --config-file ../../pyproject.toml -p bbt_accel
	cd build/types && ../../$(BIN)/lint-imports ../../pyproject.toml --no-cache

clean:
	rm -rf .venv build demo-run *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
