# make demo: tune a prompt and predict with it, on the shipped backbone, task and rows.
# make test, make test-slow, make test-foreign (packages in the tools that load them), make test-lowest (the oldest
# versions of dependencies), make lint, make docs, make gpu-check (on a machine with an NVIDIA GPU), make clean.
# Everything is installed in .venv, once; nothing outside this folder is touched.

PYTHON ?= python3
BIN := .venv/bin
CLI := $(BIN)/bbt-accel

export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-foreign test-lowest lint types docs gpu-check clean

help:
	@echo "make demo | test | test-slow | test-foreign | test-lowest | lint | docs | gpu-check | clean"

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is Python %d.%d; bbt-accel needs 3.11 or later: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[cpu,export,serve,remote,test]'
	@touch $@

# What has no wheel for this system or Python is left out, and its tests are skipped. TensorRT for RTX builds plans
# without a GPU.
EXTRAS := gguf openvino ray trt mlflow excel peft
COMMA := ,
.venv/.extras: .venv/.installed
	@$(BIN)/pip install --quiet --editable '.[$(subst $() ,$(COMMA),$(EXTRAS))]' || for extra in $(EXTRAS); do \
	  $(BIN)/pip install --quiet --editable ".[$$extra]" || echo "no [$$extra] here: its tests are skipped"; \
	done
	@touch $@

.venv/.lint: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

.venv/.docs: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

# The rows, the backbone and the label words are shipped: nothing is downloaded once .venv is there.
demo: .venv/.installed
	rm -rf demo-run
	$(BIN)/python scripts/demo.py -o demo-run

test: .venv/.installed .venv/.extras
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Further exports and plans of the same families, Ray, whole programs, attacks.
test-slow: .venv/.installed .venv/.extras
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Loads packages with optimum, optimum-intel, transformers.js, Chromium and PEFT at pinned versions, each in an
# environment of its own under build/foreign, and checks report pages with Chromium and axe. What cannot be installed
# here is skipped, with the reason.
test-foreign: .venv/.installed .venv/.extras
	OMP_NUM_THREADS=2 $(BIN)/python tests/foreign/run.py

# The fast tests on the oldest versions that pyproject.toml allows, but for PyTorch, whose older builds bring CUDA.
LOWEST := .venv-lowest/bin
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/pip install --quiet uv
	$(LOWEST)/uv pip compile --quiet --no-header --resolution lowest-direct --python $(LOWEST)/python pyproject.toml \
	  --extra cpu --extra export --extra gguf --extra openvino --extra serve --extra remote --extra test \
	  | grep -v -E '^(torch==|triton==|nvidia-| )' > .venv-lowest/requirements.txt
	$(LOWEST)/pip install --quiet -r .venv-lowest/requirements.txt torch --editable .
	OMP_NUM_THREADS=1 $(LOWEST)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Runs the tests that need an NVIDIA GPU, then measures RoBERTa-large's shapes there, in .venv-gpu with PyTorch for CUDA,
# onnxruntime-gpu and GPU_TRT, which is what --engine trt needs on this GPU (docs/how-to/gpus.md).
GPU_TRT ?= tensorrt cuda-python
GPU := .venv-gpu/bin
gpu-check: .venv-gpu/.installed
	$(GPU)/python -m pytest -m gpu
	test -d gpu-check/backbone || $(GPU)/python -m bbt_accel.benchmarks.make_backbone roberta-large gpu-check/backbone
	$(GPU)/bbt-accel bench --backbone gpu-check/backbone --task demo --device cuda --engines torch,ort,trt \
	  --precisions fp32,fp16 --tune -o gpu-check/report

.venv-gpu/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet --editable '.[export,gpu,test]' $(GPU_TRT)
	@touch $@

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy does not follow the editable install's map of folders to packages: it reads an installed copy.
types: .venv/.lint
	@rm -rf build/types build/lib build/bdist.*
	@$(BIN)/pip install --quiet --no-deps --target build/types .
	cd build/types && MYPY_CACHE_DIR=../../.mypy_cache ../../$(BIN)/mypy --config-file ../../pyproject.toml -p bbt_accel

# The site, in build/site. The API comes from an installed copy, as for mypy. Running the tutorial and the notebooks is
# part of it, and nothing but pip uses the network.
docs: .venv/.docs
	@rm -rf build/docs build/site build/lib build/bdist.*
	@$(BIN)/pip install --quiet --no-deps --target build/docs .
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

clean:
	rm -rf .venv .venv-lowest .venv-gpu build demo-run *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
