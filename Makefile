# `make help` lists the targets. Each starts from what is there. Another Python: make PYTHON=python3.13 setup

PYTHON ?= python3
MINUTES ?= 10
PYTEST := .venv/bin/python -m pytest
# Two workers, as CI has two cores. A file stays with one: its tests share engines and checkpoints. In their order the
# short files are last.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
CPP := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format fast test-slow test-vllm coverage asan tsan soak bench docs wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/plugin.done ## .venv with vLLM for CPU, the plugin (editable) and its native kernels

demo: setup ## a small model answers three questions through the plugin, timed with it and without
	.venv/bin/vllm-neuron-rmsq demo

test: lint ## what CI runs: lint, types and all tests, two files at a time
	$(PYTEST) $(PARALLEL)

lint: setup ## ruff, clang-format, mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(CPP)
	.venv/bin/mypy

format: setup ## rewrite the sources as lint wants them
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(CPP)

fast: setup ## each test that starts no engine, server or other program, once: under a minute
	$(PYTEST) -q -m "not neuron and not slow and not engine" --once --hypothesis-profile=fast

test-slow: setup ## only the long matrices, which `test` leaves out
	.venv/bin/python -m pip install --quiet --disable-pip-version-check ray==2.60.0
	$(PYTEST) -m slow

test-vllm: setup ## what is about vLLM, on another one: make test-vllm VERSION=0.24.0
	.ci/test-vllm '$(VERSION)' '$(PYTHON)'

coverage: setup ## all tests, and which lines of Python they ran: .cache/coverage/html/index.html
	$(PYTEST) --cov --cov-report=term --cov-report=html

asan: setup ## the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	kernels/cpu/sanitize.sh address $(CURDIR)/.venv/bin/python

tsan: setup ## the CPU kernels under ThreadSanitizer, called from several threads
	kernels/cpu/sanitize.sh thread $(CURDIR)/.venv/bin/python

soak: setup ## a server under load for MINUTES (10): no error, memory flat, the same answers
	.venv/bin/python tests/soak.py --minutes $(MINUTES)

bench: setup ## every benchmark (half an hour of an idle machine), then the README's tables
	.venv/bin/python benchmarks/rms_norm_quant.py
	.venv/bin/python benchmarks/silu_mul_quant.py
	.venv/bin/python benchmarks/packed_fp8_linear.py
	.venv/bin/python benchmarks/end_to_end.py
	.venv/bin/python benchmarks/readme_tables.py

docs: setup ## the documentation as a site: .cache/site/index.html
	.venv/bin/python docs/stage.py .cache/docs
	.venv/bin/mkdocs build --quiet

wheel: setup ## dist/*.whl, native kernels included
	.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--wheel-dir dist .

clean: ## remove .venv, downloaded models and what was built
	rm -rf .venv .cache build dist

.venv/vllm.done: .ci/setup .ci/constraints.txt
	.ci/setup $(PYTHON)
	touch $@

.venv/plugin.done: .venv/vllm.done pyproject.toml setup.py $(CPP)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt \
		--no-build-isolation --editable '.[dev]'
	touch $@
